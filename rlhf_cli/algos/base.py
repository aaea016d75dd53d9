"""What an algorithm is: a dataclass of hyperparameters (the group `algo`) with a few pure methods over `ops`.

Kinds, by what they learn from:

    OnlineAlgorithm        its own samples: advantages, then a loss; one loop runs them all
    ActorCriticAlgorithm   the same with tokens as actions and a learned value
    PreferenceAlgorithm    pairs: a loss on the log-probs of the two sides

A file of this package holds one algorithm, and its name is the choice of `algo`; see `rlhf_cli.algos.registry`.
Hyperparameters are read without torch, which comes with the first call of a method (`rlhf_cli.ops`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from rlhf_cli.errors import bad_value
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings, Select, TrainSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import Experience, LossOutput, PolicyBatch


@dataclass(frozen=True)
class BaselineState:
    """State of a moving baseline; what a checkpoint stores of an algorithm."""

    value: float = 0.0
    num_updates: int = 0


@dataclass(frozen=True)
class Advantages:
    """Advantages of one optimizer batch, and the baseline's state after it."""

    advantage: Tensor  # float32 [N], or [N, L-1] where every token is an action; detached
    state: BaselineState
    metrics: Mapping[str, float] = field(default_factory=dict)
    keep: Tensor | None = None  # bool [N], rows to learn from; None = all
    value_target: Tensor | None = None  # float32 [N, L-1], what a critic learns


@dataclass
class Algorithm:
    """What every choice of `algo` has; its own class gives it a name."""

    name: str = ""
    beta: float = 0.1  # weight of the KL to the reference
    eval_prompts: int = 100  # held-out prompts of the evaluations during training
    train: TrainSettings = field(default_factory=TrainSettings)

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise bad_value("algo.beta", self.beta, "a number >= 0")
        self.check_counts("eval_prompts")
        self.train.check("algo.train")

    def check_others(self, kl: KlSettings, peft: str) -> None:
        """Raises RequestError where it cannot be combined with these choices of `kl` and `peft`."""
        return

    def kl_problem(self, kl: KlSettings) -> str | None:
        """What is allowed and known to be wrong with the KL as it is set; None where nothing is."""
        return kl.problem()

    def running_scale_problem(self) -> str | None:
        """What it does that a reward on a moving scale cannot serve; None where nothing is."""
        for key, is_set in (("select=best", self.train.select is Select.best), ("patience", self.train.patience)):
            if is_set:
                return f"algo.train.{key} compares rewards over time, and they would be on different scales"
        return None

    def support_problem(self, pairs_share_prompt: bool) -> str | None:
        """Why its samples cannot be drawn from the most likely tokens alone; None where they can.

        `pairs_share_prompt`: as `check_data` has it.
        """
        return (
            f"algo={self.name} measures the KL on its samples, and the reference's most likely tokens can lack one "
            "that it draws: an infinite KL (pairs that algo=dpo algo.pairs=on_policy samples have no such KL)"
        )

    def needs_reward_model(self, pairs_share_prompt: bool) -> bool:
        """Whether it learns from a reward; `pairs_share_prompt`: as `check_data` has it."""
        return True

    def learns_from_pairs(self, pairs_share_prompt: bool) -> bool:
        """Whether it trains on the data's pairs, and not on its prompts."""
        return False

    def check_data(self, name: str, pairs_share_prompt: bool, has_gold: bool) -> None:
        """Raises RequestError where the data lacks what it learns from.

        Args:
            name: of the data.
            pairs_share_prompt: whether the data's pairs are two completions of one prompt.
            has_gold: whether the data knows its true reward.
        """
        return

    def shared_counts(self, pairs_share_prompt: bool) -> dict[str, tuple[int, int]]:
        """What several processes have a share of, by key: how many there are, and how many stay with one process."""
        return {"train.batch_size": (self.train.batch_size, 1), "eval_prompts": (self.eval_prompts, 1)}

    def check_counts(self, *keys: str) -> None:
        """Raises RequestError where one of these keys is below 1."""
        for key in keys:
            if getattr(self, key) < 1:
                raise bad_value(f"algo.{key}", getattr(self, key), "a whole number >= 1")

    def check_range(self, key: str, low: float, high: float) -> None:
        """Raises RequestError where the key's value is outside [low, high]."""
        if not low <= getattr(self, key) <= high:
            raise bad_value(f"algo.{key}", getattr(self, key), f"a number from {low:g} to {high:g}")


