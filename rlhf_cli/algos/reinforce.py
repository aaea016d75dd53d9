"""REINFORCE with a moving-average baseline; the whole completion is one action.

    loss = -(1/N) sum_i (R_i - b) * log pi(y_i|x_i)

Williams 1992; baseline forms: `ema` b <- alpha*b + (1-alpha)*mean(R) with b_0 = 0, and `mean`, the arithmetic mean
over all steps so far (Ahmadian et al. 2024, eq. 8). R is the KL-shaped reward.

`baseline_update="after"` uses the baseline of earlier steps, so the gradient is unbiased. "before" updates first, as
the published Algorithm 1 does: the baseline then contains the very rewards it is subtracted from, which scales the
expected gradient by 1 - (1-alpha)/N for `ema`, and by 1 - 1/(n*N) at step n for `mean` (nothing is left at the first
step of N = 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from rlhf_cli import ops
from rlhf_cli.algos.base import Advantages, BaselineState, OnlineAlgorithm
from rlhf_cli.algos.sequence_loss import sequence_policy_loss
from rlhf_cli.errors import bad_value

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import Experience, LossOutput, PolicyBatch


class BaselineForm(Enum):
    """The moving baseline."""

    ema = "ema"
    mean = "mean"


class BaselineUpdate(Enum):
    """Whether the batch's own rewards are in the baseline that is subtracted from them."""

    after = "after"
    before = "before"


@dataclass
class Reinforce(OnlineAlgorithm):
    """algo=reinforce."""

    name: str = "reinforce"
    baseline: BaselineForm = BaselineForm.ema
    alpha: float = 0.9  # how much of the old baseline stays (ema)
    bias_correction: bool = False  # ema only
    baseline_update: BaselineUpdate = BaselineUpdate.after

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_clip_has_a_use()
        if not 0.0 <= self.alpha < 1.0:
            raise bad_value("algo.alpha", self.alpha, "a number from 0 to below 1")

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """R_i - b, with b updated once per optimizer batch; see the header for the order."""
        reward = experience.shaped_reward
        after = self._updated(state, float(reward.mean()))
        value = self._value(after if self.baseline_update is BaselineUpdate.before else state)
        return Advantages(reward - value, after, {"baseline": value})

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """See `sequence_policy_loss`."""
        logprob = tokens.sequence_logprob()
        return sequence_policy_loss(logprob, batch, normaliser, on_policy=self.on_policy, clip=self.clip)

    def _updated(self, state: BaselineState, batch_mean: float) -> BaselineState:
        if self.baseline is BaselineForm.ema:
            value = ops.advantages.ema_baseline(state.value, batch_mean, self.alpha)
        else:
            value = ops.advantages.mean_baseline(state.value, batch_mean, state.num_updates)
        return BaselineState(value, state.num_updates + 1)

    def _value(self, state: BaselineState) -> float:
        if self.baseline is BaselineForm.ema and self.bias_correction:
            return ops.advantages.ema_bias_correction(state.value, self.alpha, state.num_updates)
        return state.value
