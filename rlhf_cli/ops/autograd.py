"""Functions whose gradient is worth writing by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def taken(values: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None = None) -> Tensor:
    """values[index], where every row is taken at most once apart from rows that nobody reads.

    The gradient of a plain selection has to add up what each row was taken for, one number after the other on a CPU;
    here it is a selection again.

    Args:
        values: [A, ...].
        index: int64 [B], which rows.
        inverse: int64 [A], where each row of `values` went to in the result.
        keep: bool [A, 1, ...], False for rows of `values` that have no place in the result and hence no gradient;
            None = all have one.

    Returns:
        [B, ...].

    >>> taken(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 0, 0]), torch.tensor([1, 0])).tolist()
    [[2.0], [1.0], [1.0]]
    """
    return _Taken.apply(values, index, inverse, keep)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, inverse: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, keep)
        return values.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, keep = ctx.saved_tensors
        result = gradient.index_select(0, inverse)
        return (result if keep is None else result.masked_fill_(~keep, 0.0)), None, None, None
