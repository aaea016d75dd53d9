"""Text to token ids, and token lists to padded rows.

Prompt and completion are encoded apart and concatenated, the same way in every stage, so a completion has the same
ids whether it is trained on, sampled, or scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.rows import mapped
from rlhf_cli.errors import RequestError
from rlhf_cli.types import Example, Message, Opening, PreferenceBatch, Prompt, PromptBatch, Sequences

_ROLE_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}

TokenPair = tuple[list[int], list[int]]  # ids of a prompt, ids of its completion


def render_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Text of a prompt, and whether special tokens are already in it.

    Chat turns use the tokenizer's chat template where it has one, and `plain_chat` otherwise.

    Raises:
        RequestError: the chat template refuses the turns, as some do with a system message.
    """
    if isinstance(prompt, Opening):
        return cut_opening(tokenizer, prompt), False
    if isinstance(prompt, str):
        return prompt, False
    if tokenizer.chat_template:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)), True
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in prompt)
            raise RequestError(f"prompt with the roles {roles}: the chat template refuses it ({error})") from error
    return plain_chat(prompt), False


def plain_chat(turns: Sequence[Message]) -> str:
    """Chat turns as plain paragraphs that wait for the assistant.

    A role stands on a line of its own, so that an answer begins with its first word, not with a space that belongs to
    the format: the same completion follows a chat template and this.
    """
    lines = [f"{_ROLE_NAMES.get(turn.role, turn.role)}:\n{turn.content}" for turn in turns]
    return "\n\n".join([*lines, "Assistant:\n"])


def cut_opening(tokenizer: PreTrainedTokenizerBase, opening: Opening) -> str:
    """Text of the first tokens, such that it has exactly these tokens when it is read again.

    Where the last token is only a part of a character, or would be read differently at the end of a text, the opening
    is the longest shorter one that is read as it was cut.
    """
    ids = list(tokenizer(opening.text, add_special_tokens=False)["input_ids"])[: opening.num_tokens]
    for count in range(len(ids), 0, -1):
        text = str(tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) == ids[:count]:
            return text
    # a tokenizer that does not give texts back, whatever their length
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def prompt_batch(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], index: Sequence[int], max_tokens: int
) -> PromptBatch:
    """Prompts with their ids; openings become the text that their ids stand for, which is what everyone else reads."""
    texts = [cut_opening(tokenizer, one) if isinstance(one, Opening) else one for one in prompts]
    return PromptBatch(
        prompts=tuple(texts),
        ids=tuple(tuple(encode_prompt(tokenizer, one, max_tokens)) for one in texts),
        index=tuple(index),
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_tokens: int,
    is_predicted: bool = True,
    is_begun: bool = False,
) -> list[int]:
    """Ids of a prompt, never empty where a completion is predicted from it (and not only scored with it).

    Where the prompt is the beginning of the completion's own text (`is_begun`), no token separates the two.

    Of a long one the END is kept, because the completion follows it, and with it the token that every text of this
    tokenizer starts with (BOS, CLS), where it has one.
    """
    text, has_specials = render_prompt(prompt, tokenizer)
    ids = list(tokenizer(text, add_special_tokens=not has_specials)["input_ids"])
    closing = (tokenizer.eos_token_id, tokenizer.sep_token_id) if is_begun else (tokenizer.eos_token_id,)
    if ids and not has_specials and ids[-1] in closing:
        ids.pop()  # tokenizers that close every text would tell the model that nothing follows
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids.pop(0)  # some data spells the token out that the tokenizer puts there as well
    if not ids and is_predicted:
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
    return encode_completions(tokenizer, [completion], max_tokens, [append_eos])[0]


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[str], max_tokens: int, append_eos: Sequence[bool]
) -> list[list[int]]:
    """Ids of N completions, as `encode_completion` has them one by one; many at once are several times faster."""
    if not completions:
        return []
    encoded = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    return [
        ended(tokenizer.eos_token_id, ids, max_tokens, append)
        for ids, append in zip(encoded, append_eos, strict=True)
    ]


def ended(eos_id: int | None, ids: Sequence[int], max_tokens: int, append_eos: bool) -> list[int]:
    """The ids up to their first EOS, then one EOS where it is wanted, cut at `max_tokens`."""
    kept = list(ids)
    if eos_id in kept:
        kept = kept[: kept.index(eos_id)]
    if append_eos and eos_id is not None:
        kept.append(eos_id)
    return kept[:max_tokens]


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_prompt: int, max_completion: int
) -> Sequence[TokenPair]:
    """Prompt and completion ids of each example; of many examples they are made when they are read."""

    def encode(example: Example) -> TokenPair:
        return (
            encode_prompt(tokenizer, example.prompt, max_prompt),
            encode_completion(tokenizer, example.completion, max_completion, append_eos=True),
        )

    return mapped(examples, encode)


@dataclass(frozen=True)
class Cuts:
    """How many of the first examples are longer than the caps."""

    examples: int
    prompts: int
    completions: int

    def __str__(self) -> str:
        return (
            f"of the first {self.examples:,} examples {self.prompts:,} prompts lose their beginning "
            f"and {self.completions:,} completions their end"
        )


def count_cuts(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_prompt: int,
    max_completion: int,
    at_most: int = 1000,
) -> Cuts:
    """Counts what the caps cut off, on the first `at_most` examples: exact for small data, quick for large."""
    num, prompts, completions = min(len(examples), at_most), 0, 0
    for example in examples[:num]:
        prompts += len(encode_prompt(tokenizer, example.prompt, max_prompt + 1)) > max_prompt
        ids = encode_completion(tokenizer, example.completion, max_completion + 1, append_eos=True)
        completions += len(ids) > max_completion
    return Cuts(num, prompts, completions)


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
