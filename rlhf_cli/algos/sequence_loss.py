"""The loss that algorithms with one action per completion share."""

from __future__ import annotations

from torch import Tensor

from rlhf_cli.ops.policy_losses import clipped_fraction, ratio_loss, score_function_loss, sequence_ratio
from rlhf_cli.types import LossOutput, PolicyBatch


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
    if on_policy:
        loss = score_function_loss(logprob, batch.advantage, normaliser)
    else:
        loss = ratio_loss(logprob, batch.old_logprob, batch.advantage, normaliser, clip)
    ratio = sequence_ratio(logprob.detach(), batch.old_logprob)
    share = len(batch) / normaliser
    return LossOutput(
        loss=loss,
        metrics={
            "ratio/mean": ratio.sum() / normaliser,
            "ratio/clip_frac": clipped_fraction(ratio, batch.advantage, clip) * share,
        },
        maxima={"ratio/max": ratio.max()},
    )
