"""Advantages where every token is an action: per-token rewards, returns, and generalised advantage estimation.

All grids are [N, T] with one mask: bool, True = a completion token. The True entries of a row follow each other
without a gap and may begin at any column (prompts differ in length) and end at any (padding). An episode is one
completion: nothing is paid after its last token, and what is outside the mask is 0 in every result and may be
anything, NaN included, in every input. Nothing here carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.ops.masks import is_contiguous, is_last_true, zero_outside

# Added to the variance before its root: keeps one entry, or equal ones, finite. Far below any variance of advantages.
WHITEN_EPSILON = 1e-8


def token_rewards(reward: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta * log[pi(y_t|.)/ref(y_t|.)], and the completion's reward on top at its last token.

    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens: the row sums to the sequence-level
    R_beta of `kl.shaped_reward`. The last token is the EOS, or, where the length limit came first, the last one
    there is; it is never a padding position, not even where the padding token is the EOS.

    Args:
        reward: float [N], of the completion.
        log_ratio: float [N, T], nats per token.
        mask: bool [N, T].
        beta: weight of the KL, >= 0.

    Returns:
        float [N, T]; a row without a token is 0 everywhere.

    >>> ratio, mask = torch.tensor([[9.0, 1.0, -2.0, 9.0]]), torch.tensor([[False, True, True, False]])
    >>> token_rewards(torch.tensor([3.0]), ratio, mask, 0.5).tolist()
    [[0.0, -0.5, 4.0, 0.0]]
    """
    penalty = zero_outside(-beta * log_ratio.detach(), mask)
    return penalty + zero_outside(reward.detach()[:, None].expand_as(penalty), is_last_true(mask))


def returns_to_go(token_reward: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = sum_{l >= 0} gamma^l * r_{t+l}, to the end of the completion: what vanilla policy gradient weights by.

    Sutton & Barto 2018, eq. 3.8.

    Args:
        token_reward: float [N, T].
        mask: bool [N, T].
        gamma: discount per token, in [0, 1].

    Returns:
        float [N, T].

    >>> reward, mask = torch.tensor([[0.0, -0.5, 4.0, 0.0]]), torch.tensor([[False, True, True, False]])
    >>> returns_to_go(reward, mask).tolist()
    [[0.0, 3.5, 4.0, 0.0]]
    """
    assert is_contiguous(mask), "a completion has no gaps"
    return zero_outside(_discounted_sum_to_go(zero_outside(token_reward.detach(), mask), gamma), mask)


def generalised_advantages(
    token_reward: Tensor, value: Tensor, mask: Tensor, *, lam: float, gamma: float = 1.0
) -> tuple[Tensor, Tensor]:
    """GAE: A_t = sum_{l >= 0} (gamma * lambda)^l * delta_{t+l},  delta_t = r_t + gamma * V_{t+1} - V_t.

    Schulman et al. 2016 (arXiv 1506.02438), eq. 16. lambda = 0 is the TD error (eq. 17), lambda = 1 the return-to-go
    minus the value (eq. 18). The value after the last token is 0: a completion cut by the length limit is scored as
    it stands, so it ends there like any other.

    Args:
        token_reward: float [N, T].
        value: float [N, T]; V_t is the value of the state that token t is drawn in (before it is known).
        mask: bool [N, T].
        lam: lambda, in [0, 1].
        gamma: discount per token, in [0, 1].

    Returns:
        advantage float [N, T]; returns float [N, T] = advantage + value, what the value head regresses on.

    >>> reward, mask = torch.tensor([[9.0, -0.5, 4.0]]), torch.tensor([[False, True, True]])
    >>> advantage, returns = generalised_advantages(reward, torch.tensor([[9.0, 1.0, 2.0]]), mask, lam=0.5)
    >>> advantage.tolist()  # the TD errors are -0.5 + 2 - 1 and 4 - 2
    [[0.0, 1.5, 2.0]]
    >>> returns.tolist()
    [[0.0, 2.5, 4.0]]
    """
    assert is_contiguous(mask), "a completion has no gaps"
    value = zero_outside(value.detach(), mask)
    next_value = torch.nn.functional.pad(value[:, 1:], (0, 1))
    # 0 behind the last token, which is what makes the episode end there; before the first it is never looked at
    td_error = zero_outside(token_reward.detach(), mask) + gamma * next_value - value
    advantage = zero_outside(_discounted_sum_to_go(td_error, gamma * lam), mask)
    return advantage, advantage + value


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(v - mean) / sqrt(variance + 1e-8) over all entries of the batch that count, as PPO does with advantages.

    The variance is the biased one (divided by n, as in Ziegler et al. 2019's published code): it is defined for one
    entry, and repeating the batch changes nothing. Equal entries give exactly 0.

    Args:
        values: float [N, T].
        mask: bool [N, T].
        shift_mean: False scales only and leaves the mean where it was (what is done to rewards).

    Returns:
        float [N, T].

    >>> grid, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    >>> [round(entry, 6) for entry in whiten(grid, mask)[0].tolist()]
    [-1.0, 1.0, 0.0]
    >>> [round(entry, 6) for entry in whiten(4 * grid, mask, shift_mean=False)[0].tolist()]
    [7.0, 9.0, 0.0]
    """
    values = values.detach()
    result = torch.zeros_like(values)
    entries = values[mask]
    if entries.numel() == 0:
        return result
    # Measured from one of them first: the mean of equal numbers may be off by rounding, which 1/sqrt(1e-8) would blow
    # up, but their differences are exactly 0.
    centred = entries - entries[0]
    offset = centred.mean()
    centred = centred - offset
    scaled = centred / torch.sqrt(centred.square().mean() + WHITEN_EPSILON)
    return result.masked_scatter(mask, scaled if shift_mean else scaled + (entries[0] + offset))


def value_metrics(value: Tensor, returns: Tensor, mask: Tensor) -> dict[str, float]:
    """How well a critic knows the returns: its mean, and the share of their variance it explains (1 = all).

    Args:
        value: float [N, T].
        returns: float [N, T].
        mask: bool [N, T].

    Returns:
        `value/mean` and `value/explained_variance`; 0 where the returns do not vary.
    """
    v, g = value[mask].double(), returns[mask].double()
    variance = float(g.var(unbiased=False))
    explained = 1.0 - float((g - v).var(unbiased=False)) / variance if variance > 0 else 0.0
    return {"value/mean": float(v.mean()), "value/explained_variance": explained}


def _discounted_sum_to_go(values: Tensor, factor: float) -> Tensor:
    """s_t = v_t + factor * s_{t+1}, float [N, T]; a column at a time, from the last."""
    total = torch.zeros_like(values[:, 0])
    columns = []
    for column in reversed(values.unbind(dim=1)):
        total = column + factor * total
        columns.append(total)
    return torch.stack(columns[::-1], dim=1)
