"""Where the KL acts and how it is estimated: which gradient each of the six combinations really has, by enumeration.

With q the policy, p the reference and l = log(q/p) of a completion. In the reward an estimate f(l) weighs the score,
E_q[f(l) grad log q]; in the loss it is differentiated itself, E_q[f'(l) grad log q].
"""

from __future__ import annotations

import itertools

import pytest
import torch
from fixtures_enumeration import (
    BETA,
    COMPLETIONS,
    NUM_PROMPTS,
    POLICY,
    REFERENCE,
    assert_equal,
    expected_gradient,
    kl_gradient,
    log_distribution,
    random_table,
    reward_gradient,
    token_logprobs,
    true_gradient,
)
from torch import Tensor

from rlhf_cli.algos.base import OnlineAlgorithm
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.ops.kl import kl_loss
from rlhf_cli.ops.policy_losses import sequence_ratio
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings

ALGORITHMS = [Reinforce(beta=BETA), Reinforce(beta=BETA, k=2), Rloo(beta=BETA, k=2)]
CELLS = list(itertools.product(("reward", "loss"), ("k1", "k2", "k3")))
RIGHT = {("reward", "k1"), ("loss", "k2")}


def _half_square_as_a_reward() -> Tensor:
    """E_q[l^2/2 * grad log q], by the policy's own probabilities: what reward+k2 puts in the KL's place."""
    table = POLICY.clone().requires_grad_()
    logprob = log_distribution(table)
    paid = (logprob.detach() - log_distribution(REFERENCE)).square() / 2
    return torch.autograd.grad((logprob.exp() * paid).sum() / NUM_PROMPTS, table)[0]


def _instead_of_the_kl(placement: str, estimator: str) -> Tensor:
    """What stands where the gradient of KL(pi||ref) should: the closed form of a combination."""
    reverse, forward = kl_gradient("reverse"), kl_gradient("forward")
    return {
        ("reward", "k1"): reverse,
        ("reward", "k2"): _half_square_as_a_reward(),
        ("reward", "k3"): reverse - forward,
        ("loss", "k1"): torch.zeros_like(reverse),
        ("loss", "k2"): reverse,
        ("loss", "k3"): forward,
    }[placement, estimator]


def _settings(placement: str, estimator: str) -> KlSettings:
    return KlSettings(KlPlacement(placement), KlEstimator(estimator))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=["reinforce", "reinforce of two", "rloo of two"])
@pytest.mark.parametrize("cell", CELLS, ids="+".join)
def test_a_combination_has_the_gradient_that_it_is_said_to_have(cell: tuple[str, str], algorithm: OnlineAlgorithm):
    found = expected_gradient(algorithm, kl=_settings(*cell))
    assert_equal(found, reward_gradient() - BETA * _instead_of_the_kl(*cell))
    error = float((found - true_gradient(BETA)).abs().max())
    assert error < 1e-12 if cell in RIGHT else error > 0.01, error


def test_those_that_are_wrong_are_those_that_warn():
    assert {cell for cell in CELLS if _settings(*cell).problem() is None} == RIGHT
    for cell in set(CELLS) - RIGHT:
        problem = _settings(*cell).problem()
        assert problem is not None and problem.startswith(f"kl.placement={cell[0]} kl.estimator={cell[1]}: ")


@pytest.mark.parametrize(("cell", "order"), [(("reward", "k2"), 2), (("reward", "k3"), 2), (("loss", "k2"), 1)])
def test_near_the_reference_the_wrong_ones_hold_nothing(cell: tuple[str, str], order: int):
    """The right gradient is of the distance's first order; those that "vanish" and "cancel" are of its second."""
    direction = random_table(4, *POLICY.shape)
    sizes = []
    for distance in (1e-3, 1e-4):
        ref = token_logprobs(POLICY + distance * direction)
        with_kl = expected_gradient(Reinforce(beta=BETA), kl=_settings(*cell), ref=ref)
        sizes.append(float((with_kl - reward_gradient()).norm()))
    assert sizes[0] / sizes[1] == pytest.approx(10**order, rel=0.02)


def _expected_gradient_of_old_samples(estimator: str, weighted: bool) -> Tensor:
    """Of the KL's loss alone, over all completions, each as likely as an earlier policy drew it."""
    old = log_distribution(POLICY + 0.9 * random_table(5, *POLICY.shape))
    table = POLICY.clone().requires_grad_()
    logprob, ref = log_distribution(table), log_distribution(REFERENCE)
    total = torch.zeros((), dtype=torch.float64)
    for prompt, y in itertools.product(range(NUM_PROMPTS), range(len(COMPLETIONS))):
        row = (prompt, slice(y, y + 1))
        ratio = sequence_ratio(logprob[row], old[row]) if weighted else None
        loss = kl_loss(estimator, logprob[row], ref[row], BETA, 1.0, ratio)
        total = total + old[prompt, y].exp() / NUM_PROMPTS * loss
    return torch.autograd.grad(total, table)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_samples_of_an_earlier_policy_count_by_their_ratio(estimator: str):
    """With the ratio, which is not differentiated, the loss has the gradient that it has of fresh samples."""
    expected = BETA * _instead_of_the_kl("loss", estimator)
    assert_equal(_expected_gradient_of_old_samples(estimator, weighted=True), expected)
    assert float((_expected_gradient_of_old_samples(estimator, weighted=False) - expected).abs().max()) > 0.01
