from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fixtures_enumeration import START
from torch import Tensor

from rlhf_cli.algos.base import ActorCriticAlgorithm, Advantages
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.ops.logprobs import TokenLogprobs
from rlhf_cli.types import Experience, LossOutput, PolicyBatch, Sequences

# A completion of three tokens after a padded column, and one of a single token; what is masked out is 9 or 99
MASK = torch.tensor([[False, True, True, True], [True, False, False, False]])
PAID = torch.tensor([[99.0, -0.5, 0.25, 4.0], [2.0, 99.0, 99.0, 99.0]])
VALUE = torch.tensor([[99.0, 1.0, 2.0, 3.0], [-1.0, 99.0, 99.0, 99.0]])
EXPERIENCE = Experience(torch.zeros(2), torch.zeros(2), MASK, PAID, VALUE)
RETURNS = torch.tensor([[0.0, 3.75, 4.25, 4.0], [2.0, 0.0, 0.0, 0.0]])
BARE = Ppo(lam=1.0, clip=None, whiten=False, num_epochs=1, value_clip=None)


def advantages(algorithm: ActorCriticAlgorithm) -> Advantages:
    return algorithm.advantages(EXPERIENCE, START)


@pytest.mark.parametrize("algorithm", [VanillaPg(), BARE], ids=["vanilla_pg", "ppo"])
def test_the_return_to_go_minus_the_value_by_hand(algorithm: ActorCriticAlgorithm):
    result = advantages(algorithm)
    assert result.advantage.tolist() == [[0.0, 2.75, 2.25, 1.0], [3.0, 0.0, 0.0, 0.0]]
    assert result.value_target is not None and result.value_target.tolist() == RETURNS.tolist()
    assert result.metrics["value/mean"] == pytest.approx((1 + 2 + 3 - 1) / 4)
    errors, returns = result.advantage[MASK], RETURNS[MASK]
    explained = 1 - float(errors.var(unbiased=False) / returns.var(unbiased=False))
    assert result.metrics["value/explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert result.keep is None and result.state is START


def test_lambda_and_gamma_by_hand():
    result = advantages(replace(BARE, lam=0.5, gamma=0.5))
    # TD errors: -0.5 + 1 - 1, 0.25 + 1.5 - 2, 4 - 3, and 2 + 1; each later one counts a quarter
    assert result.advantage.tolist() == [[0.0, -0.5, 0.0, 1.0], [3.0, 0.0, 0.0, 0.0]]
    assert result.value_target is not None
    assert result.value_target.tolist() == [[0.0, 0.5, 2.0, 4.0], [2.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("algorithm", [VanillaPg(), BARE], ids=["vanilla_pg", "ppo"])
def test_whitening_moves_advantages_and_not_what_the_critic_learns(algorithm: ActorCriticAlgorithm):
    result = advantages(replace(algorithm, whiten=True))
    entries = advantages(algorithm).advantage[MASK]
    white = (entries - entries.mean()) / entries.std(unbiased=False)
    assert torch.allclose(result.advantage[MASK], white, atol=1e-5)
    assert (result.advantage[~MASK] == 0).all()
    assert result.value_target is not None and result.value_target.tolist() == RETURNS.tolist()


def loss(
    algorithm: ActorCriticAlgorithm, logprob: Tensor, value: Tensor, old: Tensor, advantage: Tensor, n: float
) -> LossOutput:
    """Of the rows above; values were VALUE when they were sampled."""
    counts = torch.cat([torch.zeros(2, 1, dtype=torch.bool), MASK], dim=1)
    rows = Sequences(counts.long(), counts, counts)
    batch = PolicyBatch(rows, torch.zeros(2), torch.zeros(2), advantage, old, VALUE, RETURNS)
    return algorithm.loss(TokenLogprobs(logprob, torch.zeros(2, 4), MASK), value, batch, n)


def test_losses_by_hand():
    ratio = torch.tensor([[9.0, 1.5, 0.5, 1.0], [3.0, 9.0, 9.0, 9.0]])
    advantage = torch.tensor([[9.0, 1.0, -1.0, 2.0], [-1.0, 9.0, 9.0, 9.0]])
    logprob = ratio.log().requires_grad_()
    value = (VALUE + torch.tensor([[0.0, 1.0, 0.1, 0.0], [-1.0, 0.0, 0.0, 0.0]])).requires_grad_()
    # per token (V - G)^2 / 2: V is 2, 2.1, 3 and -2, G as above
    critic = (1.75**2 + 2.15**2 + 1.0 + 16.0) / 2
    # clipped to within 0.2 of the old ones, 1.2 is farther from 3.75 than 2 is; the others are worse as they are
    clipped_critic = (2.55**2 + 2.15**2 + 1.0 + 16.0) / 2
    output = loss(replace(BARE, value_coef=0.5), logprob, value, torch.zeros(2, 4), advantage, 8.0)
    assert output.loss.item() == pytest.approx(-(1.5 - 0.5 + 2.0 - 3.0) / 8 + 0.5 * critic / 8)
    clipped = Ppo(clip=0.2, value_clip=0.2, value_coef=0.5)
    output = loss(clipped, logprob, value, torch.zeros(2, 4), advantage, 8.0)
    # pessimistic: 1.2 * 1, 0.8 * -1, 1 * 2, 3 * -1
    assert output.loss.item() == pytest.approx(-(1.2 - 0.8 + 2.0 - 3.0) / 8 + 0.5 * clipped_critic / 8)
    found = {name: figure.item() for name, figure in output.metrics.items()}
    assert found == pytest.approx(
        {"value/loss": clipped_critic / 8, "ratio/mean": 6 / 8, "ratio/clip_frac": 2 / 8}
    )
    assert output.maxima["ratio/max"].item() == pytest.approx(3.0)
    assert not any(figure.requires_grad for figure in (*output.metrics.values(), *output.maxima.values()))
    output.loss.backward()
    assert logprob.grad is not None and value.grad is not None
    assert logprob.grad[MASK].tolist() == pytest.approx([0.0, 0.0, -2 / 8, 3 / 8])
    assert (logprob.grad[~MASK] == 0).all() and (value.grad[~MASK] == 0).all()
    vanilla = loss(VanillaPg(value_coef=0.5), logprob, value, torch.zeros(2, 4), advantage, 8.0)
    by_hand = -float((advantage * ratio.log())[MASK].sum()) / 8 + 0.5 * critic / 8
    assert vanilla.loss.item() == pytest.approx(by_hand)
    assert vanilla.metrics["value/loss"].item() == pytest.approx(critic / 8)


def test_ppo_without_its_parts_has_vanilla_pgs_gradient_on_a_rollouts_first_step():
    generator = torch.Generator().manual_seed(0)
    start = -torch.rand(2, 4, generator=generator)
    gradients = []
    for algorithm in (VanillaPg(), BARE):
        logprob, value = start.clone().requires_grad_(), VALUE.clone().requires_grad_()
        loss(algorithm, logprob, value, start, advantages(algorithm).advantage, 4.0).loss.backward()
        assert logprob.grad is not None and value.grad is not None
        gradients.append((logprob.grad, value.grad))
    assert torch.equal(gradients[0][0], gradients[1][0]) and torch.equal(gradients[0][1], gradients[1][1])
    assert gradients[0][0].abs().max() > 0.1
