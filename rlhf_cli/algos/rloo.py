"""RLOO: REINFORCE whose baseline is the mean reward of the prompt's other samples.

    loss = -(1/N) sum_i A_i * log pi(y_i|x_i),   A_i = R_i - mean_{j != i} R_j

Ahmadian et al. 2024 (arXiv 2402.14740), eq. 7. R is the KL-shaped reward. Advantages are not whitened.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_cli.algos.base import Advantages, BaselineState
from rlhf_cli.algos.sequence_loss import sequence_policy_loss
from rlhf_cli.ops.advantages import leave_one_out
from rlhf_cli.types import LossOutput, PolicyBatch


@dataclass(frozen=True)
class Rloo:
    """RLOO's hyperparameters and its two methods."""

    samples_per_prompt: int = 4
    beta: float = 0.1
    on_policy: bool = True
    clip: float | None = None

    def advantages(self, shaped_reward: Tensor, state: BaselineState) -> Advantages:
        """Leave-one-out advantages; `baseline` is reported as the mean of what was subtracted."""
        advantage = leave_one_out(shaped_reward, self.samples_per_prompt)
        return Advantages(advantage, state, {"baseline": float((shaped_reward - advantage).mean())})

    def loss(self, logprob: Tensor, batch: PolicyBatch, normaliser: float) -> LossOutput:
        """See `sequence_policy_loss`."""
        return sequence_policy_loss(logprob, batch, normaliser, on_policy=self.on_policy, clip=self.clip)
