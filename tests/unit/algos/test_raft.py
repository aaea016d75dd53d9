from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fixtures_enumeration import (
    BETA,
    MASK,
    NUM_PROMPTS,
    POLICY,
    REFERENCE,
    REWARD,
    START,
    assert_equal,
    expected_gradient,
    log_distribution,
)
from torch import Tensor

from rlhf_cli.algos.raft import Raft, RankBy
from rlhf_cli.ops.logprobs import TokenLogprobs
from rlhf_cli.types import Experience, PolicyBatch, Sequences

SHAPED, BY_REWARD = RankBy.shaped, RankBy.reward


def _best_of(k: int, ranked_by: Tensor) -> Tensor:
    """P(the best of k draws is y), [2, 13]: k draws at most as good as y, less those all worse than it."""
    probability = log_distribution(POLICY).exp()
    result = torch.empty_like(probability)
    for prompt in range(NUM_PROMPTS):
        for y, rank in enumerate(ranked_by[prompt]):
            at_most = probability[prompt, ranked_by[prompt] <= rank].sum()
            below = probability[prompt, ranked_by[prompt] < rank].sum()
            result[prompt, y] = at_most**k - below**k
    assert torch.allclose(result.sum(1), torch.ones(NUM_PROMPTS, dtype=torch.float64))
    return result


def _ranked(rank_by: RankBy) -> Tensor:
    if rank_by is BY_REWARD:
        return REWARD
    return REWARD - BETA * (log_distribution(POLICY) - log_distribution(REFERENCE))


@pytest.mark.parametrize("rank_by", list(RankBy))
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("normalised_by", ["sequences", "tokens"])
def test_it_learns_the_distribution_of_the_best_of_k(k: int, rank_by: RankBy, normalised_by: str):
    """With one prompt a batch, the tokens it is divided by are those of its one best completion."""
    table = POLICY.clone().requires_grad_()
    weights = _best_of(k, _ranked(rank_by))
    if normalised_by == "tokens":
        weights = weights / MASK.sum(-1)
    cross_entropy = -(weights * log_distribution(table)).sum() / NUM_PROMPTS
    expected = -torch.autograd.grad(cross_entropy, table)[0]
    assert expected.abs().max() > 0.02
    found = expected_gradient(Raft(k=k, beta=BETA, rank_by=rank_by), normalised_by=normalised_by)
    assert_equal(found, expected)
    other = _best_of(k, _ranked(SHAPED if rank_by is BY_REWARD else BY_REWARD))
    assert (other - _best_of(k, _ranked(rank_by))).abs().max() > 0.02, "the key makes a difference"


def test_it_keeps_the_first_best_of_each_prompt_by_hand():
    shaped = torch.tensor([1.0, 3.0, 3.0, 0.0, -2.0, -1.0, -5.0, -1.5])
    reward = torch.tensor([9.0, 3.0, 2.0, 0.0, -2.0, -1.0, 4.0, -1.5])
    result = Raft(k=4).advantages(Experience(reward, shaped), START)
    assert result.keep is not None
    assert result.keep.nonzero()[:, 0].tolist() == [1, 5]
    assert result.advantage[result.keep].tolist() == [1.0, 1.0]
    assert result.metrics == {"reward/best_mean": 1.0}
    assert result.state is START
    by_reward = Raft(k=4, rank_by=BY_REWARD).advantages(Experience(reward, shaped), START)
    assert by_reward.keep is not None
    assert by_reward.keep.nonzero()[:, 0].tolist() == [0, 6]
    assert by_reward.metrics == {"reward/best_mean": 6.5}


@pytest.mark.parametrize("change", [lambda r: 5 * r, lambda r: r + 100, torch.exp])
def test_only_the_order_of_rewards_matters(change: Callable[[Tensor], Tensor]):
    shaped = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.0, -0.2])
    algorithm = Raft(k=3)
    first, second = (algorithm.advantages(Experience(r, r), START) for r in (shaped, change(shaped)))
    assert first.keep is not None and second.keep is not None
    assert torch.equal(first.keep, second.keep) and torch.equal(first.advantage, second.advantage)


def test_loss_by_hand():
    mask = torch.tensor([[True, True, False], [False, True, True]])
    logprob = torch.tensor([[-1.0, -2.0, 7.0], [7.0, -0.5, -0.25]], requires_grad=True)
    counts = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], dim=1)
    sequences = Sequences(counts.long(), counts, counts)
    batch = PolicyBatch(sequences, torch.zeros(2), torch.zeros(2), torch.ones(2))
    output = Raft().loss(TokenLogprobs(logprob, torch.zeros_like(logprob), mask), None, batch, 4.0)
    assert output.loss.item() == pytest.approx(3.75 / 4)
    output.loss.backward()
    assert logprob.grad is not None
    assert logprob.grad.tolist() == [[-0.25, -0.25, 0.0], [0.0, -0.25, -0.25]]
