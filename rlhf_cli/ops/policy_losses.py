"""Policy-gradient losses: first over whole completions (one completion = one action), then over tokens.

Over tokens, all grids are [N, T] with one mask: bool, True = a completion token. What is outside it may be anything
and gets no gradient. A loss of completions is divided by SEQUENCES, a loss of tokens by TOKENS, each counted over the
whole optimizer step (all micro-batches and ranks), so that micro-batch losses add up to the step's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.ops.masks import masked_sum, zero_outside


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
    return _is_cut(ratio, advantage, clip).float().mean()


def token_score_function_loss(logprob: Tensor, advantage: Tensor, mask: Tensor, normaliser: float) -> Tensor:
    """Vanilla policy gradient: loss = -(1/n) sum_t A_t * log pi(y_t|x, y_<t) (Sutton et al. 2000, theorem 1).

    Args:
        logprob: float [N, T], with gradient.
        advantage: float [N, T], detached; the return-to-go minus the value.
        mask: bool [N, T].
        normaliser: n, the number of TOKENS in the whole optimizer step.

    Returns:
        Scalar.

    >>> logprob, mask = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[True, True, False]])
    >>> token_score_function_loss(logprob, torch.tensor([[3.0, -1.0, 9.0]]), mask, 2.0).item()
    0.5
    """
    return -masked_sum(zero_outside(advantage.detach(), mask) * logprob, mask).sum() / normaliser


def token_ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor) -> Tensor:
    """pi(y_t|.) / pi_old(y_t|.), float [N, T]; exactly 1 where the two log-probs are equal, and outside the mask."""
    return torch.exp(zero_outside(logprob - old_logprob.detach(), mask))


def clipped_ratio_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    normaliser: float,
    clip: float | None,
) -> Tensor:
    """PPO: loss = -(1/n) sum_t min(rho_t A_t, clip(rho_t, 1 - epsilon, 1 + epsilon) A_t),  rho_t = pi / pi_old.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7. At rho = 1 the gradient is that of `token_score_function_loss`.

    Args:
        logprob: float [N, T], with gradient.
        old_logprob: float [N, T], under the policy that sampled.
        advantage: float [N, T], detached.
        mask: bool [N, T].
        normaliser: n, the number of TOKENS in the whole optimizer step.
        clip: epsilon; None leaves the ratio alone.

    Returns:
        Scalar.

    >>> ratio, mask = torch.tensor([[1.5, 0.5]]), torch.tensor([[True, True]])
    >>> loss = clipped_ratio_loss(ratio.log(), torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), mask, 2.0, 0.25)
    >>> round(loss.item(), 6)  # -(1.25 * 1 + 0.5 * 2) / 2
    -1.125
    """
    advantage = zero_outside(advantage.detach(), mask)
    ratio = token_ratio(logprob, old_logprob, mask)
    gain = ratio * advantage
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    return -masked_sum(gain, mask).sum() / normaliser


def clipped_token_fraction(
    ratio: Tensor, advantage: Tensor, mask: Tensor, normaliser: float, clip: float | None
) -> Tensor:
    """Share of the step's tokens whose gradient the clip cuts off, as a scalar that adds up over micro-batches.

    Args:
        ratio: float [N, T].
        advantage: float [N, T].
        mask: bool [N, T].
        normaliser: the number of TOKENS in the whole optimizer step.
        clip: epsilon; None cuts nothing.
    """
    if clip is None:
        return torch.zeros((), device=ratio.device)
    return masked_sum(_is_cut(ratio, advantage, clip).float(), mask).sum() / normaliser


def value_loss(
    value: Tensor, old_value: Tensor, target: Tensor, mask: Tensor, normaliser: float, clip: float | None
) -> Tensor:
    """(1/n) sum_t 1/2 max((V_t - G_t)^2, (clip(V_t, V_old_t - epsilon, V_old_t + epsilon) - G_t)^2).

    The squared error of Schulman et al. 2017 (arXiv 1707.06347), eq. 9, with the half and the clip of their published
    code: a value that left the interval around the old one and is nearer to the target than the interval's edge is
    not moved further.

    Args:
        value: float [N, T], with gradient.
        old_value: float [N, T], of the value head that the advantages were computed with.
        target: float [N, T], detached; the returns.
        mask: bool [N, T].
        normaliser: n, the number of TOKENS in the whole optimizer step.
        clip: epsilon, in units of the reward; None leaves the value alone.

    Returns:
        Scalar.

    >>> value, mask = torch.tensor([[3.0, 1.0]]), torch.tensor([[True, True]])
    >>> loss = value_loss(value, torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), mask, 2.0, 0.5)
    >>> loss.item()  # (1/2 * (0.5 - 4)^2 + 1/2 * (1 - 0)^2) / 2
    3.3125
    """
    target = target.detach()
    value = zero_outside(value, mask)
    error = (value - target).square()
    if clip is not None:
        old_value = old_value.detach()
        near = torch.minimum(torch.maximum(value, old_value - clip), old_value + clip)
        error = torch.maximum(error, (near - target).square())
    return masked_sum(error, mask).sum() / (2.0 * normaliser)


def _is_cut(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Where the pessimistic minimum takes the clipped ratio, which has no gradient; bool, the shape of `ratio`."""
    return ((ratio > 1.0 + clip) & (advantage > 0)) | ((ratio < 1.0 - clip) & (advantage < 0))
