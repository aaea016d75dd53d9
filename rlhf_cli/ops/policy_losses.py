"""Policy-gradient losses over whole completions (one completion = one action)."""

from __future__ import annotations

import torch
from torch import Tensor


def score_function_loss(logprob: Tensor, advantage: Tensor, normaliser: float) -> Tensor:
    """REINFORCE: loss = -(1/n) sum_i A_i * log pi(y_i|x_i) (Williams 1992).

    Args:
        logprob: float [N], summed over the completion, with gradient.
        advantage: float [N], detached.
        normaliser: n, the number of SEQUENCES in the whole optimizer step (all micro-batches and ranks).

    Returns:
        Scalar; micro-batch losses add up to the step's loss.

    >>> score_function_loss(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0]), 2.0).item()
    -0.5
    """
    return -(advantage.detach() * logprob).sum() / normaliser


def sequence_ratio(logprob: Tensor, old_logprob: Tensor) -> Tensor:
    """pi(y|x) / pi_old(y|x) of whole completions, float [N]; exactly 1 where the two log-probs are equal."""
    return torch.exp(logprob - old_logprob.detach())


def ratio_loss(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, normaliser: float, clip: float | None = None
) -> Tensor:
    """Off-policy form for several gradient steps per rollout: -(1/n) sum_i min(rho_i A_i, clip(rho_i) A_i).

    rho is the sequence-level ratio pi/pi_old. At rho = 1 the gradient is that of `score_function_loss`.
    The pessimistic clip is PPO's (Schulman et al. 2017, eq. 7), applied to the whole completion.

    Args:
        logprob: float [N], with gradient.
        old_logprob: float [N], under the policy that sampled.
        advantage: float [N], detached.
        normaliser: number of sequences in the whole optimizer step.
        clip: epsilon of the interval [1 - epsilon, 1 + epsilon]; None leaves the ratio alone.

    Returns:
        Scalar.
    """
    ratio = sequence_ratio(logprob, old_logprob)
    gain = ratio * advantage.detach()
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage.detach())
    return -gain.sum() / normaliser


def clipped_fraction(ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """Share of rows whose gradient the clip cuts off, as a scalar; 0 without a clip."""
    if clip is None:
        return torch.zeros((), device=ratio.device)
    cut = ((ratio > 1.0 + clip) & (advantage > 0)) | ((ratio < 1.0 - clip) & (advantage < 0))
    return cut.float().mean()
