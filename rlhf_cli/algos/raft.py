"""RAFT: cross-entropy on the best of each prompt's samples.

    loss = -(1/n) sum over the best y of each prompt of log pi(y|x),   n its tokens

Dong et al. 2023 (arXiv 2304.06767). The best of k has the highest KL-shaped reward or, by key,
the highest reward alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from rlhf_cli import ops
from rlhf_cli.algos.base import Advantages, BaselineState, OnlineAlgorithm
from rlhf_cli.errors import bad_value
from rlhf_cli.settings import KlPlacement, KlSettings
from rlhf_cli.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import Experience, PolicyBatch


class RankBy(Enum):
    """What the best sample has most of."""

    shaped = "shaped"  # reward - beta * KL
    reward = "reward"


@dataclass
class Raft(OnlineAlgorithm):
    """algo=raft."""

    normalised_by: ClassVar[str] = "tokens"
    learns_from_all: ClassVar[bool] = False

    name: str = "raft"
    k: int = 4
    rank_by: RankBy = RankBy.shaped

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        if self.k < 2:
            raise bad_value("algo.k", self.k, "at least 2: RAFT learns from the best of a prompt's samples")
        super().check()
        if self.clip is not None:
            raise bad_value("algo.clip", self.clip, "null, because cross-entropy has no ratio to clip")

    def check_others(self, kl: KlSettings, peft: str) -> None:
        """Raises RequestError where the KL would be taken over the best samples, and not over the policy's."""
        if kl.placement is not KlPlacement.reward:
            raise bad_value(
                "kl.placement", kl.placement.value, "reward, because RAFT's loss is over the best samples alone"
            )

    def kl_problem(self, kl: KlSettings) -> str | None:
        """None: the KL ranks samples here, and has no gradient."""
        return None

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """1 for the best of each prompt (the first of equals), which alone is kept."""
        by = experience.shaped_reward if self.rank_by is RankBy.shaped else experience.reward
        best = ops.advantages.best_of_group(by, self.k)
        return Advantages(
            best.to(by.dtype), state, {"reward/best_mean": float(experience.reward[best].mean())}, best
        )

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """Cross-entropy per token of what was kept."""
        return LossOutput(
            ops.policy_losses.score_function_loss(tokens.sequence_logprob(), batch.advantage, normaliser)
        )
