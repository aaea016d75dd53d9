"""The expected gradient of each algorithm, summed over every batch that can be drawn, against the true objective."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from fixtures_enumeration import (
    BETA,
    COMPLETIONS,
    EOS,
    MASK,
    NUM_PROMPTS,
    POLICY,
    PREFIXES,
    REFERENCE,
    REWARD,
    START,
    VOCAB,
    assert_equal,
    expected_gradient,
    token_logprobs,
    true_gradient,
)
from torch import Tensor

from rlhf_cli.algos.base import BaselineState
from rlhf_cli.algos.reinforce import BaselineForm, BaselineUpdate, Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.data.tokenise import collate
from rlhf_cli.ops.logprobs import completion_logprobs
from rlhf_cli.types import Sequences

BEFORE = BaselineUpdate.before


@pytest.fixture(scope="module")
def target() -> Tensor:
    gradient = true_gradient(BETA)
    assert gradient.abs().max() > 0.05
    # reward and KL both matter, or a lost term would not be seen
    assert (gradient - true_gradient(0.0)).abs().max() > 0.02
    return gradient


@pytest.mark.parametrize("num_epochs", [1, 2])
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_reinforce_climbs_the_objective(target, num_prompts, num_epochs):
    algorithm = Reinforce(beta=BETA, num_epochs=num_epochs, clip=None if num_epochs == 1 else 0.2)
    assert_equal(expected_gradient(algorithm, num_prompts), target)


@pytest.mark.parametrize("baseline", list(BaselineForm))
@pytest.mark.parametrize("value", [-3.0, 0.0, 1.7])
def test_a_constant_baseline_does_not_move_it(target, baseline, value):
    state = BaselineState(value, num_updates=3)
    assert_equal(expected_gradient(Reinforce(beta=BETA, baseline=baseline), 1, state), target)


def test_two_samples_a_prompt_are_two_samples(target):
    assert_equal(expected_gradient(Reinforce(beta=BETA, k=2)), target)


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_rloo_with_two_samples_climbs_the_objective(target, num_epochs):
    assert_equal(expected_gradient(Rloo(k=2, beta=BETA, num_epochs=num_epochs)), target)


def test_rloo_with_three_samples_climbs_the_objective(target):
    assert_equal(expected_gradient(Rloo(k=3, beta=BETA)), target)


def test_shifting_every_reward_moves_neither_expectation(target):
    assert_equal(expected_gradient(Rloo(k=2, beta=BETA), reward=REWARD + 10), target)
    assert_equal(expected_gradient(Reinforce(beta=BETA), reward=REWARD + 10), target)


@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("start", [START, BaselineState(0.8, 4)])
def test_updating_the_ema_first_scales_the_gradient(target, num_prompts, start):
    # b contains (1 - alpha) / N of each reward it is subtracted from
    alpha = 0.75
    algorithm = Reinforce(beta=BETA, baseline=BaselineForm.ema, alpha=alpha, baseline_update=BEFORE)
    factor = 1 - (1 - alpha) / num_prompts
    assert_equal(expected_gradient(algorithm, num_prompts, start), factor * target)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_bias_correction_enlarges_the_share_of_the_own_reward(target, num_prompts):
    alpha, step = 0.75, 3
    algorithm = Reinforce(beta=BETA, alpha=alpha, bias_correction=True, baseline_update=BEFORE)
    factor = 1 - (1 - alpha) / (1 - alpha**step) / num_prompts
    assert_equal(expected_gradient(algorithm, num_prompts, BaselineState(0.8, step - 1)), factor * target)


@pytest.mark.parametrize(("num_prompts", "step"), [(1, 1), (1, 2), (1, 5), (2, 1), (2, 3)])
def test_updating_the_mean_first_scales_the_gradient(target, num_prompts, step):
    # at step 1 with one row the baseline IS the reward, and nothing is left
    algorithm = Reinforce(beta=BETA, baseline=BaselineForm.mean, baseline_update=BEFORE)
    start = BaselineState(0.8 if step > 1 else 0.0, num_updates=step - 1)
    factor = 1 - 1 / (step * num_prompts)
    assert_equal(expected_gradient(algorithm, num_prompts, start), factor * target)


@dataclass(frozen=True)
class _Rows:
    """All 26 prompt + completion rows as the forward pass sees them; pad is the EOS."""

    sequences: Sequences

    @classmethod
    def build(cls) -> _Rows:
        pairs = [([0], list(completion)) for _ in range(NUM_PROMPTS) for completion in COMPLETIONS]
        return cls(collate(pairs, pad_id=EOS))

    def logits(self, table: Tensor) -> Tensor:
        zeros = torch.zeros(VOCAB)
        rows = []
        for prompt, completion in itertools.product(range(NUM_PROMPTS), COMPLETIONS):
            columns = [table[prompt, PREFIXES.index(completion[:t])] for t in range(len(completion))]
            rows.append(torch.stack([*columns, *[zeros] * (self.sequences.ids.shape[1] - len(columns))]))
        return torch.stack(rows)


def test_through_padded_rows_and_temperature_in_float32():
    # log-probs as in training: shifted logits, EOS counted, padding that looks like EOS not counted
    temperature, rows, table = 0.7, _Rows.build(), POLICY.float().requires_grad_()
    tokens = completion_logprobs(rows.logits(table), rows.sequences, temperature)
    logprobs = tokens.logprob.view(NUM_PROMPTS, len(COMPLETIONS), -1)
    assert torch.equal(tokens.mask.view(logprobs.shape), MASK.expand(NUM_PROMPTS, -1, -1))
    assert torch.allclose(logprobs.sum(-1).exp().sum(1), torch.ones(NUM_PROMPTS), atol=1e-5)
    expected = true_gradient(BETA, temperature=temperature)
    ref = token_logprobs(REFERENCE, temperature).float()
    found = expected_gradient(Rloo(k=2, beta=BETA), table=table, logprobs=logprobs, ref=ref)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.05
