"""What an online algorithm is: two pure methods over `ops`, and the little state its baseline needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rlhf_cli.types import LossOutput, PolicyBatch


@dataclass(frozen=True)
class BaselineState:
    """State of a moving baseline; what a checkpoint stores of an algorithm."""

    value: float = 0.0
    num_updates: int = 0


@dataclass(frozen=True)
class Advantages:
    """Advantages of one optimizer batch and the baseline's state after it."""

    advantage: Tensor  # float32 [N], detached
    state: BaselineState
    metrics: Mapping[str, float] = field(default_factory=dict)


class OnlineAlgorithm(Protocol):
    """An algorithm that learns from its own samples. One loop runs them all."""

    samples_per_prompt: int  # k
    beta: float  # weight of the KL in the reward

    def advantages(self, shaped_reward: Tensor, state: BaselineState) -> Advantages:
        """Advantages of one optimizer batch, prompt-major, from its KL-shaped rewards float32 [N]."""
        ...

    def loss(self, logprob: Tensor, batch: PolicyBatch, normaliser: float) -> LossOutput:
        """Loss of a micro-batch: `logprob` float32 [N] with gradient; `normaliser` sequences in the whole step."""
        ...
