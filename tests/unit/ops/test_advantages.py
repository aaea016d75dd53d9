import pytest
import torch

from rlhf_cli.ops.advantages import ema_baseline, ema_bias_correction, leave_one_out, mean_baseline


def test_leave_one_out_by_hand():
    # prompt 1: 4 - (1+1)/2, 1 - (4+1)/2, 1 - (4+1)/2; prompt 2: 0 - (3+6)/2, 3 - 6/2, 6 - 3/2
    reward = torch.tensor([4.0, 1.0, 1.0, 0.0, 3.0, 6.0])
    assert leave_one_out(reward, 3).tolist() == [3.0, -1.5, -1.5, -4.5, 0.0, 4.5]


@pytest.mark.parametrize("k", [2, 3, 5])
def test_leave_one_out_equals_a_slow_loop_and_the_scaled_distance_to_the_mean(k):
    reward = torch.randn(3 * k, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    rows = reward.tolist()
    slow = []
    for i, own in enumerate(rows):
        first = i // k * k
        others = [rows[j] for j in range(first, first + k) if j != i]
        slow.append(own - sum(others) / len(others))
    advantage = leave_one_out(reward, k)
    assert advantage.tolist() == pytest.approx(slow, abs=1e-12)
    groups = reward.view(3, k)
    scaled = k / (k - 1) * (groups - groups.mean(1, keepdim=True))
    assert torch.allclose(advantage, scaled.view(-1), atol=1e-12)
    assert torch.allclose(advantage.view(3, k).sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 0.1])
@pytest.mark.parametrize("k", [2, 3, 4])
def test_equal_rewards_have_exactly_no_advantage(value, k):
    assert leave_one_out(torch.full((2 * k,), value), k).tolist() == [0.0] * (2 * k)


def test_prompts_do_not_mix():
    reward = torch.tensor([1.0, 2.0, 3.0, 4.0])
    changed = torch.tensor([1.0, 2.0, 30.0, -4.0])
    assert torch.equal(leave_one_out(reward, 2)[:2], leave_one_out(changed, 2)[:2])


@pytest.mark.parametrize(("rows", "k"), [(1, 1), (4, 1), (5, 2)])
def test_leave_one_out_needs_others_and_whole_groups(rows, k):
    with pytest.raises(AssertionError):
        leave_one_out(torch.zeros(rows), k)


def test_ema_baseline_by_hand_and_its_limits():
    baseline = 0.0
    for mean in (2.0, -1.0, 3.0):
        baseline = ema_baseline(baseline, mean, 0.9)
    assert baseline == pytest.approx(0.9 * 0.9 * 0.2 - 0.9 * 0.1 + 0.3)
    assert ema_baseline(5.0, 2.0, 0.0) == 2.0
    assert ema_baseline(5.0, 2.0, 1.0) == 5.0


def test_bias_correction_makes_a_constant_reward_its_own_baseline_from_the_first_step():
    baseline = 0.0
    assert ema_bias_correction(baseline, 0.9, 0) == 0.0
    for updates in range(1, 6):
        baseline = ema_baseline(baseline, 7.0, 0.9)
        assert ema_bias_correction(baseline, 0.9, updates) == pytest.approx(7.0)
    assert ema_bias_correction(0.5, 0.9, 10**6) == 0.5


def test_mean_baseline_is_the_mean_of_all_batch_means():
    means, baseline = [2.0, -1.0, 3.0, 0.5], 0.0
    for done, mean in enumerate(means):
        baseline = mean_baseline(baseline, mean, done)
        assert baseline == pytest.approx(sum(means[: done + 1]) / (done + 1))
    assert mean_baseline(123.0, 4.0, 0) == 4.0
