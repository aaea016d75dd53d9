"""Run by torchrun in two processes: their gradients, entropy bonus included, add up to that of one. Prints one line."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixtures_models import FP32
from fixtures_rewards import SEPARABLE, graded_model

from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import ALONE, World, joined
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode

PAIRS = SEPARABLE[:5]


def gradient(world: World) -> tuple[torch.Tensor, float]:
    """Of the first step, and the entropy of all its texts."""
    reward = graded_model()
    rows = encode(reward, PAIRS)
    settings = TrainSettings(batch_size=len(PAIRS), micro_batch_size=2)
    task = RewardTask(reward, rows, rows, settings, FP32, 3, RewardLoss(entropy_bonus=0.7), world)
    batch = task.batch(0)
    normaliser = world.sum([batch.normaliser])[0]
    assert len(batch.micro_batches) == (3 if world is ALONE else 2 - world.rank)
    entropy = 0.0
    for part in batch.micro_batches:
        output = task.loss(part, normaliser)
        output.loss.backward()
        entropy += float(output.metrics["rm/marginal_entropy"])
    world.sum_gradients(reward.model.parameters())
    found = torch.cat([p.grad.flatten() for p in reward.model.parameters() if p.grad is not None])
    return found, world.sum([entropy])[0]


if __name__ == "__main__":
    with joined() as world:
        (alone, entropy), (together, shared) = gradient(ALONE), gradient(world)
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
        assert abs(entropy - shared) < 1e-6 and float(alone.abs().max()) > 0.01
    if world.is_main:
        print("one gradient")
