"""Logits of a sequence classifier for rows of tokens: batching, and reading the right position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import TokenPair, collate
from rlhf_cli.models.attention import takes_layouts
from rlhf_cli.models.packing import like_lengths, packed_states
from rlhf_cli.models.positions import check_length, first_position, takes_positions, token_positions
from rlhf_cli.ops.masks import last_true
from rlhf_cli.types import Sequences

# Of one forward pass of scoring: no row is followed by a gradient, so that many fit.
MAX_ROWS = 512
MAX_TOKENS = 16_384

# Rows of an encoder that go through it together are at least this long, as a share of the longest of them.
_LIKE_LENGTH = 0.875

# Below as many tokens a pass takes as long however many they are: then all rows go together, padded.
_WORTH_CUTTING = 2048


@torch.no_grad()
def logits_of_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenPair],
    batch_size: int = MAX_ROWS,
) -> Tensor:
    """The classifier's outputs for encoded rows, float32 [N, K] on the CPU, in the order given.

    Rows are cut into forward passes of at most `batch_size` rows and MAX_TOKENS tokens, padding included: short rows
    go through many at a time, long ones few. Where padding is computed they are sorted by length first, so that few
    columns are padding; elsewhere they stay in order, so that rows with one prompt stay together.
    """
    logits = torch.empty(len(rows), int(model.config.num_labels or 1))
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    for chosen in token_batches(lengths, batch_size, in_order=takes_layouts(model)):
        batch = collate([rows[i] for i in chosen], int(tokenizer.pad_token_id))
        logits[chosen] = score_sequences(model, batch.to(model.device)).float().cpu()
    return logits


def token_batches(
    lengths: Sequence[int], max_rows: int, max_tokens: int = MAX_TOKENS, in_order: bool = False
) -> Iterator[list[int]]:
    """Row numbers of each forward pass, the shortest rows first unless they are to stay in order.

    Args:
        lengths: N, in tokens.
        max_rows: of a pass.
        max_tokens: of a pass, every row padded to its longest; a single row may be longer.
        in_order: whether the rows stay as they are; their tokens are then counted without padding.

    >>> list(token_batches([9, 2, 3, 2], max_rows=3, max_tokens=9))
    [[1, 3, 2], [0]]
    """
    batch: list[int] = []
    count = 0
    for row in range(len(lengths)) if in_order else sorted(range(len(lengths)), key=lengths.__getitem__):
        tokens = count + lengths[row] if in_order else (len(batch) + 1) * lengths[row]
        if batch and (len(batch) == max_rows or tokens > max_tokens):
            yield batch
            batch, tokens = [], lengths[row]
        batch.append(row)
        count = tokens
    if batch:
        yield batch


def score_sequences(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Logits of N rows, read at the last real token by the attention mask, never by the id of pad.

    Decoder classifiers of transformers have a `score` head over the backbone; encoder classifiers (DistilBERT,
    RoBERTa) pool their first column themselves, so their rows are moved to the left.

    Returns:
        float [N, K], K = 1 of a scalar reward model; gradients flow where they are enabled.

    Raises:
        RequestError: a row has more tokens than the model has positions.
    """
    if not has_linear_head(model):
        check_length(model, sequences)
        return _score_in_groups(model, sequences)
    return head_of_pooled(model, pooled_states(model, sequences))


def has_linear_head(model: PreTrainedModel) -> bool:
    """Whether the head is one matrix over one position's state: of decoder classifiers, not of encoder classifiers."""
    return getattr(model, "score", None) is not None


def pooled_states(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """What a linear head reads: the backbone's state at the last real token, float32 [N, H]."""
    if takes_layouts(model):
        packed, packing = packed_states(model, sequences)
        return packed[packing.last].float()
    check_length(model, sequences)
    hidden = model.base_model(
        input_ids=sequences.ids,
        attention_mask=sequences.attention_mask.long(),
        position_ids=token_positions(sequences.attention_mask),
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(sequences), device=hidden.device)
    return hidden[rows, last_true(sequences.attention_mask)].float()


def head_of_pooled(model: PreTrainedModel, pooled: Tensor) -> Tensor:
    """Logits [N, K] of states [N, H], without autocast: in bfloat16 hundreds of texts would share one score."""
    with torch.autocast(pooled.device.type, enabled=False):
        return model.score(pooled)


def _score_in_groups(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """Rows of like length together, so that of many less than a tenth of what is computed is padding."""
    groups = like_lengths(sequences.attention_mask.sum(-1).tolist(), _LIKE_LENGTH)
    if len(groups) <= 1 or sequences.ids.numel() < _WORTH_CUTTING:
        return _score_by_first_token(model, sequences)
    order = torch.tensor([row for group in groups for row in group], device=sequences.ids.device)
    rows = sequences[order]
    parts, start = list[Tensor](), 0
    for group in groups:
        parts.append(_score_by_first_token(model, rows[start : start + len(group)]))
        start += len(group)
    return torch.cat(parts)[order.argsort()]


def _score_by_first_token(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    # A stable sort by "is padding" keeps the tokens in order and puts them in front.
    width = int(sequences.attention_mask.sum(-1).max())
    order = sequences.attention_mask.logical_not().sort(dim=-1, stable=True).indices[:, :width]
    ids, attention = sequences.ids.gather(-1, order), sequences.attention_mask.gather(-1, order)
    # RoBERTa would find its positions by the id of pad, which is for the mask alone to say.
    positions = {}
    if takes_positions(model):
        positions["position_ids"] = token_positions(attention, first_position(model))
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]  # of the head
    hook = last.register_forward_hook(_again_in_float32)
    try:
        return model(input_ids=ids, attention_mask=attention.long(), **positions).logits
    finally:
        hook.remove()


def _again_in_float32(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
    """A forward hook: what autocast has computed in half precision, computed again; None leaves the output."""
    if output.dtype is torch.float32 or not isinstance(layer, nn.Linear):
        return None
    with torch.autocast(output.device.type, enabled=False):
        return functional.linear(inputs[0].float(), layer.weight, layer.bias)
