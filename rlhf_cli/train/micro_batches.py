"""The parts of an optimizer batch that pass through the model together. Their gradients add up to that of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.ops.cutting import cut
from rlhf_cli.settings import TrainSettings


def micro_batches(lengths: Sequence[int], settings: TrainSettings) -> list[slice]:
    """`cut` as the settings say; without a limit as many rows as an optimizer batch has.

    Args:
        lengths: tokens of each row (of both completions of a pair), prompt and completion.
        settings: `micro_batch_size` and `micro_batch_tokens`.

    >>> micro_batches([5, 5, 9], TrainSettings(batch_size=2))
    [slice(0, 2, None), slice(2, 3, None)]
    """
    return cut(lengths, settings.rows_of_pass, settings.micro_batch_tokens)
