import math

import pytest
import torch

from rlhf_cli.ops.preference_losses import bradley_terry_loss, dpo_loss, ipo_loss, log_ratio, wins

CHOSEN, REJECTED, MARGIN = [1.0, -0.5, 2.0], [0.0, 1.5, 2.0], [0.5, 0.0, 1.0]


def test_by_hand():
    # sigmoid(ln 3) = 3/4
    loss = bradley_terry_loss(torch.tensor([math.log(3)]), torch.zeros(1), 1.0)
    assert loss.item() == pytest.approx(-math.log(0.75))
    # the other way round: sigmoid(-ln 3) = 1/4
    assert bradley_terry_loss(torch.zeros(1), torch.tensor([math.log(3)]), 1.0).item() == pytest.approx(
        math.log(4)
    )


def test_equal_rewards_cost_ln_2_each_and_a_constant_changes_nothing():
    equal = torch.full((3,), 5.0)
    assert bradley_terry_loss(equal, equal, 3.0).item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor(CHOSEN), torch.tensor(REJECTED)
    shifted = bradley_terry_loss(chosen + 4, rejected + 4, 3.0)
    assert shifted.item() == pytest.approx(bradley_terry_loss(chosen, rejected, 3.0).item())


def test_a_margin_has_to_be_beaten():
    with_margin = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]), 1.0, torch.tensor([1.5]))
    assert with_margin.item() == pytest.approx(math.log(2))
    chosen, rejected = torch.tensor(CHOSEN), torch.tensor(REJECTED)
    assert bradley_terry_loss(chosen, rejected, 3.0, torch.zeros(3)) == bradley_terry_loss(chosen, rejected, 3.0)


@pytest.mark.parametrize("use_margin", [False, True])
def test_value_and_gradient_equal_a_slow_implementation(use_margin):
    chosen = torch.tensor(CHOSEN, requires_grad=True)
    rejected = torch.tensor(REJECTED, requires_grad=True)
    loss = bradley_terry_loss(chosen, rejected, 4.0, torch.tensor(MARGIN) if use_margin else None)
    loss.backward()
    total, slope = 0.0, []
    for a, b, m in zip(CHOSEN, REJECTED, MARGIN, strict=True):
        p = 1 / (1 + math.exp(-(a - b - m * use_margin)))
        total -= math.log(p) / 4
        slope.append((p - 1) / 4)  # d(-log sigmoid(d))/dd = sigmoid(d) - 1
    assert loss.item() == pytest.approx(total)
    assert chosen.grad.tolist() == pytest.approx(slope)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slope])


