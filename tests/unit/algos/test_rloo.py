import pytest
import torch

from rlhf_cli.algos.base import BaselineState
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.ops.logprobs import TokenLogprobs
from rlhf_cli.types import Experience, PolicyBatch, Sequences

START = BaselineState()


def _advantages(algorithm, shaped, state=START):
    """The reward alone is another number: what is learned from is the shaped one."""
    return algorithm.advantages(Experience(shaped + 9.0, shaped), state)


def _gradient(algorithm, reward, logprob):
    """Gradient of the loss with respect to the log-probs, and the loss."""
    logprob = logprob.clone().requires_grad_()
    rows = len(reward)
    masks = torch.ones(rows, 2, dtype=torch.bool)
    advantage = _advantages(algorithm, reward).advantage
    sequences = Sequences(torch.zeros(rows, 2, dtype=torch.long), masks, masks)
    batch = PolicyBatch(sequences, logprob.detach(), torch.zeros(rows), advantage)
    column = logprob[:, None]
    tokens = TokenLogprobs(column, torch.zeros_like(column), masks[:, 1:])
    loss = algorithm.loss(tokens, None, batch, float(rows)).loss
    loss.backward()
    return logprob.grad, loss.detach()


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(12, generator=generator), -5 * torch.rand(12, generator=generator)


def test_two_samples_are_the_reward_weighted_contrastive_loss(rows):
    reward, logprob = rows
    gradient, loss = _gradient(Rloo(k=2), reward, logprob)
    contrastive_logprob = logprob.clone().requires_grad_()
    pair_losses = []
    for first in range(0, 12, 2):
        better, worse = (first, first + 1) if reward[first] > reward[first + 1] else (first + 1, first)
        gap = reward[better] - reward[worse]
        pair_losses.append(gap / 2 * (-contrastive_logprob[better] + contrastive_logprob[worse]))
    contrastive = torch.stack(pair_losses).mean()
    contrastive.backward()
    assert loss.item() == pytest.approx(contrastive.item(), rel=1e-5)
    assert torch.allclose(gradient, contrastive_logprob.grad, atol=1e-7)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("num_epochs", [1, 2])
def test_shifting_all_rewards_leaves_the_gradient_unchanged(rows, k, num_epochs):
    reward, logprob = rows
    algorithm = Rloo(k=k, num_epochs=num_epochs)
    gradient, _ = _gradient(algorithm, reward, logprob)
    shifted, _ = _gradient(algorithm, reward + 3.0, logprob)
    assert torch.allclose(gradient, shifted, atol=1e-6)
    # each prompt by another constant
    each, _ = _gradient(algorithm, reward + torch.arange(12 // k).repeat_interleave(k), logprob)
    assert torch.allclose(gradient, each, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3.3])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_all_equal_rewards_give_no_gradient_at_all(rows, k, value):
    _, logprob = rows
    reward = torch.full((12,), value)
    assert _advantages(Rloo(k=k), reward).advantage.tolist() == [0.0] * 12
    gradient, loss = _gradient(Rloo(k=k), reward, logprob)
    assert gradient.tolist() == [0.0] * 12
    assert loss.item() == 0.0


def test_rewards_scale_the_gradient_and_are_not_whitened(rows):
    reward, logprob = rows
    gradient, _ = _gradient(Rloo(k=4), reward, logprob)
    doubled, _ = _gradient(Rloo(k=4), 2 * reward, logprob)
    assert torch.allclose(doubled, 2 * gradient, atol=1e-6)


def test_it_keeps_no_state_and_reports_the_mean_baseline():
    state = BaselineState(0.5, 7)
    result = _advantages(Rloo(k=2), torch.tensor([1.0, 3.0, 0.0, 4.0]), state)
    assert result.advantage.tolist() == [-2.0, 2.0, -4.0, 4.0]
    assert result.state is state
    # what was subtracted: 3, 1, 4, 0
    assert result.metrics["baseline"] == pytest.approx(2.0)
