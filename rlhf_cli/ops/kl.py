"""KL divergence between the policy q and the reference p: estimators, and the KL-shaped reward.

Estimators after Schulman, "Approximating KL Divergence" (2020), with l = log(q/p) SUMMED over a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.types import Sequences


def k1(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k1 = l = log q - log p: unbiased for KL(q||p), of either sign.

    Args:
        logprob: float [N], log-prob of the completion under the policy.
        ref_logprob: float [N], under the reference.

    Returns:
        float [N], nats per completion.
    """
    return logprob - ref_logprob


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k2 = l^2 / 2: biased, never negative. Shapes as in `k1`."""
    return (logprob - ref_logprob).square() / 2


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """k3 = exp(-l) - 1 + l: unbiased for KL(q||p), never negative. Shapes as in `k1`."""
    log_ratio = logprob - ref_logprob
    return torch.expm1(-log_ratio) + log_ratio


def shaped_reward(reward: Tensor, logprob: Tensor, ref_logprob: Tensor, beta: float) -> Tensor:
    """R_beta(x, y) = r(x, y) - beta * sum_t [log pi(y_t|.) - log ref(y_t|.)], detached.

    The sequence-level k1 in the reward is what gives the gradient of -beta * KL(pi||ref) (RLOO, Ahmadian et al.
    2024, eq. 3). It is added before any baseline is subtracted.

    Args:
        reward: float [N].
        logprob: float [N], summed over the completion.
        ref_logprob: float [N].
        beta: weight of the KL, >= 0.

    Returns:
        float [N].
    """
    return (reward - beta * k1(logprob, ref_logprob)).detach()


def full_kl(policy_logits: Tensor, ref_logits: Tensor, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary KL(pi||ref) at every position of sampled prefixes, summed over the completion.

    Conditional on the prefix it is exact, so it is >= 0 and has far less variance than k1; this is what is
    reported.

    Args:
        policy_logits: [N, L, V].
        ref_logits: [N, L, V].
        sequences: N rows of L tokens, sampled from the policy.
        temperature: the sampling temperature.

    Returns:
        float32 [N], nats per completion.
    """
    mask = sequences.completion_mask[:, 1:]
    log_q = torch.log_softmax(policy_logits[:, :-1][mask].float() / temperature, dim=-1)
    log_p = torch.log_softmax(ref_logits[:, :-1][mask].float() / temperature, dim=-1)
    # clamp: equal distributions may give -1e-9 by rounding, and a KL is never negative
    per_token = (log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)
    grid = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_scatter(mask, per_token)
    return masked_sum(grid, mask)
