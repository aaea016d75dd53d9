"""Settings that several parts read: optimisation, checkpoints, where the KL goes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from rlhf_cli.errors import bad_value


class Schedule(Enum):
    """How the learning rate runs after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Select(Enum):
    """Which weights end up in model/."""

    last = "last"
    best = "best"


@dataclass
class CheckpointSettings:
    """How often a run writes all its state, and how many of these stay."""

    every: int = 50  # optimizer steps
    keep: int = 2

    def check(self, where: str) -> None:
        """Raises RequestError for impossible values; `where` is the key prefix."""
        for key in ("every", "keep"):
            if getattr(self, key) < 1:
                raise bad_value(f"{where}.{key}", getattr(self, key), "a whole number >= 1")


@dataclass
class TrainSettings:
    """One stage's optimisation; every stage has its own."""

    steps: int | None = None  # optimizer steps; null = as many as `epochs` gives
    epochs: float = 1.0  # passes over the data, read where steps is null
    batch_size: int = 32  # rows (examples, pairs or sampled sequences) per optimizer step
    micro_batch_size: int | None = None  # rows per forward pass; null = the whole batch at once
    micro_batch_tokens: int | None = None  # tokens per forward pass, a longer row alone; null = no limit
    gradient_checkpointing: bool = False  # activations are computed again in the backward pass: less memory
    lr: float = 2e-5
    schedule: Schedule = Schedule.cosine
    warmup_ratio: float = 0.03  # share of all steps over which lr rises from 0
    warmup_steps: int | None = None  # as many steps instead; null = as many as `warmup_ratio` gives
    min_lr_ratio: float = 0.0  # where linear and cosine end, as a share of lr
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0  # global norm; null = no clipping
    eval_every: int | None = None  # steps between evaluations; null = only at the end
    patience: int | None = None  # evaluations without a better one before stopping; null = never
    select: Select = Select.last  # which weights become model/; the others are kept beside it
    samples_every: int | None = None  # steps between rows in samples.jsonl; null = as eval_every

    @property
    def rows_of_pass(self) -> int:
        """Most rows of a forward pass."""
        return self.micro_batch_size or self.batch_size

    def check(self, where: str) -> None:
        """Raises RequestError for impossible values; `where` is the key prefix, e.g. "algo.train"."""
        counts = ("steps", "batch_size", "micro_batch_size", "micro_batch_tokens", "eval_every", "patience")
        for key in (*counts, "samples_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise bad_value(f"{where}.{key}", value, "a whole number >= 1")
        if self.steps is None and not (math.isfinite(self.epochs) and self.epochs > 0):
            raise bad_value(f"{where}.epochs", self.epochs, "a number > 0")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise bad_value(f"{where}.lr", self.lr, "a number > 0")
        for key in ("warmup_ratio", "min_lr_ratio"):
            value = getattr(self, key)
            if not 0.0 <= value <= 1.0:
                raise bad_value(f"{where}.{key}", value, "a number from 0 to 1")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise bad_value(f"{where}.warmup_steps", self.warmup_steps, "a whole number >= 0, or null")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            if not 0.0 <= value < 1.0:
                raise bad_value(f"{where}.{key}", value, "a number from 0 to below 1")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise bad_value(f"{where}.weight_decay", self.weight_decay, "a number >= 0")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise bad_value(f"{where}.eps", self.eps, "a number > 0")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise bad_value(f"{where}.max_grad_norm", self.max_grad_norm, "a number > 0, or null")
        if self.patience is not None and self.eval_every is None:
            raise bad_value(f"{where}.patience", self.patience, f"{where}.eval_every to be set as well")

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps over `num_rows` rows of data: `steps`, or `epochs` passes, at least one."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * num_rows / self.batch_size))


class KlPlacement(Enum):
    """What the KL to the reference is added to."""

    reward = "reward"
    loss = "loss"


class KlEstimator(Enum):
    """How the KL of a completion is estimated; see `rlhf_cli.ops.kl`."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


# Combinations whose expected gradient is not that of KL(policy || reference), and what it is instead
_WRONG_KL = {
    (KlPlacement.reward, KlEstimator.k2): "its gradient vanishes near the reference and is that of no KL",
    (KlPlacement.reward, KlEstimator.k3): (
        "its gradient is that of KL(policy||reference) - KL(reference||policy), which cancel near the reference"
    ),
    (KlPlacement.loss, KlEstimator.k1): "its expected gradient is 0: nothing holds the policy near the reference",
    (KlPlacement.loss, KlEstimator.k3): "its gradient is that of KL(reference||policy), the other direction",
}


@dataclass
class KlSettings:
    """Where the KL to the reference acts, with the weight `algo.beta`."""

    placement: KlPlacement = KlPlacement.reward
    estimator: KlEstimator = KlEstimator.k1

    def problem(self) -> str | None:
        """What is wrong with the combination; None for those that give the gradient of the reverse KL."""
        reason = _WRONG_KL.get((self.placement, self.estimator))
        if reason is None:
            return None
        return (
            f"kl.placement={self.placement.value} kl.estimator={self.estimator.value}: {reason} "
            "(right are reward with k1, and loss with k2)"
        )


class GradeLoss(Enum):
    """What a pair's probability is under a distributional reward model; see `rlhf_cli.ops.grades`."""

    strict = "strict"
    half_tie = "half_tie"
    renorm = "renorm"


class ReadOut(Enum):
    """How a distribution over grades becomes a reward; see `rlhf_cli.ops.grades`."""

    mean = "mean"
    mean_std = "mean_std"
    cvar = "cvar"
    win_rate = "win_rate"
