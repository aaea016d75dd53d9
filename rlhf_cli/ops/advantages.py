"""Advantages: what a completion's log-probability is weighted by. Inputs are detached rewards."""

from __future__ import annotations

from torch import Tensor


def leave_one_out(reward: Tensor, samples_per_prompt: int) -> Tensor:
    """RLOO: A_i = R_i - mean_{j != i} R_j = k/(k-1) * (R_i - mean R), over the k samples of one prompt.

    Ahmadian et al. 2024 (arXiv 2402.14740), eq. 7; Kool et al. 2019.

    Args:
        reward: float [N], prompt-major: rows i*k .. i*k+k-1 share a prompt.
        samples_per_prompt: k >= 2.

    Returns:
        float [N]; sums to 0 over each prompt, and is exactly 0 where all its rewards are equal.

    >>> import torch
    >>> leave_one_out(torch.tensor([1.0, 3.0, 0.0, 0.0]), 2).tolist()
    [-2.0, 2.0, 0.0, 0.0]
    """
    k = samples_per_prompt
    assert k >= 2, k
    assert reward.shape[0] % k == 0, (reward.shape, k)
    groups = reward.view(-1, k)
    # The mean of differences, not the difference of means: equal rewards then give exactly 0, which an optimizer
    # that divides by the gradient's size would otherwise blow up from rounding to a whole step.
    return ((groups[:, :, None] - groups[:, None, :]).sum(dim=-1) / (k - 1)).reshape(-1)


def best_of_group(reward: Tensor, samples_per_prompt: int) -> Tensor:
    """Which row is the best of its prompt's k samples: one a prompt, the first of equals.

    Args:
        reward: float [N], prompt-major.
        samples_per_prompt: k >= 1.

    Returns:
        bool [N].

    >>> import torch
    >>> best_of_group(torch.tensor([1.0, 3.0, 0.0, 0.0]), 2).tolist()
    [False, True, True, False]
    """
    assert reward.shape[0] % samples_per_prompt == 0, (reward.shape, samples_per_prompt)
    groups = reward.view(-1, samples_per_prompt)
    # cumsum, because argmax does not say which of equals it takes
    is_best = groups == groups.max(dim=-1, keepdim=True).values
    return (is_best & (is_best.cumsum(dim=-1) == 1)).reshape(-1)


def ema_baseline(baseline: float, batch_mean: float, alpha: float) -> float:
    """b <- alpha * b + (1 - alpha) * mean(R): exponential moving average of the batch means.

    >>> ema_baseline(0.0, 2.0, 0.75)
    0.5
    """
    return alpha * baseline + (1.0 - alpha) * batch_mean


def ema_bias_correction(baseline: float, alpha: float, num_updates: int) -> float:
    """b / (1 - alpha^n): removes the pull of b_0 = 0 after n updates (as Adam does); 0 before the first.

    >>> ema_bias_correction(0.5, 0.75, 1)
    2.0
    """
    if num_updates == 0:
        return 0.0
    return baseline / (1.0 - alpha**num_updates)


def mean_baseline(baseline: float, batch_mean: float, num_updates: int) -> float:
    """Arithmetic mean over all steps so far, one step further (RLOO paper eq. 8).

    Args:
        baseline: mean of the first `num_updates` batch means.
        batch_mean: the next one.
        num_updates: how many are in `baseline`.

    >>> mean_baseline(1.0, 4.0, 2)
    2.0
    """
    return baseline + (batch_mean - baseline) / (num_updates + 1)
