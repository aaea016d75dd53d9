"""Drawing a token from logits with noise that is given, not drawn: same noise, same token."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_cdf(probability: Tensor, uniform: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution holds `uniform`.

    One uniform number a row is enough for an exact draw, whatever the vocabulary's size.

    Args:
        probability: float32 [N, V], rows sum to about 1.
        uniform: float32 [N] in [0, 1).

    Returns:
        int64 [N]; never a token of probability 0.
    """
    cumulative = torch.cumsum(probability, dim=-1)
    if probability.is_cuda:
        cumulative = never_falling(cumulative, probability)
    total = cumulative[:, -1:]
    # Scaled by the rounded total: a float32 below 1 is at most 1 - 2^-24, so the product rounds to below the total
    # and the draw cannot run past the last possible token.
    return torch.searchsorted(cumulative, uniform[:, None] * total, right=True)[:, 0]


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
    logprob = torch.log_softmax(logits / temperature, dim=-1)
    ids = inverse_cdf(logprob.exp(), uniform)
    return ids, logprob.gather(-1, ids[:, None])[:, 0]
