"""Drawing a token from logits with noise that is given, not drawn: same noise, same token.

No shape depends on what a tensor holds, so the host never waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Tokens summed at once. A cumulative sum goes token by token; sums of blocks, and then the tokens of one block, are two
# orders of magnitude fewer of its steps.
_BLOCK = 128


def inverse_cdf(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token whose interval of the cumulative distribution holds `uniform`, in the order of the vocabulary.

    One uniform number a row is enough for an exact draw, whatever the vocabulary's size. The block of tokens in which
    the number falls is found first, then the token in it.

    Args:
        weight: float32 [N, V], probabilities up to a factor of the row.
        uniform: float32 [N] in [0, 1).

    Returns:
        int64 [N], never a token of weight 0; and the sum of each row, float32 [N].
    """
    size = weight.shape[-1]
    whole = size - size % _BLOCK
    blocks = weight[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    if whole < size:
        blocks = torch.cat([blocks, weight[:, whole:].sum(-1, keepdim=True)], dim=-1)
    cumulative = _cumulative(blocks)
    total = cumulative[:, -1:]
    # Scaled by the rounded total: a float32 below 1 is at most 1 - 2^-24, so the product rounds to below the total
    # and the draw cannot run past the last possible block.
    number = uniform[:, None] * total
    block = torch.searchsorted(cumulative, number, right=True)
    before = torch.where(block > 0, cumulative.gather(-1, (block - 1).clamp(min=0)), 0.0)
    ids = block * _BLOCK + torch.arange(_BLOCK, device=weight.device)
    inside = _cumulative(torch.where(ids < size, weight.gather(-1, ids.clamp(max=size - 1)), 0.0))
    # The block's sum is rounded in another way here: what is left of the number has to stay below it
    below = torch.nextafter(inside[:, -1:], torch.zeros_like(total))
    place = torch.searchsorted(inside, torch.minimum(number - before, below), right=True)
    # Of weights that are no numbers none is found: an id beyond the vocabulary would end a GPU's context
    return (block * _BLOCK + place).clamp(max=size - 1)[:, 0], total[:, 0]


def _cumulative(weight: Tensor) -> Tensor:
    """Sums along the row that rise at possible tokens only, float32 [N, V]."""
    cumulative = torch.cumsum(weight, dim=-1)  # the CPU adds in double precision, and rounds each sum
    return never_falling(cumulative, weight) if weight.is_cuda else cumulative


def never_falling(cumulative: Tensor, weight: Tensor) -> Tensor:
    """Cumulative weights as exact sums would be: rising at possible tokens only, and falling nowhere.

    CUDA adds up in parallel and rounds every prefix on its own, so its sums may fall from one token to the next, or
    rise at a token of weight 0. The CPU adds in order and needs none of this.

    Args:
        cumulative: float32 [N, V], sums of `weight` along the row, up to rounding.
        weight: float32 [N, V].

    Returns:
        float32 [N, V].

    >>> sums = torch.tensor([[0.5, 0.75, 0.625, 0.875, 1.0]])
    >>> never_falling(sums, torch.tensor([[0.5, 0.25, 0.0, 0.0, 0.25]])).tolist()
    [[0.5, 0.75, 0.75, 0.75, 1.0]]
    """
    return torch.where(weight > 0, cumulative, 0.0).cummax(dim=-1).values


def truncated_logits(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits of the distribution over the most likely tokens alone: -inf for all others.

    First top-k, then top-p (Holtzman et al. 2020, arXiv 1904.09751, section 3.1) of what is left, renormalised: the
    smallest set of its most likely tokens whose probability reaches p. The order, and what becomes of equals, are those
    of transformers: all that equal the k-th most likely token stay, and of equals at the end of top-p those with the
    highest ids.

    Args:
        logits: [..., V], divided by the temperature; the gradient flows through those that stay.
        top_k: >= 1; None, or at least V: all tokens.
        top_p: above 0; None, or at least 1: all tokens. The most likely token always stays.

    Returns:
        [..., V]; `logits` itself where nothing is cut.

    >>> halves = torch.log(torch.tensor([[0.5, 0.125, 0.25, 0.125]]))  # top-2: 2/3 and 1/3
    >>> truncated_logits(halves, top_k=2).exp().tolist()
    [[0.5, 0.0, 0.25, 0.0]]
    >>> truncated_logits(halves, top_p=0.7).exp().tolist()
    [[0.5, 0.0, 0.25, 0.0]]
    >>> truncated_logits(halves, top_k=2, top_p=0.6).exp().tolist()
    [[0.5, 0.0, 0.0, 0.0]]
    """
    num_tokens = logits.shape[-1]
    if top_k is not None and top_k < num_tokens:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p is not None and top_p < 1:
        rising, order = logits.sort(dim=-1, stable=True)
        cumulative = rising.softmax(dim=-1).cumsum(dim=-1)
        num_cut = (cumulative <= 1 - top_p).sum(dim=-1, keepdim=True).clamp(max=num_tokens - 1)
        cut = torch.arange(num_tokens, device=logits.device) < num_cut
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), -torch.inf)
    return logits


def sample_token(
    logits: Tensor,
    uniform: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws the next token of each row.

    The noise runs through the vocabulary in its own order, so that a cut which removes little changes few tokens.

    Args:
        logits: [N, V], any float type.
        uniform: float32 [N] in [0, 1).
        temperature: >= 0; 0 takes the most likely token.
        top_k: as `truncated_logits` has it.
        top_p: likewise.

    Returns:
        ids int64 [N], and their log-probs float32 [N] under the distribution that they were drawn from: at the same
        temperature, over the same tokens (0 when greedy).
    """
    logits = logits.float()
    if temperature == 0.0:
        return logits.argmax(dim=-1), torch.zeros(logits.shape[0], device=logits.device)
    if temperature != 1.0:
        logits = logits / temperature
    logits = truncated_logits(logits, top_k, top_p)
    highest = logits.amax(dim=-1, keepdim=True)
    ids, total = inverse_cdf((logits - highest).exp_(), uniform)  # the highest weight is 1: none overflows
    return ids, (logits.gather(-1, ids[:, None]) - highest)[:, 0] - total.log()
