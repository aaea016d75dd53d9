"""Moments that are merged, and what they do to a reward."""

from __future__ import annotations

import doctest
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_cli.rewards import scaling
from rlhf_cli.rewards.scaling import Moments, RewardScaling
from rlhf_cli.types import Scores


def scores(*reward: float) -> Scores:
    return Scores(reward=torch.tensor(reward), raw=torch.zeros(len(reward)))


def test_the_examples():
    assert doctest.testmod(scaling) == (0, 2)


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=32), max_size=7), min_size=1, max_size=6).filter(
        lambda batches: any(map(len, batches))
    )
)
def test_merged_moments_are_those_of_all_numbers_together(batches: list[list[float]]):
    merged = Moments()
    for batch in batches:
        merged = merged.merged(Moments.of(torch.tensor(batch)))
    every = np.concatenate([np.array(batch, dtype=np.float64) for batch in batches])
    assert merged.count == len(every)
    assert merged.mean == pytest.approx(every.mean(), rel=1e-9, abs=1e-9)
    assert (merged.m2 / merged.count) ** 0.5 == pytest.approx(every.std(), rel=1e-6, abs=1e-5)


def test_a_large_mean_does_not_swallow_the_spread():
    values = 1e6 + torch.tensor([0.0, 1.0, 2.0, 3.0])
    one, other = Moments.of(values[:1]), Moments.of(values[1:])
    assert one.merged(other).std == pytest.approx(np.std([0, 1, 2, 3]), rel=1e-9)
    assert other.merged(one).mean == 1e6 + 1.5


def test_running_counts_a_batch_before_it_is_applied():
    running = RewardScaling(Moments(), None, is_running=True)
    seen: list[float] = []
    for batch in ([1.0, 2.0, 6.0], [4.0, -3.0], [0.5]):
        running.see(torch.tensor(batch))
        seen += batch
        expected = (np.array(batch) - np.mean(seen)) / np.std(seen)
        assert running(scores(*batch)).reward.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
        assert running.metrics() == pytest.approx(
            {"reward/norm_mean": np.mean(seen), "reward/norm_std": np.std(seen)}
        )


def test_applying_does_not_move_it():
    running = RewardScaling(Moments.of(torch.tensor([1.0, 2.0])), None, is_running=True)
    before = running.moments
    assert running(scores(5.0)).reward.tolist() == [7.0]
    assert running.moments is before
    frozen = RewardScaling(before, None)
    frozen.see(torch.tensor([9.0, 9.0]))
    assert frozen.moments is before


def test_a_resumed_one_is_the_same_to_the_bit():
    running = RewardScaling(Moments(), None, is_running=True)
    generator = torch.Generator().manual_seed(0)
    running.see(torch.randn(17, generator=generator) / 3)
    other = RewardScaling(Moments(), None, is_running=True)
    other.restore(json.loads(json.dumps(running.state())))
    assert other.moments == running.moments
    batch = torch.randn(5, generator=generator)
    for one in (running, other):
        one.see(batch)
    assert other.moments == running.moments and running.moments.count == 22
    assert RewardScaling(running.moments, 1.0).state() == {}, "what is frozen follows from the config"


@pytest.mark.parametrize("value", [0.1, -4.0, 1e5 / 3])
def test_what_rounding_makes_of_equal_rewards_is_not_blown_up(value: float):
    running = RewardScaling(Moments(), None, is_running=True)
    for _ in range(3):
        equal = torch.full((7,), value)
        equal[3] = torch.nextafter(equal[3], torch.tensor(0.0))
        running.see(equal)
    assert running.moments is not None and running.moments.std == 0.0
    assert running(scores(value, value + 1)).reward.tolist() == pytest.approx([0.0, 1.0], abs=2e-2)


def test_the_clip_comes_after_the_scale_and_says_what_it_changed():
    scaled = RewardScaling(Moments.of(torch.tensor([0.0, 2.0])), 1.5)(scores(-3.0, 2.5, 1.0, 9.0))
    assert scaled.reward.tolist() == [-1.5, 1.5, 0.0, 1.5]
    assert scaled.clipped is not None and scaled.clipped.tolist() == [1.0, 0.0, 0.0, 1.0]
    plain = RewardScaling(None, 2.0)(scores(-3.0, 2.0))
    assert plain.reward.tolist() == [-2.0, 2.0] and plain.clipped is not None
    assert plain.clipped.tolist() == [1.0, 0.0]
    assert RewardScaling(Moments(), None)(scores(1.0)).clipped is None
