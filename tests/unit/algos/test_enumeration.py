"""The expected gradient of each algorithm, summed over every batch that can be drawn, against the true objective.

A policy over three tokens and an EOS, two prompts and at most two tokens: 13 completions a prompt. The policy is a
table of logits in float64, so nothing but the algorithm is in the comparison.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlhf_cli.algos.base import BaselineState, OnlineAlgorithm
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.data.tokenise import collate
from rlhf_cli.ops.kl import shaped_reward
from rlhf_cli.ops.logprobs import completion_logprobs
from rlhf_cli.types import PolicyBatch, Sequences

NUM_PROMPTS, VOCAB, EOS, BETA = 2, 4, 3, 0.3
TOKENS = range(EOS)
PREFIXES: list[tuple[int, ...]] = [(), *((token,) for token in TOKENS)]
COMPLETIONS: list[tuple[int, ...]] = [(EOS,), *itertools.product(TOKENS, range(VOCAB))]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POLICY = _random(0, NUM_PROMPTS, len(PREFIXES), VOCAB)
REFERENCE = POLICY + 0.7 * _random(1, NUM_PROMPTS, len(PREFIXES), VOCAB)
START = BaselineState()
REWARD = 1.5 + _random(2, NUM_PROMPTS, len(COMPLETIONS))  # a mean that is not 0, so that baselines matter


def log_distribution(table: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(y|x) of every completion of every prompt, [2, 13]."""
    log_probability = torch.log_softmax(table / temperature, dim=-1)
    columns = []
    for completion in COMPLETIONS:
        steps = [log_probability[:, PREFIXES.index(completion[:t]), token] for t, token in enumerate(completion)]
        columns.append(torch.stack(steps).sum(0))
    return torch.stack(columns, dim=1)


def _tree_kl(policy: Tensor, reference: Tensor, prefix: tuple[int, ...] = ()) -> Tensor:
    """KL of what follows a prefix: that of the next token, and the KLs behind each, as likely as the token is."""
    if len(prefix) == 2 or prefix[-1:] == (EOS,):
        return torch.zeros((), dtype=torch.float64)
    log_q = torch.log_softmax(policy[PREFIXES.index(prefix)], -1)
    log_p = torch.log_softmax(reference[PREFIXES.index(prefix)], -1)
    behind = torch.stack([_tree_kl(policy, reference, (*prefix, token)) for token in range(VOCAB)])
    return (log_q.exp() * (log_q - log_p + behind)).sum()


def true_gradient(beta: float, reward: Tensor = REWARD, temperature: float = 1.0) -> Tensor:
    """Gradient of the mean over prompts of E[r] - beta * KL(pi||ref), without a log-prob of a completion in it."""
    table = POLICY.clone().requires_grad_()
    objective = (log_distribution(table, temperature).exp() * reward).sum() / NUM_PROMPTS
    for prompt in range(NUM_PROMPTS):
        kl = _tree_kl(table[prompt] / temperature, REFERENCE[prompt] / temperature)
        objective = objective - beta * kl / NUM_PROMPTS
    return torch.autograd.grad(objective, table)[0]


def _no_sequences(rows: int) -> Sequences:
    empty = torch.zeros(rows, 1, dtype=torch.long)
    return Sequences(empty, empty.bool(), empty.bool())


def expected_gradient(
    algorithm: OnlineAlgorithm,
    num_prompts: int = 1,
    state: BaselineState = START,
    reward: Tensor = REWARD,
    table: Tensor | None = None,
    logprobs: Tensor | None = None,
    ref: Tensor | None = None,
) -> Tensor:
    """Minus the expected gradient of the loss, over all draws of prompts and of k completions for each."""
    table = POLICY.clone().requires_grad_() if table is None else table
    logprobs = log_distribution(table) if logprobs is None else logprobs
    ref = log_distribution(REFERENCE) if ref is None else ref
    num_rows = num_prompts * algorithm.samples_per_prompt
    sequences = _no_sequences(num_rows)
    total = torch.zeros((), dtype=logprobs.dtype)
    for prompts in itertools.product(range(NUM_PROMPTS), repeat=num_prompts):
        x = [prompt for prompt in prompts for _ in range(algorithm.samples_per_prompt)]
        for y in itertools.product(range(len(COMPLETIONS)), repeat=num_rows):
            logprob = logprobs[x, y]
            old = logprob.detach()
            shaped = shaped_reward(reward[x, y].to(old.dtype), logprob, ref[x, y], algorithm.beta)
            batch = PolicyBatch(sequences, old, ref[x, y], algorithm.advantages(shaped, state).advantage)
            probability = old.sum().exp() / NUM_PROMPTS**num_prompts
            total = total + probability * algorithm.loss(logprob, batch, float(num_rows)).loss
    return -torch.autograd.grad(total, table)[0]


