from __future__ import annotations

import pytest
import torch

from rlhf_cli.rollout.noise import uniform_noise
from rlhf_cli.train.reward_noise import RewardNoise
from rlhf_cli.types import Rollout, Sequences


def rollout(prompts: list[int], samples: list[int]) -> Rollout:
    """Rows of these prompts and samples; nothing else of them matters."""
    n = len(prompts)
    empty = torch.zeros(n, 1, dtype=torch.long)
    return Rollout(
        sequences=Sequences(empty, empty.bool(), empty.bool()),
        prompts=("",) * n,
        completions=("",) * n,
        completion_ids=((),) * n,
        prompt_index=torch.tensor(prompts),
        sample_index=torch.tensor(samples),
        truncated=torch.zeros(n, dtype=torch.bool),
        sampled_logprob=torch.zeros(n),
        samples_per_prompt=1,
    )


def test_a_row_has_the_noise_of_its_prompt_and_sample_whatever_is_around_it():
    noise = RewardNoise(2.0, seed=7)
    together = noise(rollout([4, 4, 9, 0], [0, 1, 0, 2]), 3)
    assert torch.equal(noise(rollout([4, 4, 9, 0], [0, 1, 0, 2]), 3), together)
    torch.rand(5)  # other draws in between do not matter
    for row, (prompt, sample) in enumerate([(4, 0), (4, 1), (9, 0), (0, 2)]):
        assert noise(rollout([prompt], [sample]), 3).tolist() == together[row : row + 1].tolist()


def test_every_key_tells_draws_apart():
    draws = {
        float(RewardNoise(1.0, seed)(rollout([prompt], [sample]), number))
        for seed in (0, 1)
        for number in (0, 1, 2)
        for prompt in (0, 1, 2)
        for sample in (0, 1)
    }
    assert len(draws) == 36


def test_it_is_normal_with_its_standard_deviation():
    values = RewardNoise(3.0, seed=1)(rollout(list(range(4000)), [0] * 4000), 0).double() / 3.0
    assert values.isfinite().all()
    assert values.mean().item() == pytest.approx(0.0, abs=4 / 4000**0.5)
    assert values.std().item() == pytest.approx(1.0, abs=0.05)
    for bound, share in ((-1.0, 0.1587), (0.0, 0.5), (1.0, 0.8413), (2.0, 0.9772)):
        assert (values < bound).double().mean().item() == pytest.approx(share, abs=0.035)


def test_it_is_not_the_noise_that_samples_are_drawn_with():
    """The first number of a row decides its first token; the reward's noise must say nothing of it."""
    rows = list(range(4000))
    sampled = torch.from_numpy(uniform_noise(5, 0, rows, [0] * 4000, 1))[:, 0].double()
    noise = RewardNoise(1.0, seed=5)(rollout(rows, [0] * 4000), 0).double()
    assert torch.corrcoef(torch.stack([sampled, noise]))[0, 1].abs().item() < 0.06


def test_no_noise_is_nothing_at_all():
    assert RewardNoise(0.0, seed=1)(rollout([0, 1, 2], [0, 0, 0]), 0).tolist() == [0.0, 0.0, 0.0]
