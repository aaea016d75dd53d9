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

from torch import Tensor

from rlhf_cli.algos.base import Advantages, BaselineState
from rlhf_cli.algos.sequence_loss import sequence_policy_loss
from rlhf_cli.ops.advantages import ema_baseline, ema_bias_correction, mean_baseline
from rlhf_cli.types import LossOutput, PolicyBatch


@dataclass(frozen=True)
class Reinforce:
    """REINFORCE's hyperparameters and its two methods."""

    samples_per_prompt: int = 1
    beta: float = 0.1
    baseline: str = "ema"  # ema | mean
    alpha: float = 0.9  # how much of the old baseline stays (ema)
    bias_correction: bool = False  # ema only
    baseline_update: str = "after"  # after | before
    on_policy: bool = True
    clip: float | None = None

    def advantages(self, shaped_reward: Tensor, state: BaselineState) -> Advantages:
        """R_i - b, with b updated once per optimizer batch; see the header for the order."""
        after = self._updated(state, float(shaped_reward.mean()))
        value = self._value(after if self.baseline_update == "before" else state)
        return Advantages(shaped_reward - value, after, {"baseline": value})

    def loss(self, logprob: Tensor, batch: PolicyBatch, normaliser: float) -> LossOutput:
        """See `sequence_policy_loss`."""
        return sequence_policy_loss(logprob, batch, normaliser, on_policy=self.on_policy, clip=self.clip)

    def _updated(self, state: BaselineState, batch_mean: float) -> BaselineState:
        if self.baseline == "ema":
            value = ema_baseline(state.value, batch_mean, self.alpha)
        else:
            value = mean_baseline(state.value, batch_mean, state.num_updates)
        return BaselineState(value, state.num_updates + 1)

    def _value(self, state: BaselineState) -> float:
        if self.baseline == "ema" and self.bias_correction:
            return ema_bias_correction(state.value, self.alpha, state.num_updates)
        return state.value
