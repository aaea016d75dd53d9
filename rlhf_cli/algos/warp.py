"""WARP: weight-averaged rewarded policies.

    I times:  M members start from theta_init, and for T steps each
                  R = r - beta * log[pi(y|x) / anchor(y|x)],   a policy-gradient step on R
                  anchor <- (1-mu) anchor + mu theta           (starts from theta_init)
              theta_slerp <- spherical mean of the members' task vectors theta_m - theta_init, layer by layer
              theta_init  <- (1-eta) theta_init + eta theta_slerp
    out:      the front {(1-eta) theta_sft + eta theta_slerp : 0 <= eta <= 1}

Ramé et al. 2024 (arXiv 2406.16768), algorithm 1. It is no loss but a procedure around one: the members learn by
REINFORCE with a moving-average baseline (the paper does not say which) or by RLOO. Choices made here: members differ in
seed, hence in data order and noise; each has a fresh optimizer; the front ends at the SFT model, not at the last start.

Ablations: `anchor=sft` keeps the KL to the SFT model, `merge=lerp` averages task vectors linearly, `merge=none` takes
the member that does best on the validation prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from rlhf_cli.algos.base import Algorithm, OnlineAlgorithm
from rlhf_cli.algos.reinforce import BaselineForm, BaselineUpdate, Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.errors import bad_value
from rlhf_cli.settings import KlSettings


class Anchor(Enum):
    """What a member's KL is measured to."""

    ema = "ema"  # the moving average of its own weights
    sft = "sft"  # the SFT model


class Merge(Enum):
    """How the members of an iteration become one model."""

    slerp = "slerp"
    lerp = "lerp"
    none = "none"  # the best of them stays


class Inner(Enum):
    """What a member learns by."""

    reinforce = "reinforce"
    rloo = "rloo"


@dataclass
class Warp(Algorithm):
    """algo=warp."""

    name: str = "warp"
    I: int = 2  # noqa: E741 - the literature's letter: iterations
    M: int = 2  # members of an iteration
    T: int = 25  # optimizer steps of a member
    mu: float = 0.01  # share of the policy in each update of the anchor
    eta: float = 0.5  # how far the next iteration starts towards the merged members
    anchor: Anchor = Anchor.ema
    merge: Merge = Merge.slerp
    front: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    output_eta: float = 0.5  # the point of the front that becomes model/
    inner: Inner = Inner.reinforce
    k: int = 1  # samples per prompt
    rollout_batch_size: int | None = None  # as `OnlineAlgorithm` has them
    num_epochs: int = 1
    clip: float | None = None
    baseline: BaselineForm = BaselineForm.ema
    alpha: float = 0.9
    bias_correction: bool = False
    baseline_update: BaselineUpdate = BaselineUpdate.after

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all members together."""
        return self.I * self.M * self.T

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_counts("I", "M", "T")
        for key in ("mu", "eta", "output_eta"):
            self.check_range(key, 0.0, 1.0)
        for value in self.front:
            if not 0.0 <= value <= 1.0:
                raise bad_value("algo.front", self.front, "numbers from 0 to 1")
        if self.train.patience is not None:
            raise bad_value(
                "algo.train.patience", self.train.patience, "null, because members take all their steps"
            )
        if self.train.select.value != "last":
            raise bad_value(
                "algo.train.select", self.train.select.value, "last, because what is merged are the members' ends"
            )
        if self.inner is Inner.rloo and self.k < 2:
            raise bad_value("algo.k", self.k, "at least 2 for algo.inner=rloo")
        self.member().check()

    def check_others(self, kl: KlSettings, peft: str) -> None:
        """Raises RequestError for weights that have no average: an adapter's model has wider layers than its base."""
        self.member().check_others(kl, peft)
        if peft == "adapter":
            raise bad_value(
                "peft", peft, "none, lora or last_layer, because algo=warp averages weights of one shape"
            )

    def running_scale_problem(self) -> str | None:
        """Each member has a scale of its own."""
        if self.merge is Merge.none:
            return "algo.merge=none compares members, and their rewards would be on different scales"
        return super().running_scale_problem()

    def shared_counts(self, pairs_share_prompt: bool) -> dict[str, tuple[int, int]]:
        """Those of a member: all processes train one member together."""
        return self.member().shared_counts(pairs_share_prompt)

    def member(self) -> OnlineAlgorithm:
        """What one member runs."""
        shared: dict[str, Any] = {
            "beta": self.beta,
            "eval_prompts": self.eval_prompts,
            "train": replace(self.train, steps=self.T),
            "k": self.k,
            "rollout_batch_size": self.rollout_batch_size,
            "num_epochs": self.num_epochs,
            "clip": self.clip,
        }
        if self.inner is Inner.rloo:
            return Rloo(**shared)
        return Reinforce(
            **shared,
            baseline=self.baseline,
            alpha=self.alpha,
            bias_correction=self.bias_correction,
            baseline_update=self.baseline_update,
        )
