"""RLOO: REINFORCE whose baseline is the mean reward of the prompt's other samples.

    loss = -(1/N) sum_i A_i * log pi(y_i|x_i),   A_i = R_i - mean_{j != i} R_j

Ahmadian et al. 2024 (arXiv 2402.14740), eq. 7. R is the KL-shaped reward. Advantages are not whitened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli import ops
from rlhf_cli.algos.base import Advantages, BaselineState, OnlineAlgorithm
from rlhf_cli.algos.sequence_loss import sequence_policy_loss
from rlhf_cli.errors import bad_value

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import Experience, LossOutput, PolicyBatch


@dataclass
class Rloo(OnlineAlgorithm):
    """algo=rloo."""

    name: str = "rloo"
    k: int = 4

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        if self.k < 2:
            raise bad_value("algo.k", self.k, "at least 2: RLOO's baseline is the mean of the other samples")
        super().check()
        self.check_clip_has_a_use()

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """Leave-one-out advantages; `baseline` is reported as the mean of what was subtracted."""
        reward = experience.shaped_reward
        advantage = ops.advantages.leave_one_out(reward, self.k)
        return Advantages(advantage, state, {"baseline": float((reward - advantage).mean())})

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """See `sequence_policy_loss`."""
        logprob = tokens.sequence_logprob()
        return sequence_policy_loss(logprob, batch, normaliser, on_policy=self.on_policy, clip=self.clip)
