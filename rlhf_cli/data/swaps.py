"""Label noise: the preferred and the dispreferred completion of some training pairs are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlhf_cli.data.reviews_grammar import Draws
from rlhf_cli.data.rows import Drawn, is_drawn, rows_of_epoch
from rlhf_cli.types import Preference

# Key of the generator; it never changes.
_STREAM = 104


def with_swaps(pairs: Sequence[Preference], rate: float, seed: int) -> Sequence[Preference]:
    """The pairs, each exchanged with probability `rate`; at rate 0 they themselves.

    Whether a pair is exchanged is a function of (seed, its number) alone; pairs that are drawn anew in each epoch are
    numbered through. A pair that the data has exchanged already goes back where it is drawn again.
    """
    if rate == 0.0:
        return pairs
    n = len(pairs)

    def pair(number: int) -> Preference:
        row = rows_of_epoch(pairs, number // n)[number % n]
        return swapped(row) if Draws(seed, _STREAM, number).uniform() < rate else row

    return Drawn(n, pair) if is_drawn(pairs) else [pair(number) for number in range(n)]


def swapped(pair: Preference) -> Preference:
    """The pair with its completions exchanged."""
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen, swapped=not pair.swapped)
