"""Logits of hidden states: the product with the output layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def output_logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """z = W h + b for each state.

    On a CPU in float32 the product is made the other way round, W by states, because the library splits the long side
    of its result better there: with 4 to 256 states and a vocabulary it takes a quarter to three quarters of the
    time. Its transpose is what is returned, so that the vocabulary is the last dimension and yet not the inner one.

    Args:
        states: [N, H].
        weight: [V, H].
        bias: [V] or None.

    Returns:
        [N, V], in memory of its own; contiguous or the transpose of a contiguous tensor.
    """
    if states.device.type != "cpu" or states.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(states, weight, bias)
    columns = torch.mm(weight, states.t())
    return (columns if bias is None else columns.add_(bias[:, None])).t()
