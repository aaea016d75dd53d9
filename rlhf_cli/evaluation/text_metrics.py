"""How varied texts are: distinct-n over several texts. Repetition inside one is a reward term, too: `rewards`.

Texts are sequences of words or tokens, compared by equality. An n-gram never crosses from one text into the
next.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.rewards.repetition import ngrams


def words(text: str) -> list[str]:
    """The words of a text: what white space separates."""
    return text.split()


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams / all n-grams of the texts together, in [0, 1] (Li et al. 2016).

    It falls as more text is pooled, so compare it over equally many texts of like length.
    Texts without any n-gram give 0: empty completions are not a varied set, and a policy that collapsed to
    them must not drop out of an average.
    """
    every = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(every)) / len(every) if every else 0.0


def distinct_n_per_prompt(
    completions: Sequence[str],
    samples_per_prompt: int,
    n: int,
    split: Callable[[str], Sequence[Hashable]] = words,
) -> NDArray[np.float64]:
    """distinct-n of the samples of each prompt together, float64 [P].

    Args:
        completions: P * samples_per_prompt texts, prompt-major: the samples of one prompt are neighbours.
        samples_per_prompt: k. With k = 1 this measures variety inside a completion only.
        n: length of the n-grams.
        split: text -> words or tokens.

    Raises:
        ValueError: the texts do not divide into groups of `samples_per_prompt`.
    """
    if samples_per_prompt < 1 or len(completions) % samples_per_prompt:
        raise ValueError(f"{len(completions)} completions are not groups of {samples_per_prompt}")
    texts = [split(completion) for completion in completions]
    starts = range(0, len(texts), samples_per_prompt)
    return np.array([distinct_n(texts[i : i + samples_per_prompt], n) for i in starts], dtype=np.float64)