def test_far_apart_rewards_have_finite_loss_and_gradient():
    chosen = torch.tensor([300.0, -300.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.zeros(2), 1.0)
    loss.backward()
    assert loss.item() == 300.0
    assert chosen.grad.tolist() == [0.0, -1.0]


RATIO_PLUS, RATIO_MINUS = [0.5, -2.0, 3.0, 0.0], [-1.0, 1.5, 3.0, 20.0]


def on_ratios(loss, **options):
    """Value and both gradients of a loss on the ratios above, for a step of 8 pairs."""
    plus, minus = (torch.tensor(values, requires_grad=True) for values in (RATIO_PLUS, RATIO_MINUS))
    value = loss(plus, minus, 8.0, **options)
    value.backward()
    return value.item(), plus.grad.tolist(), minus.grad.tolist()


def test_dpo_by_hand():
    # beta h = ln 3, sigmoid(ln 3) = 3/4
    ratio = torch.tensor([math.log(3) / 0.1])
    assert dpo_loss(ratio, torch.zeros(1), 1.0, 0.1).item() == pytest.approx(-math.log(0.75))
    assert dpo_loss(torch.zeros(1), ratio, 1.0, 0.1).item() == pytest.approx(-math.log(0.25))
    smoothed = dpo_loss(ratio, torch.zeros(1), 2.0, 0.1, label_smoothing=0.2).item()
    assert smoothed == pytest.approx((-0.8 * math.log(0.75) - 0.2 * math.log(0.25)) / 2)


def test_ipo_by_hand():
    # 1 / (2 beta) = 5
    assert ipo_loss(torch.tensor([7.0]), torch.tensor([4.0]), 1.0, 0.1).item() == pytest.approx(4.0)
    assert ipo_loss(torch.tensor([4.0, 9.0]), torch.tensor([-1.0, 1.0]), 2.0, 0.1).item() == pytest.approx(4.5)


def test_the_ratio_is_of_completions_or_of_tokens():
    logprob, ref = torch.tensor([-6.0, -1.0]), torch.tensor([-2.0, -3.0])
    assert log_ratio(logprob, ref).tolist() == [-4.0, 2.0]
    assert log_ratio(logprob, ref, torch.tensor([8, 1])).tolist() == [-0.5, 2.0]
    # a completion without a token has nothing to divide
    assert log_ratio(torch.zeros(1), torch.zeros(1), torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_at_the_reference_dpo_costs_ln_2_whatever_beta_and_smoothing(label_smoothing):
    same = torch.tensor([-1.25, 0.0, 4.0])
    for beta in (0.01, 0.1, 5.0):
        assert dpo_loss(same, same, 3.0, beta, label_smoothing).item() == pytest.approx(math.log(2), rel=1e-6)


def test_dpo_is_bradley_terry_on_beta_times_the_ratios():
    plus, minus = torch.tensor(RATIO_PLUS), torch.tensor(RATIO_MINUS)
    assert dpo_loss(plus, minus, 4.0, 0.3) == bradley_terry_loss(0.3 * plus, 0.3 * minus, 4.0)


def test_from_the_reference_on_both_pull_a_pair_apart_the_smaller_beta_the_faster_in_ipo():
    plus = torch.zeros(1, requires_grad=True)
    dpo_loss(plus, torch.zeros(1), 1.0, 0.1).backward()
    assert plus.grad.item() == pytest.approx(-0.1 / 2)
    plus.grad = None
    ipo_loss(plus, torch.zeros(1), 1.0, 0.1).backward()
    assert plus.grad.item() == pytest.approx(-1 / 0.1)


def test_smoothing_is_the_chance_that_a_label_is_swapped():
    value, plus, minus = on_ratios(dpo_loss, beta=0.7, label_smoothing=0.3)
    swapped = dpo_loss(torch.tensor(RATIO_MINUS), torch.tensor(RATIO_PLUS), 8.0, 0.7, 0.7).item()
    assert value == pytest.approx(swapped)
    assert plus == pytest.approx([-one for one in minus])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dpo_equals_a_slow_implementation(label_smoothing):
    value, plus, minus = on_ratios(dpo_loss, beta=0.4, label_smoothing=label_smoothing)
    total, slope = 0.0, []
    for a, b in zip(RATIO_PLUS, RATIO_MINUS, strict=True):
        p = 1 / (1 + math.exp(-0.4 * (a - b)))
        total -= ((1 - label_smoothing) * math.log(p) + label_smoothing * math.log(1 - p)) / 8
        slope.append(0.4 * (p - (1 - label_smoothing)) / 8)  # cross-entropy to a label of 1 - eps
    assert value == pytest.approx(total)
    assert plus == pytest.approx(slope)
    assert minus == pytest.approx([-one for one in slope])


def test_ipo_equals_a_slow_implementation():
    value, plus, minus = on_ratios(ipo_loss, beta=0.25)
    distance = [a - b - 2.0 for a, b in zip(RATIO_PLUS, RATIO_MINUS, strict=True)]
    assert value == pytest.approx(sum(one * one for one in distance) / 8)
    assert plus == pytest.approx([2 * one / 8 for one in distance])
    assert minus == pytest.approx([-2 * one / 8 for one in distance])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_far_apart_ratios_have_finite_loss_and_gradient(label_smoothing):
    plus = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = dpo_loss(plus, torch.zeros(2), 1.0, 1.0, label_smoothing)
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert plus.grad.tolist() == pytest.approx([label_smoothing, label_smoothing - 1])


def test_no_pairs_cost_nothing():
    none = torch.zeros(0, requires_grad=True)
    for loss in (dpo_loss(none, none, 1.0, 0.1), ipo_loss(none, none, 1.0, 0.1)):
        assert loss.item() == 0.0
    assert wins(none).item() == 0.0


def test_a_tie_is_half_a_win():
    assert wins(torch.tensor([0.0, 0.0, 1e-9, -3.0])).item() == 2.0