@dataclass
class OnlineAlgorithm(Algorithm, ABC):
    """An algorithm that learns from its own samples."""

    # What the loss of a step is divided by: "sequences", or "tokens" of completions
    normalised_by: ClassVar[str] = "sequences"
    # True where every token is an action: experience and batches then have figures of tokens
    acts_on_tokens: ClassVar[bool] = False
    # False where a few samples alone have a part in the loss: a pass for all of them is then better not differentiated
    learns_from_all: ClassVar[bool] = True

    k: int = 1  # samples per prompt
    rollout_batch_size: int | None = None  # samples of a rollout; None = those of one optimizer step
    num_epochs: int = 1  # passes over each rollout
    clip: float | None = None  # of the ratio to the policy that sampled

    def shared_counts(self, pairs_share_prompt: bool) -> dict[str, tuple[int, int]]:
        """A prompt's samples stay with one process."""
        return {**super().shared_counts(pairs_share_prompt), "train.batch_size": (self.train.batch_size, self.k)}

    @property
    def num_minibatches(self) -> int:
        """Optimizer batches per rollout."""
        return (self.rollout_batch_size or self.train.batch_size) // self.train.batch_size

    @property
    def on_policy(self) -> bool:
        """Whether every rollout serves exactly one optimizer step."""
        return self.num_minibatches * self.num_epochs == 1

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_counts("k", "num_epochs")
        if self.train.steps is None:
            raise bad_value("algo.train.steps", None, "a whole number >= 1")
        if self.train.batch_size % self.k:
            raise bad_value(
                "algo.train.batch_size",
                self.train.batch_size,
                f"a multiple of algo.k={self.k} (samples per step)",
            )
        whole = self.train.batch_size
        if self.rollout_batch_size is not None and (
            self.rollout_batch_size < 1 or self.rollout_batch_size % whole
        ):
            raise bad_value(
                "algo.rollout_batch_size",
                self.rollout_batch_size,
                f"a multiple of algo.train.batch_size={whole}, or null for one step's",
            )
        if self.clip is not None and not 0 < self.clip < 1:
            raise bad_value("algo.clip", self.clip, "a number above 0 and below 1, or null")

    def check_clip_has_a_use(self) -> None:
        """Raises RequestError where a ratio is clipped that is always 1."""
        if self.clip is not None and self.on_policy:
            raise bad_value(
                "algo.clip", self.clip, "null, because with one step per rollout the ratio is always 1"
            )

    @abstractmethod
    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """Advantages of one optimizer batch, N rows prompt-major: rows i*k .. i*k+k-1 share a prompt."""

    @abstractmethod
    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """Loss of a micro-batch.

        Args:
            tokens: log-probs of the N completions, with gradient.
            value: float32 [N, L-1], with gradient; None where the algorithm has no critic.
            batch: the N rows.
            normaliser: sequences or tokens of the whole optimizer step (all micro-batches and processes).
        """


class ValueHead(Enum):
    """Where a critic's value comes from."""

    shared = "shared"  # a head on the policy's own hidden states
    separate = "separate"  # a head on a second backbone, which starts from the SFT model


@dataclass
class ActorCriticAlgorithm(OnlineAlgorithm):
    """An algorithm whose actions are tokens, with a learned value as baseline."""

    normalised_by: ClassVar[str] = "tokens"
    acts_on_tokens: ClassVar[bool] = True

    value_head: ValueHead = ValueHead.shared
    value_coef: float = 0.1  # weight of the critic's loss
    whiten: bool = False  # advantages of a batch to mean 0 and standard deviation 1

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if not (math.isfinite(self.value_coef) and self.value_coef >= 0):
            raise bad_value("algo.value_coef", self.value_coef, "a number >= 0")

    def check_others(self, kl: KlSettings, peft: str) -> None:
        """Raises RequestError for estimates of the KL that are no sum over tokens."""
        if kl.placement is KlPlacement.reward and kl.estimator is not KlEstimator.k1:
            raise bad_value(
                "kl.estimator",
                kl.estimator.value,
                f"k1, because algo={self.name} has the KL in the rewards of tokens (or kl.placement=loss)",
            )
