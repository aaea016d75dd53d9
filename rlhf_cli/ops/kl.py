"""KL divergence between the policy q and the reference p: estimators, and the KL-shaped reward.

Estimators after Schulman, "Approximating KL Divergence" (2020), with l = log(q/p) SUMMED over a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_cli.ops.logprobs import on_grid
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


_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def estimated_kl(estimator: str, logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """The estimator of this name, "k1", "k2" or "k3", of N completions; shapes as in `k1`."""
    return _ESTIMATORS[estimator](logprob, ref_logprob)


def kl_loss(
    estimator: str,
    logprob: Tensor,
    ref_logprob: Tensor,
    beta: float,
    normaliser: float,
    ratio: Tensor | None = None,
) -> Tensor:
    """beta/n * sum_i rho_i * k_i of the completions' estimates k_i, with gradient: the KL as a term of the loss.

    Its expected gradient is that of beta * KL(pi||ref) for k2, 0 for k1 (the score has mean 0), and that of
    beta * KL(ref||pi) for k3.

    Args:
        estimator: "k1", "k2" or "k3".
        logprob: float [N], with gradient.
        ref_logprob: float [N].
        beta: weight, >= 0.
        normaliser: n, as the loss it is added to is divided.
        ratio: rho, float [N], pi/pi_old of samples that an earlier policy drew, which is not differentiated; None = 1,
            where the samples are the policy's own.

    Returns:
        Scalar.
    """
    estimate = estimated_kl(estimator, logprob, ref_logprob.detach())
    if ratio is not None:
        estimate = ratio.detach() * estimate
    return beta * estimate.sum() / normaliser


def shaped_reward(
    reward: Tensor, logprob: Tensor, ref_logprob: Tensor, beta: float, estimator: str = "k1"
) -> Tensor:
    """R_beta(x, y) = r(x, y) - beta * sum_t [log pi(y_t|.) - log ref(y_t|.)], detached.

    The sequence-level k1 in the reward is what gives the gradient of -beta * KL(pi||ref) (RLOO, Ahmadian et al.
    2024, eq. 3). It is added before any baseline is subtracted.

    Args:
        reward: float [N].
        logprob: float [N], summed over the completion.
        ref_logprob: float [N].
        beta: weight of the KL, >= 0.
        estimator: "k1", or one of the others, whose gradient is then another one (see `KlSettings.problem`).

    Returns:
        float [N].
    """
    return (reward - beta * estimated_kl(estimator, logprob, ref_logprob)).detach()


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
    per_token = token_kl(policy_logits[:, :-1][mask], ref_logits[:, :-1][mask], temperature)
    return masked_sum(on_grid(per_token, mask), mask)


def token_kl(policy_logits: Tensor, ref_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Full-vocabulary KL(pi||ref) of C distributions, float32 [C], nats, of logits [C, V]."""
    log_q = torch.log_softmax(policy_logits.float() / temperature, dim=-1)
    log_p = torch.log_softmax(ref_logits.float() / temperature, dim=-1)
    # clamp: equal distributions may give -1e-9 by rounding, and a KL is never negative
    return (log_q.exp() * (log_q - log_p)).sum(-1).clamp(min=0)
