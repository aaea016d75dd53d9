"""GRPO: the prompt's samples compared with each other, in units of their spread.

    loss = -(1/N) sum_i A_i * log pi(y_i|x_i),   A_i = (R_i - mean R) / (std R + 1e-4), over the k samples of a prompt

Shao et al. 2024 (arXiv 2402.03300), section 4.1.2. R is the KL-shaped reward. Departures: the ratio and its clip are
those of whole completions, as for the other algorithms with one action per completion; a step is divided by its
sequences, and not each of them by its length; the KL is where `kl.placement` puts it (published: in the loss, as k3 of
every token).
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

# Of the published code: groups of almost equal rewards are not blown up.
_EPSILON = 1e-4


@dataclass
class Grpo(OnlineAlgorithm):
    """algo=grpo."""

    name: str = "grpo"
    k: int = 4

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        if self.k < 2:
            raise bad_value("algo.k", self.k, "at least 2: GRPO compares a prompt's samples with each other")
        super().check()
        self.check_clip_has_a_use()

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """Distance from the group's mean in its standard deviations (of a sample: over k - 1)."""
        reward = experience.shaped_reward
        # exactly 0 for equal rewards, which a difference of means is not
        distance = ops.advantages.leave_one_out(reward, self.k) * (self.k - 1) / self.k
        spread = reward.view(-1, self.k).std(dim=1).repeat_interleave(self.k)
        return Advantages(distance / (spread + _EPSILON), state, {"baseline": float(reward.mean())})

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """See `sequence_policy_loss`."""
        logprob = tokens.sequence_logprob()
        return sequence_policy_loss(logprob, batch, normaliser, on_policy=self.on_policy, clip=self.clip)
