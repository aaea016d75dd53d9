"""Losses on pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, normaliser: float, margin: Tensor | None = None
) -> Tensor:
    """-(1/n) sum log sigmoid(r+ - r- - m) (Bradley & Terry 1952; margin: Touvron et al. 2023, eq. 2).

    Args:
        chosen: float [N], reward of the preferred completion.
        rejected: float [N].
        normaliser: n, the number of pairs in the whole optimizer step.
        margin: float [N], how much the preferred one has to be ahead; None is 0.

    Returns:
        Scalar.

    >>> import torch
    >>> round(bradley_terry_loss(torch.zeros(1), torch.zeros(1), 1.0).item(), 6)
    0.693147
    """
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    return -F.logsigmoid(difference).sum() / normaliser
