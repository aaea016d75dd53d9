"""Vanilla policy gradient: every token is an action, with a learned value as baseline.

    loss = -(1/n) sum_t (G_t - V(s_t)) * log pi(y_t|x, y_<t)  +  c * value loss,   n tokens

Sutton et al. 2000, theorem 1; as in the comparison of Ahmadian et al. 2024 (arXiv 2402.14740). G_t is the return-to-go
of the rewards of tokens: -beta times the log-ratio of each, and the completion's reward at its last one. It is PPO at
lambda = 1 and gamma = 1 without the ratio and its clip.
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
class VanillaPg(ActorCriticAlgorithm):
    """algo=vanilla_pg."""

    name: str = "vanilla_pg"

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if not self.on_policy:
            key = "num_epochs" if self.num_epochs > 1 else "rollout_batch_size"
            raise bad_value(
                f"algo.{key}",
                getattr(self, key),
                "one step per rollout, because there is no ratio to correct for old samples (algo=ppo has one)",
            )
        if self.clip is not None:
            raise bad_value("algo.clip", self.clip, "null, because there is no ratio to clip")

    def advantages(self, experience: Experience, state: BaselineState) -> Advantages:
        """G_t - V(s_t)."""
        reward, value, mask = experience.token_reward, experience.value, experience.mask
        assert reward is not None and value is not None and mask is not None
        returns = ops.gae.returns_to_go(reward, mask)
        advantage = ops.masks.zero_outside(returns - value, mask)
        if self.whiten:
            advantage = ops.gae.whiten(advantage, mask)
        return Advantages(advantage, state, ops.gae.value_metrics(value, returns, mask), value_target=returns)

    def loss(
        self, tokens: TokenLogprobs, value: Tensor | None, batch: PolicyBatch, normaliser: float
    ) -> LossOutput:
        """The policy's loss and the critic's."""
        old_value, target = batch.old_value, batch.value_target
        assert value is not None and old_value is not None and target is not None
        losses = ops.policy_losses
        policy = losses.token_score_function_loss(tokens.logprob, batch.advantage, tokens.mask, normaliser)
        critic = losses.value_loss(value, old_value, target, tokens.mask, normaliser, clip=None)
        return LossOutput(policy + self.value_coef * critic, {"value/loss": critic.detach()})