@pytest.fixture(scope="module")
def target() -> Tensor:
    gradient = true_gradient(BETA)
    assert gradient.abs().max() > 0.05
    # reward and KL both matter, or a lost term would not be seen
    assert (gradient - true_gradient(0.0)).abs().max() > 0.02
    return gradient


def _assert_equal(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=0, atol=1e-12), (found - expected).abs().max()


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_reinforce_climbs_the_objective(target, num_prompts, on_policy):
    algorithm = Reinforce(beta=BETA, on_policy=on_policy, clip=None if on_policy else 0.2)
    _assert_equal(expected_gradient(algorithm, num_prompts), target)


@pytest.mark.parametrize("baseline", ["ema", "mean"])
@pytest.mark.parametrize("value", [-3.0, 0.0, 1.7])
def test_a_constant_baseline_does_not_move_it(target, baseline, value):
    state = BaselineState(value, num_updates=3)
    _assert_equal(expected_gradient(Reinforce(beta=BETA, baseline=baseline), 1, state), target)


def test_two_samples_a_prompt_are_two_samples(target):
    _assert_equal(expected_gradient(Reinforce(beta=BETA, samples_per_prompt=2)), target)


@pytest.mark.parametrize("on_policy", [True, False])
def test_rloo_with_two_samples_climbs_the_objective(target, on_policy):
    _assert_equal(expected_gradient(Rloo(2, beta=BETA, on_policy=on_policy)), target)


def test_rloo_with_three_samples_climbs_the_objective(target):
    _assert_equal(expected_gradient(Rloo(3, beta=BETA)), target)


def test_shifting_every_reward_moves_neither_expectation(target):
    _assert_equal(expected_gradient(Rloo(2, beta=BETA), reward=REWARD + 10), target)
    _assert_equal(expected_gradient(Reinforce(beta=BETA), reward=REWARD + 10), target)


@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("start", [START, BaselineState(0.8, 4)])
def test_updating_the_ema_first_scales_the_gradient(target, num_prompts, start):
    # b contains (1 - alpha) / N of each reward it is subtracted from
    alpha = 0.75
    algorithm = Reinforce(beta=BETA, baseline="ema", alpha=alpha, baseline_update="before")
    factor = 1 - (1 - alpha) / num_prompts
    _assert_equal(expected_gradient(algorithm, num_prompts, start), factor * target)


@pytest.mark.parametrize("num_prompts", [1, 2])
def test_bias_correction_enlarges_the_share_of_the_own_reward(target, num_prompts):
    alpha, step = 0.75, 3
    algorithm = Reinforce(beta=BETA, alpha=alpha, bias_correction=True, baseline_update="before")
    factor = 1 - (1 - alpha) / (1 - alpha**step) / num_prompts
    _assert_equal(expected_gradient(algorithm, num_prompts, BaselineState(0.8, step - 1)), factor * target)


@pytest.mark.parametrize(("num_prompts", "step"), [(1, 1), (1, 2), (1, 5), (2, 1), (2, 3)])
def test_updating_the_mean_first_scales_the_gradient(target, num_prompts, step):
    # at step 1 with one row the baseline IS the reward, and nothing is left
    algorithm = Reinforce(beta=BETA, baseline="mean", baseline_update="before")
    start = BaselineState(0.8 if step > 1 else 0.0, num_updates=step - 1)
    factor = 1 - 1 / (step * num_prompts)
    _assert_equal(expected_gradient(algorithm, num_prompts, start), factor * target)


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
    logprobs = tokens.sequence_logprob().view(NUM_PROMPTS, len(COMPLETIONS))
    assert torch.allclose(logprobs.exp().sum(1), torch.ones(NUM_PROMPTS), atol=1e-5)
    expected = true_gradient(BETA, temperature=temperature)
    ref = log_distribution(REFERENCE, temperature).float()
    found = expected_gradient(Rloo(2, beta=BETA), table=table, logprobs=logprobs, ref=ref)
    assert torch.allclose(found.double(), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.05
