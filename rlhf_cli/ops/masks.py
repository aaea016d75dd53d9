"""Masks: which tokens count, and the only reductions over them.

One convention everywhere: bool, True = the token counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def zero_outside(values: Tensor, mask: Tensor) -> Tensor:
    """`values` where `mask` is True and 0 elsewhere, in the gradient as well.

    Masked-out entries may be NaN or infinite: they are replaced, not multiplied by zero.

    >>> zero_outside(torch.tensor([2.0, float("inf")]), torch.tensor([True, False])).tolist()
    [2.0, 0.0]
    """
    return torch.where(mask, values, torch.zeros_like(values))


def masked_sum(values: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    """Sum of `values` where `mask` is True; 0 where nothing counts.

    Masked-out entries may be NaN or infinite: they are replaced, not multiplied by zero.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False])).item()
    3.0
    """
    return zero_outside(values, mask).sum(dim)


def is_eos(ids: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Which tokens end a completion: the stop rule, used wherever a stop is looked for.

    Args:
        ids: int64, any shape.
        eos_ids: the ids that end a completion (chat models have several); may be empty.

    Returns:
        bool, the shape of `ids`.
    """
    stops = torch.zeros_like(ids, dtype=torch.bool)
    for eos_id in eos_ids:
        stops |= ids == eos_id
    return stops


def last_true(mask: Tensor) -> Tensor:
    """Index of the last True of each row.

    Args:
        mask: bool [N, L], at least one True in every row.

    Returns:
        int64 [N].
    """
    assert bool(mask.any(dim=-1).all()), "a row without a real token has no last token"
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, torch.full_like(positions, -1)).max(dim=-1).values


def is_last_true(mask: Tensor) -> Tensor:
    """Which column holds the last True of its row; none in a row without one.

    Args:
        mask: bool [N, L].

    Returns:
        bool [N, L], at most one True in every row.

    >>> is_last_true(torch.tensor([[False, True, True, False], [False, False, False, False]])).int().tolist()
    [[0, 0, 1, 0], [0, 0, 0, 0]]
    """
    num_from_here_on = mask.flip(-1).cumsum(-1).flip(-1)
    return mask & (num_from_here_on == 1)


def is_contiguous(mask: Tensor) -> bool:
    """Whether the True entries of every row of [N, L] follow each other without a gap; so they do where there are none.

    >>> is_contiguous(torch.tensor([[False, True, True], [False, False, False]]))
    True
    >>> is_contiguous(torch.tensor([[True, False, True]]))
    False
    """
    num_ends = (mask[:, :-1] & ~mask[:, 1:]).sum(-1) + mask[:, -1].long()
    return bool((num_ends <= 1).all())
