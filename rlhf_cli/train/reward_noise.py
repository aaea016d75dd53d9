"""Noise on the reward of training samples, for studies of how much of it a method bears."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.rollout.noise import uniform_noise
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Rollout


@dataclass(frozen=True)
class RewardNoise:
    """N(0, std^2), a pure function of (seed, rollout, prompt, sample), as the sampling noise is."""

    std: float  # in units of the standardised reward
    seed: int

    def __call__(self, rollout: Rollout, number: int) -> Tensor:
        """The noise of each row of rollout `number`, float32 [N]."""
        seed = derive_seed("reward noise", self.seed)
        uniform = uniform_noise(seed, number, rollout.prompt_index.tolist(), rollout.sample_index.tolist(), 1)
        # 0 would become minus infinity; it stands for the numbers below half of the smallest step
        probability = torch.from_numpy(uniform)[:, 0].double().clamp(min=2.0**-25)
        return (self.std * torch.special.ndtri(probability)).float()
