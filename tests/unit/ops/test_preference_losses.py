import math

import pytest
import torch

from rlhf_cli.ops.preference_losses import bradley_terry_loss

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
