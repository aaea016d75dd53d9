"""Drawing a token from logits with noise that is given, not drawn: same noise, same token."""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens summed at once. A cumulative sum goes token by token; sums of blocks, and then the tokens of one block, are two
# orders of magnitude fewer of its steps.
_BLOCK = 128


def inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution holds `uniform`.

    One uniform number a row is enough for an exact draw, whatever the vocabulary's size. The block of tokens in which
    the number falls is found first, then the token in it.

    Args:
        probability: float32 [N, V], up to a positive factor of each row.
        uniform: float32 [N] in [0, 1).

    Returns:
        int64 [N]; never a token of probability 0.
    """
    size = probability.shape[-1]
    whole = size - size % _BLOCK
    blocks = probability[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < size:
        blocks = torch.cat([blocks, probability[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = _cumulative(blocks)
    # Scaled by the rounded total: a float32 below 1 is at most 1 - 2^-24, so the product rounds to below the total
    # and the draw cannot run past the last possible block.
    number = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, number, right=True)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=probability.device)
    inside = torch.where(ids < size, probability.gather(-1, ids.clamp(max=size - 1)), 0.0)
    cumulative = _cumulative(inside)
    # The block's sum is rounded in another way here: what is left of the number has to stay below it
    total = cumulative[:, -1:]
    rest = torch.minimum(number - before, torch.nextafter(total, torch.zeros_like(total)))
    return (block * _BLOCK + torch.searchsorted(cumulative, rest, right=True))[:, 0]


def _cumulative(probability: Tensor) -> Tensor:
    """Sums along the row that rise at possible tokens only, float32 [N, V]."""
    cumulative = torch.cumsum(probability, dim=-1)
    return never_falling(cumulative, probability) if probability.is_cuda else cumulative


def never_falling(cumulative: Tensor, probability: Tensor) -> Tensor:
    """Cumulative probabilities as exact sums would be: rising at possible tokens only, and falling nowhere.

    CUDA adds up in parallel and rounds every prefix on its own, so its sums may fall from one token to the next, or
    rise at a token of probability 0. The CPU adds in order and needs none of this.

    Args:
        cumulative: float32 [N, V], sums of `probability` along the row, up to rounding.
        probability: float32 [N, V].

    Returns:
        float32 [N, V].

    >>> sums = torch.tensor([[0.5, 0.75, 0.625, 0.875, 1.0]])
    >>> never_falling(sums, torch.tensor([[0.5, 0.25, 0.0, 0.0, 0.25]])).tolist()
    [[0.5, 0.75, 0.75, 0.75, 1.0]]
    """
    return torch.where(probability > 0, cumulative, 0.0).cummax(dim=-1).values


def sample_token(logits: Tensor, uniform: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draws the next token of each row.

    Args:
        logits: [N, V], any float type.
        uniform: float32 [N] in [0, 1).
        temperature: >= 0; 0 takes the most likely token.

    Returns:
        ids int64 [N], and their log-probs float32 [N] at the same temperature (0 when greedy).
    """
    logits = logits.float()
    if temperature == 0.0:
        return logits.argmax(dim=-1), torch.zeros(logits.shape[0], device=logits.device)
    if temperature != 1.0:
        logits = logits / temperature
    top = logits.amax(dim=-1, keepdim=True)
    weight = (logits - top).exp_()
    ids = inverse_cdf(weight, uniform)
    logprob = logits.gather(-1, ids[:, None]) - top - weight.sum(-1, keepdim=True).log()
    return ids, logprob[:, 0]
