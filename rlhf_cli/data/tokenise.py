"""Text to token ids, and token lists to padded rows.

Prompt and completion are encoded apart and concatenated, the same way in every stage, so a completion has the same
ids whether it is trained on, sampled, or scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_cli.errors import RequestError
from rlhf_cli.types import Example, Message, PreferenceBatch, Prompt, Sequences

_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

TokenPair = tuple[list[int], list[int]]  # ids of a prompt, ids of its completion


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Text of a prompt, and whether special tokens are already in it.

    Chat turns use the tokenizer's chat template where it has one, and "Role: content" paragraphs that end in
    "Assistant:" otherwise.

    Raises:
        RequestError: the chat template refuses the turns, as some do with a system message.
    """
    if isinstance(prompt, str):
        return prompt, False
    if tokenizer.chat_template:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        try:
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), True
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in prompt)
            raise RequestError(f"prompt with the roles {roles}: the chat template refuses it ({error})") from error
    return plain_chat(prompt), False


def plain_chat(turns: Sequence[Message]) -> str:
    """Chat turns as plain paragraphs that wait for the assistant."""
    lines = [f"{_ROLE_NAMES.get(turn.role, turn.role)}: {turn.content}" for turn in turns]
    return "\n\n".join([*lines, "Assistant:"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, max_tokens: int) -> list[int]:
    """Ids of a prompt, never empty.

    Of a long one the END is kept, because the completion follows it, and with it the token that every text of this
    tokenizer starts with (BOS, CLS), where it has one.
    """
    text, has_specials = render_prompt(prompt, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=not has_specials)["input_ids"])
    if ids and not has_specials and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # tokenizers that close every text would tell the model that nothing follows
    if not ids:
        # something has to predict the first completion token
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        assert start is not None, "an empty prompt needs a tokenizer with a BOS or EOS token"
        ids = [start]
    if len(ids) <= max_tokens:
        return ids
    has_start = ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id)
    if has_start and max_tokens > 1:
        return [ids[0], *ids[len(ids) - max_tokens + 1 :]]
    return ids[-max_tokens:]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, completion: str, max_tokens: int, append_eos: bool
) -> list[int]:
    """Ids of a completion with one EOS, at its end; one longer than `max_tokens` is cut and has no EOS.

    Where the text spells the EOS token out, as some data does at its end, the completion ends there.
    """
    ids = list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    eos_id = tokenizer.eos_token_id
    if eos_id in ids:
        ids = ids[: ids.index(eos_id)]
    if append_eos and eos_id is not None:
        ids.append(eos_id)
    return ids[:max_tokens]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_prompt: int, max_completion: int
) -> list[TokenPair]:
    """Prompt and completion ids of each example."""
    return [
        (
            encode_prompt(tokenizer, example.prompt, max_prompt),
            encode_completion(tokenizer, example.completion, max_completion, append_eos=True),
        )
        for example in examples
    ]


def collate(rows: Sequence[TokenPair], pad_id: int, side: str = "right", length: int | None = None) -> Sequences:
    """Pads prompt + completion rows to one length.

    Args:
        rows: N (prompt ids, completion ids).
        pad_id: what fills the padding; any id, because masks and not ids say what counts.
        side: "right" or "left".
        length: pad to this many columns; None = the longest row.

    Returns:
        N rows.
    """
    longest = max((len(prompt) + len(completion) for prompt, completion in rows), default=1)
    width = longest if length is None else length
    assert width >= longest, (width, longest)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    attention = torch.zeros((len(rows), width), dtype=torch.bool)
    counts = torch.zeros((len(rows), width), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(rows):
        used = len(prompt) + len(completion)
        start = 0 if side == "right" else width - used
        ids[row, start : start + used] = torch.tensor([*prompt, *completion], dtype=torch.long)
        attention[row, start : start + used] = True
        counts[row, start + len(prompt) : start + used] = True
    return Sequences(ids, attention, counts)


def collate_pairs(
    chosen: Sequence[TokenPair], rejected: Sequence[TokenPair], margin: Sequence[float], pad_id: int
) -> PreferenceBatch:
    """Pads pairs; chosen and rejected get one common length."""
    both = collate([*chosen, *rejected], pad_id)
    n = len(chosen)
    return PreferenceBatch(both[:n], both[n:], torch.tensor(list(margin), dtype=torch.float32))
