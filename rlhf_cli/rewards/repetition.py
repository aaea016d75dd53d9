"""Repetition inside a text: a sequence of words or tokens, compared by equality."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All n-grams of one text in order, max(0, len(tokens) - n + 1) of them; ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n={n}: expected at least 1")
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repetition_rate(tokens: Sequence[Hashable], n: int) -> float:
    """Share of the n-grams of one text that have already occurred in it, in [0, 1).

    1 - different / all. A text without any n-gram gives 0: nothing in it repeats.
    """
    every = ngrams(tokens, n)
    return 1 - len(set(every)) / len(every) if every else 0.0
