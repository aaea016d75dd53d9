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


def log_ratio(logprob: Tensor, ref_logprob: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """log pi(y|x) - log ref(y|x) of each completion: its implicit reward over beta.

    Args:
        logprob: float32 [N], nats, summed over the completion's tokens.
        ref_logprob: float32 [N], the same under the reference; a constant.
        num_tokens: int64 [N], tokens of each completion: the ratio is then the mean over them; None leaves the sum.

    Returns:
        float32 [N], nats, or nats per token.

    >>> import torch
    >>> log_ratio(torch.tensor([-2.0]), torch.tensor([-5.0])).item()
    3.0
    >>> log_ratio(torch.tensor([-2.0]), torch.tensor([-5.0]), torch.tensor([6])).item()
    0.5
    """
    ratio = logprob - ref_logprob
    return ratio if num_tokens is None else ratio / num_tokens.clamp(min=1)


def dpo_loss(
    chosen_ratio: Tensor, rejected_ratio: Tensor, normaliser: float, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """-(1/n) sum [(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)],   h = ratio+ - ratio-

    Rafailov et al. 2023 (arXiv 2305.18290), eq. 7. With label smoothing eps a pair is taken to be labelled the wrong
    way round with that probability (their conservative DPO).

    Args:
        chosen_ratio: float [N], `log_ratio` of the preferred completion, nats.
        rejected_ratio: float [N].
        normaliser: n, the number of pairs in the whole optimizer step.
        beta: > 0.
        label_smoothing: eps, from 0 to below 1/2.

    Returns:
        Scalar, nats per pair; ln 2 where policy and reference agree.

    >>> import torch
    >>> at_start, apart = torch.zeros(1), torch.log(torch.tensor([3.0]))
    >>> round(dpo_loss(at_start, at_start, 1.0, beta=0.1).item(), 6)
    0.693147
    >>> round(dpo_loss(apart, at_start, 1.0, beta=1.0).item(), 6)  # ln(4/3)
    0.287682
    """
    scaled = beta * (chosen_ratio - rejected_ratio)
    loss = -(1.0 - label_smoothing) * F.logsigmoid(scaled)
    if label_smoothing:  # 0 * inf has no value
        loss = loss - label_smoothing * F.logsigmoid(-scaled)
    return loss.sum() / normaliser


def ipo_loss(chosen_ratio: Tensor, rejected_ratio: Tensor, normaliser: float, beta: float) -> Tensor:
    """(1/n) sum (h - 1/(2 beta))^2,   h = ratio+ - ratio-

    Azar et al. 2023 (arXiv 2310.12036), eq. 17, where beta is called tau. h is of whole completions there; the means
    over tokens (`log_ratio` with num_tokens) keep long completions from deciding the loss.

    Args:
        chosen_ratio: float [N], `log_ratio` of the preferred completion, nats, or nats per token.
        rejected_ratio: float [N].
        normaliser: n, the number of pairs in the whole optimizer step.
        beta: > 0.

    Returns:
        Scalar, 1/(4 beta^2) where policy and reference agree.

    >>> import torch
    >>> ipo_loss(torch.tensor([3.0]), torch.tensor([1.0]), 1.0, beta=0.5).item()
    1.0
    """
    return (chosen_ratio - rejected_ratio - 1.0 / (2.0 * beta)).square().sum() / normaliser


def wins(difference: Tensor) -> Tensor:
    """Number of pairs whose difference (chosen minus rejected) is positive; a tie counts one half.

    >>> import torch
    >>> wins(torch.tensor([2.0, 0.0, -1.0])).item()
    1.5
    """
    return (difference > 0).float().sum() + 0.5 * (difference == 0).float().sum()
