import pytest
import torch

from rlhf_cli.algos.base import BaselineState
from rlhf_cli.algos.reinforce import BaselineForm, BaselineUpdate, Reinforce
from rlhf_cli.ops.logprobs import TokenLogprobs
from rlhf_cli.types import Experience, PolicyBatch, Sequences

MEAN, BEFORE = BaselineForm.mean, BaselineUpdate.before


def _batch(old, advantage):
    rows = len(old)
    masks = torch.ones(rows, 2, dtype=torch.bool)
    return PolicyBatch(
        Sequences(torch.zeros(rows, 2, dtype=torch.long), masks, masks),
        torch.tensor(old),
        torch.zeros(rows),
        torch.tensor(advantage),
    )


def _experience(shaped):
    """The reward alone is another number: what is learned from is the shaped one."""
    return Experience(torch.tensor(shaped) + 9.0, torch.tensor(shaped))


def _loss(algorithm, logprob, batch, normaliser):
    """Of completions of one token with these log-probs."""
    column = logprob[:, None]
    tokens = TokenLogprobs(column, torch.zeros_like(column), torch.ones_like(column, dtype=torch.bool))
    return algorithm.loss(tokens, None, batch, normaliser)


def test_ema_baseline_over_steps_by_hand():
    algorithm, state, baselines = Reinforce(alpha=0.9), BaselineState(), []
    for reward in ([1.0, 3.0], [0.0, -2.0], [5.0, 5.0]):
        result = algorithm.advantages(_experience(reward), state)
        assert torch.allclose(result.advantage, torch.tensor(reward) - result.metrics["baseline"])
        baselines.append(result.metrics["baseline"])
        state = result.state
    # after each step: 0.1 * 2, 0.9 * 0.2 - 0.1, 0.9 * 0.08 + 0.5
    assert baselines == pytest.approx([0.0, 0.2, 0.08])
    assert state.value == pytest.approx(0.572) and state.num_updates == 3


def test_mean_baseline_over_steps_by_hand():
    algorithm, state, baselines = Reinforce(baseline=MEAN), BaselineState(), []
    for reward in ([1.0, 3.0], [0.0, -2.0], [5.0, 5.0]):
        result = algorithm.advantages(_experience(reward), state)
        baselines.append(result.metrics["baseline"])
        state = result.state
    assert baselines == pytest.approx([0.0, 2.0, 0.5])
    assert state.value == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("baseline", "expected"), [(BaselineForm.ema, [0.2, 0.08, 0.572]), (MEAN, [2.0, 0.5, 2.0])]
)
def test_before_uses_the_baseline_that_contains_this_batch(baseline, expected):
    algorithm, state, baselines = Reinforce(baseline=baseline, baseline_update=BEFORE), BaselineState(), []
    for reward in ([1.0, 3.0], [0.0, -2.0], [5.0, 5.0]):
        result = algorithm.advantages(_experience(reward), state)
        baselines.append(result.metrics["baseline"])
        state = result.state
    assert baselines == pytest.approx(expected)


def test_bias_correction_starts_at_the_first_batch_mean():
    algorithm = Reinforce(alpha=0.9, bias_correction=True)
    first = algorithm.advantages(_experience([1.0, 3.0]), BaselineState())
    assert first.metrics["baseline"] == 0.0
    second = algorithm.advantages(_experience([0.0, -2.0]), first.state)
    assert second.metrics["baseline"] == pytest.approx(2.0)
    third = algorithm.advantages(_experience([0.0, 0.0]), second.state)
    assert third.metrics["baseline"] == pytest.approx((0.9 * 0.2 - 0.1) / (1 - 0.81))
    assert third.state.value == pytest.approx(0.9 * 0.08)  # what is kept is not corrected twice


def test_the_state_given_is_not_changed_and_one_sample_is_enough():
    state = BaselineState(0.5, 2)
    result = Reinforce(alpha=0.9).advantages(_experience([2.5]), state)
    assert result.advantage.tolist() == [2.0]
    assert state == BaselineState(0.5, 2) and result.state.num_updates == 3
    assert not result.advantage.requires_grad


def test_mean_updated_first_leaves_nothing_of_a_single_row():
    result = Reinforce(baseline=MEAN, baseline_update=BEFORE).advantages(_experience([3.7]), BaselineState())
    assert result.advantage.tolist() == [0.0]


def test_loss_by_hand_on_policy():
    logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    output = _loss(Reinforce(), logprob, _batch([-1.0, -2.0], [2.0, -1.0]), normaliser=4.0)
    assert output.loss.item() == pytest.approx(-(2.0 * -1.0 + -1.0 * -2.0) / 4)
    output.loss.backward()
    assert logprob.grad.tolist() == pytest.approx([-0.5, 0.25])


def test_loss_by_hand_off_policy_with_its_metrics():
    ratios, advantage = torch.tensor([1.5, 0.5, 1.0, 3.0]), [1.0, -1.0, 2.0, -1.0]
    logprob = ratios.log().requires_grad_()
    output = _loss(Reinforce(num_epochs=2, clip=0.2), logprob, _batch([0.0] * 4, advantage), normaliser=8.0)
    # pessimistic: 1.2 * 1, 0.8 * -1, 1 * 2, 3 * -1
    assert output.loss.item() == pytest.approx(-(1.2 - 0.8 + 2.0 - 3.0) / 8)
    # metrics add up over the micro-batches of a step; these 4 rows are half of it
    assert output.metrics["ratio/mean"].item() == pytest.approx(6.0 / 8)
    assert output.metrics["ratio/clip_frac"].item() == pytest.approx(2 / 8)
    assert output.maxima["ratio/max"].item() == pytest.approx(3.0)
    assert not any(value.requires_grad for value in (*output.metrics.values(), *output.maxima.values()))
    output.loss.backward()
    assert logprob.grad.tolist() == pytest.approx([0.0, 0.0, -2.0 / 8, 3.0 / 8])


def test_on_policy_ignores_the_old_logprob_but_reports_the_ratio():
    logprob = torch.tensor([-1.0])
    near, far = (_loss(Reinforce(), logprob, _batch([old], [2.0]), 1.0) for old in (-1.0, -3.0))
    assert near.loss == far.loss
    assert near.metrics["ratio/mean"].item() == 1.0
    assert far.metrics["ratio/mean"].item() == pytest.approx(torch.tensor(2.0).exp().item())
