"""Rows that pass through a model together."""

from __future__ import annotations

from collections.abc import Sequence


def cut(lengths: Sequence[int], max_rows: int, max_tokens: int | None = None) -> list[slice]:
    """Where rows are cut into passes: as many as fit both limits, in order.

    Tokens are counted as they are, because the passes have no padding (`rlhf_cli.models.packing`): long rows go through
    few at a time, short ones many.

    Args:
        lengths: tokens of each row (of both completions of a pair), prompt and completion.
        max_rows: of a pass.
        max_tokens: of a pass, a longer row alone; None = any number.

    >>> cut([5, 5, 9, 2, 2], 32, 10)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None)]
    """
    parts, start, tokens = list[slice](), 0, 0
    for row, length in enumerate(lengths):
        too_long = max_tokens is not None and tokens + length > max_tokens
        if row > start and (row - start == max_rows or too_long):
            parts.append(slice(start, row))
            start, tokens = row, 0
        tokens += length
    return [*parts, slice(start, len(lengths))] if lengths else []
