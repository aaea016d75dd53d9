import itertools
import math

import pytest
import torch
from torch import nn

from rlhf_cli.settings import Schedule, TrainSettings
from rlhf_cli.train.optim import build_optimizer, lr_factor


def _factors(num_steps, **settings):
    return [lr_factor(TrainSettings(**settings), step, num_steps) for step in range(1, num_steps + 1)]


def test_constant_by_hand():
    # 30% of 10 steps is 3 of warm-up, and the first one already moves
    factors = _factors(10, schedule=Schedule.constant, warmup_ratio=0.3)
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1])


def test_linear_by_hand():
    factors = _factors(6, schedule=Schedule.linear, warmup_ratio=1 / 3)
    assert factors == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])


def test_cosine_by_hand():
    # (1 + cos 0 deg)/2, (1 + cos 60 deg)/2, (1 + cos 90 deg)/2, (1 + cos 120 deg)/2
    factors = _factors(8, schedule=Schedule.cosine, warmup_ratio=0.25)
    assert factors[:2] == pytest.approx([0.5, 1.0])
    assert [factors[i] for i in (2, 4, 5, 6)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
def test_min_lr_ratio_is_what_it_goes_towards_from_the_peak(schedule):
    factors = _factors(12, schedule=schedule, warmup_ratio=2 / 12, min_lr_ratio=0.1)
    assert factors[1] == factors[2] == 1.0
    assert factors[7] == pytest.approx(0.55)  # half of the way from 1 down to 0.1
    assert 0.1 < factors[-1] < 0.2
    assert all(a > b for a, b in itertools.pairwise(factors[2:]))


def test_the_length_of_the_warm_up_is_not_off_by_rounding():
    # 0.07 * 100 is 7.000000000000001 in floating point
    factors = _factors(100, schedule=Schedule.constant, warmup_ratio=0.07)
    assert factors[:8] == pytest.approx([1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0, 1.0])


@pytest.mark.parametrize("schedule", list(Schedule))
def test_limits_of_the_warm_up(schedule):
    assert _factors(4, schedule=schedule, warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    # any warm-up at all is at least one step, at the peak
    assert _factors(5, schedule=schedule, warmup_ratio=0.001)[0] == 1.0
    assert _factors(1, schedule=schedule, warmup_ratio=0.03) == [1.0]


def test_without_warm_up_it_starts_at_the_peak_and_every_step_moves():
    assert _factors(4, schedule=Schedule.linear, warmup_ratio=0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert _factors(1, schedule=Schedule.cosine, warmup_ratio=0.0) == [1.0]


def test_matrices_decay_and_vectors_do_not():
    model = nn.Linear(2, 2)
    settings = TrainSettings(lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        model.weight.fill_(2.0)
        model.bias.fill_(3.0)
    optimizer = build_optimizer(model, settings)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    # decoupled: w <- w (1 - lr * decay)
    assert model.weight.tolist() == pytest.approx([pytest.approx([1.9, 1.9])] * 2)
    assert model.bias.tolist() == [3.0, 3.0]


def test_two_adam_steps_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = build_optimizer(model, TrainSettings(lr=0.1, beta1=0.8, beta2=0.5, eps=0.25))
    first = second = 0.0
    weight = 1.0
    for step, gradient in enumerate((2.0, -1.0), start=1):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        first = 0.8 * first + 0.2 * gradient
        second = 0.5 * second + 0.5 * gradient**2
        weight -= 0.1 * (first / (1 - 0.8**step)) / (math.sqrt(second / (1 - 0.5**step)) + 0.25)
        assert model.weight.item() == pytest.approx(weight, abs=1e-6)


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = [p for group in build_optimizer(model, TrainSettings()).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model[1].parameters()}
    model[1].bias.requires_grad_(False)
    assert len(build_optimizer(model, TrainSettings()).param_groups) == 1


def test_warm_up_in_steps_goes_before_the_ratio():
    factors = _factors(6, schedule=Schedule.constant, warmup_ratio=1.0, warmup_steps=3)
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert _factors(3, schedule=Schedule.constant, warmup_steps=0) == [1.0] * 3
    # longer than the run: it never comes to the peak
    assert _factors(2, schedule=Schedule.linear, warmup_steps=4) == pytest.approx([0.25, 0.5])
