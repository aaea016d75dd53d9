"""Which prompts share a rectangle of the cache, and how wide and how high that is."""

from __future__ import annotations

import math
from collections.abc import Sequence


def split_lengths(lengths: Sequence[int], group_cost: float) -> list[list[int]]:
    """Prompts in groups of about one length, so that the longest of all does not set the width of all.

    A group is as wide as its longest prompt. Minimised is the sum of prompts x width, plus `group_cost` a group, by
    dynamic programming. Sorted by length, a cut may only lie 1, 2, 4, 8, ... prompts from the long end: groups are then
    of few different sizes, which lets CUDA graphs captured for them serve again.

    Args:
        lengths: of P prompts, in tokens.
        group_cost: of one more group, in columns of one prompt.

    Returns:
        Groups of prompt numbers, each and all together from short to long; no group is empty.

    >>> split_lengths([3, 40, 4, 3], 10.0)
    [[0, 3, 2], [1]]
    >>> split_lengths([3, 40, 4, 3], 200.0)
    [[0, 3, 2, 1]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    total = len(order)
    if total == 0:
        return []
    cuts = sorted({total - 2**i for i in range(total.bit_length()) if 2**i < total})
    ends = [0, *cuts, total]
    # Of the prompts before ends[j]: what they cost, and where the last of their groups begins
    best: list[tuple[float, int]] = [(0.0, 0)]
    for j in range(1, len(ends)):
        width = lengths[order[ends[j] - 1]]
        best.append(min((best[i][0] + (ends[j] - ends[i]) * width + group_cost, i) for i in range(j)))
    groups: list[list[int]] = []
    j = len(ends) - 1
    while j > 0:
        i = best[j][1]
        groups.append(order[ends[i] : ends[j]])
        j = i
    return groups[::-1]


def chunks(
    lengths: Sequence[int], samples_per_prompt: int, max_new_tokens: int, max_rows: int, max_tokens: int | None
) -> list[slice]:
    """Prompts that are decoded together, in their order; one prompt alone may be more than the budget.

    Args:
        lengths: of P prompts, in tokens.
        samples_per_prompt: k; the samples of a prompt stay together.
        max_new_tokens: most tokens of a completion.
        max_rows: samples of a chunk.
        max_tokens: tokens of a chunk, prompts (once for every sample) and completions; None = no limit.

    >>> chunks([2, 2, 9, 2], 2, 1, 100, 12)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    found: list[slice] = []
    start, rows, tokens = 0, 0, 0
    for i, length in enumerate(lengths):
        cost = samples_per_prompt * (length + max_new_tokens)
        is_full = rows + samples_per_prompt > max_rows or (max_tokens is not None and tokens + cost > max_tokens)
        if i > start and is_full:
            found.append(slice(start, i))
            start, rows, tokens = i, 0, 0
        rows, tokens = rows + samples_per_prompt, tokens + cost
    if len(lengths) > start:
        found.append(slice(start, len(lengths)))
    return found


def rows_to_keep(num_active: int, capacity: int, finished_share: float, multiple: int) -> int:
    """How many rows go on being computed: the lowest of a few sizes that has room for all that are not finished.

    The sizes are capacity, capacity * (1 - share), capacity * (1 - share)^2, ..., rounded up: few enough that a CUDA
    graph captured for one of them serves again.

    Args:
        num_active: rows that are not finished.
        capacity: rows at the start.
        finished_share: of the rows that are computed, at most this share is finished.
        multiple: sizes are multiples of it, but for the capacity.

    >>> [rows_to_keep(active, 10, 0.2, 1) for active in (10, 9, 8, 7, 1, 0)]
    [10, 10, 8, 7, 1, 0]
    """
    if num_active == 0:
        return 0
    kept, level = capacity, float(capacity)
    while level >= 1:
        level *= 1 - finished_share
        smaller = round_up(math.ceil(level), multiple)
        if smaller < num_active:
            break
        kept = min(kept, smaller)
    return kept


def round_up(number: int, multiple: int) -> int:
    """The next multiple.

    >>> round_up(17, 8), round_up(16, 8)
    (24, 16)
    """
    return -(-number // multiple) * multiple
