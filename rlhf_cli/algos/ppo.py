"""PPO: every token is an action, with a clipped ratio to the policy that sampled and a learned value.

    loss = -(1/n) sum_t min(rho_t A_t, clip(rho_t, 1-eps, 1+eps) A_t)  +  c * value loss,   n tokens
    A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

Schulman et al. 2017 (arXiv 1707.06347), eq. 7; GAE of Schulman et al. 2016 (arXiv 1506.02438). r_t is -beta times the
token's log-ratio, and the completion's reward on top at its last one (the EOS, or where it was cut).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cli import ops
from rlhf_cli.algos.base import ActorCriticAlgorithm, Advantages, BaselineState
from rlhf_cli.errors import bad_value
from rlhf_cli.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs
    from rlhf_cli.types import Experience, PolicyBatch


@dataclass
class Ppo(ActorCriticAlgorithm):
    """algo=ppo."""

    name: str = "ppo"
    clip: float | None = 0.2
    num_epochs: int = 2
    gamma: float = 1.0  # discount per token
    lam: float = 0.95  # lambda of the advantages
    value_clip: float | None = 0.2  # how far a value may move from the old one, in units of the reward
    whiten: bool = True

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.check_range("gamma", 0.0, 1.0)
        self.check_range("lam", 0.0, 1.0)
        if self.value_clip is not None and not self.value_clip > 0:
            raise bad_value("algo.value_clip", self.value_clip, "a number > 0, or null")

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """Generalised advantages, whitened over the batch's tokens."""
        reward, value, mask = experience.token_reward, experience.value, experience.mask
        assert reward is not None and value is not None and mask is not None
        advantage, returns = ops.gae.generalised_advantages(reward, value, mask, lam=self.lam, gamma=self.gamma)
        if self.whiten:
            advantage = ops.gae.whiten(advantage, mask)
        return Advantages(advantage, state, ops.gae.value_metrics(value, returns, mask), value_target=returns)

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """The policy's clipped loss and the critic's."""
        old_logprob, old_value, target = batch.old_token_logprob, batch.old_value, batch.value_target
        assert value is not None and old_logprob is not None and old_value is not None and target is not None
        losses, mask = ops.policy_losses, tokens.mask
        policy = losses.clipped_ratio_loss(
            tokens.logprob, old_logprob, batch.advantage, mask, normaliser, self.clip
        )
        critic = losses.value_loss(value, old_value, target, mask, normaliser, self.value_clip)
        ratio = losses.token_ratio(tokens.logprob.detach(), old_logprob, mask)
        return LossOutput(
            loss=policy + self.value_coef * critic,
            metrics={
                "value/loss": critic.detach(),
                "ratio/mean": ops.masks.masked_sum(ratio, mask).sum() / normaliser,
                "ratio/clip_frac": losses.clipped_token_fraction(
                    ratio, batch.advantage, mask, normaliser, self.clip
                ),
            },
            maxima={"ratio/max": ratio.max()},
        )
