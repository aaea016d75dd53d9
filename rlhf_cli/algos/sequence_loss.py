"""The loss that algorithms with one action per completion share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cli import ops
from rlhf_cli.types import LossOutput, PolicyBatch

if TYPE_CHECKING:
    from torch import Tensor


def sequence_policy_loss(
    logprob: Tensor, batch: PolicyBatch, normaliser: float, *, on_policy: bool, clip: float | None
) -> LossOutput:
    """Score-function loss when the batch is the policy's own, the ratio form when several steps reuse a rollout.

    Args:
        logprob: float32 [N], with gradient.
        batch: N rows.
        normaliser: number of sequences in the whole optimizer step.
        on_policy: True when every rollout serves exactly one optimizer step.
        clip: epsilon of the ratio's clip; None leaves it alone.
    """
    losses = ops.policy_losses
    if on_policy:
        loss = losses.score_function_loss(logprob, batch.advantage, normaliser)
    else:
        loss = losses.ratio_loss(logprob, batch.old_logprob, batch.advantage, normaliser, clip)
    ratio = losses.sequence_ratio(logprob.detach(), batch.old_logprob)
    share = len(batch) / normaliser
    return LossOutput(
        loss=loss,
        metrics={
            "ratio/mean": ratio.sum() / normaliser,
            "ratio/clip_frac": losses.clipped_fraction(ratio, batch.advantage, clip) * share,
        },
        maxima={"ratio/max": ratio.max()},
    )
