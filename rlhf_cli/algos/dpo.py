"""DPO: the policy is its own reward model, fitted to pairs by a classification loss.

    h = [log pi(y+|x) - log ref(y+|x)] - [log pi(y-|x) - log ref(y-|x)]
    dpo  -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
    ipo  (h - 1/(2 beta))^2

Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; IPO of Azar et al. 2023 (arXiv 2310.12036), eq. 17. Where the data has
no two completions of one prompt, pairs are made of the SFT model's own samples, as in the DPO paper's experiment on
IMDb: k of each prompt, ranked by a reward, every two of them a pair unless they tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from rlhf_cli import ops
from rlhf_cli.algos.preference import PreferenceAlgorithm
from rlhf_cli.errors import bad_value
from rlhf_cli.types import LossOutput

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_cli.ops.logprobs import TokenLogprobs


class PairLoss(Enum):
    """What h is fed to."""

    dpo = "dpo"
    ipo = "ipo"


@dataclass
class Dpo(PreferenceAlgorithm):
    """algo=dpo."""

    name: str = "dpo"
    loss: PairLoss = PairLoss.dpo
    label_smoothing: float = 0.0  # eps: how likely a label is taken to be wrong
    length_normalised: bool = False  # log-ratios per token instead of per completion

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if self.beta <= 0:
            raise bad_value("algo.beta", self.beta, "a number > 0")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise bad_value("algo.label_smoothing", self.label_smoothing, "a number from 0 to below 0.5")
        if self.label_smoothing and self.loss is PairLoss.ipo:
            raise bad_value("algo.label_smoothing", self.label_smoothing, "0, because algo.loss=ipo has none")

    def pair_loss(
        self,
        chosen: TokenLogprobs,
        rejected: TokenLogprobs,
        ref_chosen: Tensor,
        ref_rejected: Tensor,
        normaliser: float,
    ) -> LossOutput:
        """`loss` of the log-ratios; rewards are beta times these."""
        losses = ops.preference_losses
        logps, entropies, ratios = [], [], []
        for tokens, ref in ((chosen, ref_chosen), (rejected, ref_rejected)):
            logprob = tokens.sequence_logprob()
            num_tokens = tokens.mask.sum(-1) if self.length_normalised else None
            ratios.append(losses.log_ratio(logprob, ref, num_tokens))
            logps.append(logprob.detach().sum() / normaliser)
            entropies.append(tokens.mean_entropy().sum() / normaliser)
        if self.loss is PairLoss.dpo:
            loss = losses.dpo_loss(ratios[0], ratios[1], normaliser, self.beta, self.label_smoothing)
        else:
            loss = losses.ipo_loss(ratios[0], ratios[1], normaliser, self.beta)
        rewards = [self.beta * ratio.detach() for ratio in ratios]
        return LossOutput(
            loss=loss,
            metrics={
                "dpo/accuracy": losses.wins(rewards[0] - rewards[1]) / normaliser,
                "dpo/margin": (rewards[0] - rewards[1]).sum() / normaliser,
                "dpo/chosen_reward": rewards[0].sum() / normaliser,
                "dpo/rejected_reward": rewards[1].sum() / normaliser,
                "logps/chosen": logps[0],
                "logps/rejected": logps[1],
                "entropy": 0.5 * (entropies[0] + entropies[1]),
            },
        )
