"""GRPO's advantages: by hand, against a slow form, and at the edges. Its loss is the one that RLOO has."""

from __future__ import annotations

import statistics

import pytest
import torch

from rlhf_cli.algos.base import BaselineState
from rlhf_cli.algos.grpo import Grpo
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.errors import RequestError
from rlhf_cli.settings import TrainSettings
from rlhf_cli.types import Experience

START = BaselineState()


def advantages(reward: torch.Tensor, k: int) -> torch.Tensor:
    # the reward without the KL is another one: what is compared is the shaped one
    return Grpo(k=k).advantages(Experience(torch.zeros_like(reward), reward), START).advantage


def test_by_hand():
    # mean 2, standard deviation of the sample sqrt(2); mean 5, the same
    found = advantages(torch.tensor([1.0, 3.0, 4.0, 6.0]), 2)
    assert torch.allclose(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]) / 2**0.5, atol=1e-3)


def test_as_the_definition_says_for_every_group():
    reward = torch.randn(24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    found = advantages(reward, 4)
    for start in range(0, 24, 4):
        group = reward[start : start + 4].tolist()
        mean, spread = statistics.fmean(group), statistics.stdev(group)
        expected = [(one - mean) / (spread + 1e-4) for one in group]
        assert found[start : start + 4].tolist() == pytest.approx(expected)


def test_equal_rewards_give_exactly_nothing():
    found = advantages(torch.tensor([0.1, 0.1, 0.1, 5.0, 5.0, 5.0 + 1e-6]), 3)
    assert found[:3].tolist() == [0.0, 0.0, 0.0]
    assert found[3:].abs().max() < 0.02  # nearly equal ones are not blown up


def test_neither_shift_nor_scale_of_the_reward_matters():
    reward = torch.tensor([1.0, 3.0, -2.0, 0.5, 0.0, 4.0])
    assert torch.allclose(advantages(reward, 3), advantages(100 * reward - 7, 3), atol=1e-3)
    rloo = Rloo(k=3).advantages(Experience(reward, reward), START).advantage
    scale = rloo / advantages(reward, 3)
    assert torch.allclose(scale[:3], scale[0].expand(3)) and not torch.allclose(scale[0], scale[3])


def test_one_sample_is_refused():
    with pytest.raises(RequestError, match=r"algo\.k=1: expected at least 2"):
        Grpo(k=1, train=TrainSettings(steps=1)).check()
