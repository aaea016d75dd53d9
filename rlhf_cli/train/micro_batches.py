"""The parts of an optimizer batch that pass through the model together. Their gradients add up to that of the whole."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_cli.settings import TrainSettings


def micro_batches(lengths: Sequence[int], settings: TrainSettings) -> list[slice]:
    """Where a batch is cut: as many rows as fit both limits, in order.

    Tokens are counted as they are, because the passes have no padding (`rlhf_cli.models.packing`): long rows go through
    few at a time, short ones many.

    Args:
        lengths: tokens of each row (of both completions of a pair), prompt and completion.
        settings: `micro_batch_size` and `micro_batch_tokens`; without them as many rows as an optimizer batch has.

    >>> micro_batches([5, 5, 9, 2, 2], TrainSettings(micro_batch_tokens=10))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None)]
    """
    max_rows = settings.micro_batch_size or settings.batch_size
    parts, start, tokens = list[slice](), 0, 0
    for row, length in enumerate(lengths):
        too_long = settings.micro_batch_tokens is not None and tokens + length > settings.micro_batch_tokens
        if row > start and (row - start == max_rows or too_long):
            parts.append(slice(start, row))
            start, tokens = row, 0
        tokens += length
    return [*parts, slice(start, len(lengths))] if lengths else []
