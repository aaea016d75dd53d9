"""Where tokens are the actions: the expected gradients of vanilla_pg and ppo against the true objective.

The loss of a step is divided by the number of its tokens, which is random: an expectation of such ratios is not the
gradient of any expected reward. What is unbiased is the sum, so the batches here are divided by a fixed number, that of
their sequences; the last test shows what the real one does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixtures_enumeration import (
    BETA,
    COMPLETIONS,
    MASK,
    NUM_PROMPTS,
    POLICY,
    PREFIXES,
    REFERENCE,
    REWARD,
    assert_equal,
    at_tokens,
    exact_values,
    expected_gradient,
    log_distribution,
    random_table,
    true_gradient,
)
from torch import Tensor

from rlhf_cli.algos.base import ActorCriticAlgorithm
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings

ANY_VALUES = at_tokens(3 * random_table(5, NUM_PROMPTS, len(PREFIXES)))
NO_VALUES, EXACT_VALUES = torch.zeros_like(ANY_VALUES), at_tokens(exact_values(BETA))
VANILLA = VanillaPg(beta=BETA)
# PPO with nothing in it that vanilla PG does not have, on the rollout's first step
BARE = Ppo(beta=BETA, lam=1.0, clip=None, whiten=False, num_epochs=1, value_clip=None)


@pytest.fixture(scope="module")
def target() -> Tensor:
    return true_gradient(BETA)


@pytest.mark.parametrize("algorithm", [VANILLA, BARE, replace(BARE, clip=0.2)], ids=["vanilla_pg", "ppo", "clip"])
@pytest.mark.parametrize("values", [NO_VALUES, ANY_VALUES, EXACT_VALUES], ids=["none", "any", "exact"])
def test_any_function_of_the_state_is_a_baseline(target: Tensor, algorithm: ActorCriticAlgorithm, values: Tensor):
    assert_equal(expected_gradient(algorithm, values=values), target)


@pytest.mark.parametrize(("num_prompts", "k"), [(2, 1), (1, 2)])
def test_batches_of_two(target: Tensor, num_prompts: int, k: int):
    assert_equal(expected_gradient(replace(VANILLA, k=k), num_prompts, values=ANY_VALUES), target)


def test_a_value_of_the_state_after_the_token_is_no_baseline(target: Tensor):
    """What a shift by one column would do: that state depends on the token."""
    late = torch.nn.functional.pad(ANY_VALUES[:, :, 1:], (0, 1))
    assert (expected_gradient(VANILLA, values=late) - target).abs().max() > 0.1


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_with_the_true_values_every_lambda_is_unbiased(target: Tensor, lam: float):
    algorithm = replace(BARE, lam=lam)
    assert_equal(expected_gradient(algorithm, values=EXACT_VALUES), target)
    # with others it is not: what lambda < 1 costs
    assert (expected_gradient(algorithm, values=ANY_VALUES) - target).abs().max() > 0.02


def test_the_exact_values_are_the_mean_return():
    """By completions instead of by steps."""
    logprob, ref = log_distribution(POLICY), log_distribution(REFERENCE)
    objective = (logprob.exp() * (REWARD - BETA * (logprob - ref))).sum(1)
    assert torch.allclose(exact_values(BETA)[:, 0], objective, rtol=0, atol=1e-12)


def test_the_kl_as_a_loss(target: Tensor):
    right = KlSettings(KlPlacement.loss, KlEstimator.k2)
    for algorithm in (VANILLA, BARE):
        assert_equal(expected_gradient(algorithm, kl=right, values=ANY_VALUES), target)


def test_divided_by_its_own_tokens_a_batch_of_one_weighs_by_length(target: Tensor):
    """E[1/T * R * grad log pi] of a single completion of T tokens: the objective of R/T, not of R.

    With more sequences a batch the number of tokens is nearer to its mean, and the bias is less.
    """
    lengths = MASK.sum(-1).double()
    table = POLICY.clone().requires_grad_()
    logprob = log_distribution(table)
    paid = REWARD / lengths
    of_ratio = torch.autograd.grad((logprob.exp() * paid).sum() / NUM_PROMPTS, table)[0]
    free = replace(VANILLA, beta=0.0)
    assert_equal(expected_gradient(free, values=NO_VALUES, normalised_by="tokens"), of_ratio)
    mean_length = float((logprob.exp().detach() * lengths).sum() / NUM_PROMPTS)
    assert {len(completion) for completion in COMPLETIONS} == {1, 2}
    errors = [
        float(
            (mean_length * expected_gradient(VANILLA, n, values=NO_VALUES, normalised_by="tokens") - target).norm()
        )
        for n in (1, 2)
    ]
    assert 0.01 < errors[1] < 0.6 * errors[0]
