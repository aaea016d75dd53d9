"""What algorithms over pairs share: where the pairs and the reference's log-probs come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from rlhf_cli.algos.base import Algorithm
from rlhf_cli.errors import bad_value
from rlhf_cli.settings import KlSettings

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import LossOutput


class Reference(Enum):
    """When the reference's log-probs are taken."""

    on_the_fly = "on_the_fly"  # with each batch
    precomputed = "precomputed"  # all of them before training, kept on disk


class Pairs(Enum):
    """Where pairs come from."""

    auto = "auto"  # the data's, where they are two completions of one prompt; else on_policy
    data = "data"
    on_policy = "on_policy"  # samples of the SFT model


class Labels(Enum):
    """What ranks on-policy samples."""

    rm = "rm"
    gold = "gold"  # the data's true reward, where it has one


@dataclass
class PreferenceAlgorithm(Algorithm, ABC):
    """An algorithm that learns from pairs, with nothing but log-probs of the policy and of the reference."""

    reference: Reference = Reference.on_the_fly
    pairs: Pairs = Pairs.auto
    k: int = 4  # samples per prompt of on-policy pairs
    num_prompts: int = 1024  # prompts of on-policy pairs
    labels: Labels = Labels.rm

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_counts("num_prompts")
        if self.k < 2:
            raise bad_value("algo.k", self.k, "at least 2: a pair is of two samples of a prompt")

    def check_others(self, kl: KlSettings, peft: str) -> None:
        """Raises RequestError for a KL that nothing would read: the loss has its own, in the log-ratios."""
        usual = KlSettings()
        for key, value, expected in (
            ("placement", kl.placement, usual.placement),
            ("estimator", kl.estimator, usual.estimator),
        ):
            if value is not expected:
                raise bad_value(
                    f"kl.{key}",
                    value.value,
                    f"{expected.value}, because algo={self.name} has the KL in its log-ratios and reads no kl.*",
                )

    def check_data(self, name: str, pairs_share_prompt: bool, has_gold: bool) -> None:
        """Raises RequestError where the data lacks what it learns from."""
        if self.pairs is Pairs.data and not pairs_share_prompt:
            raise bad_value(
                "algo.pairs", "data", f"auto or on_policy, because no pair of data={name} shares a prompt"
            )
        if self.labels is Labels.gold and not has_gold and not self.learns_from_pairs(pairs_share_prompt):
            raise bad_value("algo.labels", "gold", f"rm, because data={name} knows no true reward")

    def support_problem(self, pairs_share_prompt: bool) -> str | None:
        """None where it samples: pairs are ranked texts, whose log-probs are then taken over all tokens."""
        if self.learns_from_pairs(pairs_share_prompt):
            return f"algo={self.name} samples nothing here (algo.pairs=on_policy does)"
        return None

    def running_scale_problem(self) -> str | None:
        """All samples are ranked at once."""
        return f"algo={self.name} ranks all its samples at once"

    def learns_from_pairs(self, pairs_share_prompt: bool) -> bool:
        """Whether it trains on the data's pairs; else on pairs of its own samples."""
        return self.pairs is Pairs.data or (self.pairs is Pairs.auto and pairs_share_prompt)

    def needs_reward_model(self, pairs_share_prompt: bool) -> bool:
        """The data's pairs are labelled."""
        return self.labels is Labels.rm and not self.learns_from_pairs(pairs_share_prompt)

    def shared_counts(self, pairs_share_prompt: bool) -> dict[str, tuple[int, int]]:
        """Prompts are shared where pairs are sampled."""
        counts = super().shared_counts(pairs_share_prompt)
        if self.learns_from_pairs(pairs_share_prompt):
            del counts["eval_prompts"]
        else:
            counts["num_prompts"] = (self.num_prompts, 1)
        return counts

    @abstractmethod
    def pair_loss(
        self,
        chosen: TokenLogprobs,
        rejected: TokenLogprobs,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        normaliser: float,
    ) -> LossOutput:
        """Loss of a micro-batch.

        Args:
            chosen: log-probs of the N preferred completions, with gradient.
            rejected: of the N others.
            ref_chosen: float32 [N], log-prob of each whole completion under the reference, nats; detached.
            ref_rejected: float32 [N].
            normaliser: pairs of the whole optimizer step (all micro-batches and processes).
        """
