"""The embedded data: a seeded grammar of short film reviews with a known gold reward.

An opening is the prompt, a continuation the completion: the text is `prompt + completion`, lower case, words
and punctuation separated by single spaces. A row is a pure function of (seed, split, row number), drawn from
a counter-based generator of its own, so that another size of a split leaves all other rows as they are, and
another temperature or swap rate changes labels alone.

    sft     train, validation        all words; one continuation per opening
    pairs   train, validation, test  without the held-out words
            ood                      held-out kinds of film, aspects and adjectives only
    prompts train, test              without the held-out kinds;  ood: held-out kinds only

Openings of test and ood, of validation and of train are disjoint sets (`opening_split`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_cli.data.reviews_gold import GOLD_BOUND, gold_reward
from rlhf_cli.data.reviews_grammar import (
    EVERYTHING,
    HELD_OUT,
    MAX_COMPLETION_WORDS,
    MAX_PROMPT_WORDS,
    SEEN,
    Draws,
    Lexicon,
    all_words,
    draw_continuation,
    draw_opening,
)
from rlhf_cli.errors import bad_choice, bad_value
from rlhf_cli.types import Example, Preference

__all__ = [
    "GENERATOR_VERSION",
    "GOLD_BOUND",
    "MAX_COMPLETION_WORDS",
    "MAX_PROMPT_WORDS",
    "ReviewsSpec",
    "gold_reward",
    "preference_pairs",
    "prompts",
    "sft_examples",
    "vocabulary",
]

GENERATOR_VERSION = 1  # raised when the rows for a given spec change


@dataclass(frozen=True)
class ReviewsSpec:
    """What the rows are a function of. Raises RequestError for a value out of range."""

    seed: int = 0
    num_sft: int = 4000
    num_pairs: int = 2000
    num_validation: int = 200  # sft rows and pairs each
    num_test: int = 500  # test pairs, ood pairs, and test prompts each
    num_prompts: int = 4000  # training prompts for rollouts
    label_temperature: float = 1.0
    swap_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise bad_value("data.seed", self.seed, "an integer from 0 to 2^63 - 1")
        for name in ("num_sft", "num_pairs", "num_validation", "num_test", "num_prompts"):
            if getattr(self, name) < 1:
                raise bad_value(f"data.{name}", getattr(self, name), "an integer of at least 1")
        if not (self.label_temperature > 0 and math.isfinite(self.label_temperature)):
            raise bad_value("data.label_temperature", self.label_temperature, "a finite number above 0")
        if not 0 <= self.swap_rate <= 1:
            raise bad_value("data.swap_rate", self.swap_rate, "a probability from 0 to 1")


@dataclass(frozen=True)
class _Split:
    """Where the rows of a split come from; `stream` is the generator's key and never changes."""

    stream: int
    openings: str
    lexicon: Lexicon
    size: str  # field of ReviewsSpec


_SFT = {
    "train": _Split(0, "train", EVERYTHING, "num_sft"),
    "validation": _Split(1, "validation", EVERYTHING, "num_validation"),
}
_PAIRS = {
    "train": _Split(2, "train", SEEN, "num_pairs"),
    "validation": _Split(3, "validation", SEEN, "num_validation"),
    "test": _Split(4, "test", SEEN, "num_test"),
    "ood": _Split(5, "test", HELD_OUT, "num_test"),
}
_PROMPTS = {
    "train": _Split(6, "train", SEEN, "num_prompts"),
    "test": _Split(7, "test", SEEN, "num_test"),
    "ood": _Split(8, "test", HELD_OUT, "num_test"),
}


def _split(splits: dict[str, _Split], name: str) -> _Split:
    if name not in splits:
        raise bad_choice("data.split", name, splits)
    return splits[name]


def sft_examples(spec: ReviewsSpec, split: str) -> list[Example]:
    """Openings with one continuation each, the held-out words among them; split "train" or "validation"."""
    source = _split(_SFT, split)
    examples = []
    for row in range(getattr(spec, source.size)):
        draws = Draws(spec.seed, source.stream, row)
        opening, kind = draw_opening(draws, source.lexicon, source.openings)
        examples.append(Example(opening, draw_continuation(draws, source.lexicon, kind)))
    return examples


def preference_pairs(spec: ReviewsSpec, split: str) -> list[Preference]:
    """Openings with two different continuations and a label; split "train", "validation", "test" or "ood".

    The label is a draw from the Bradley-Terry model of the gold rewards:

        P(first is chosen) = sigmoid((gold(first) - gold(second)) / label_temperature)

    In the train split `swap_rate` is the probability that chosen and rejected are then exchanged, which marks
    the pair as `swapped`.
    """
    source = _split(_PAIRS, split)
    swap_rate = spec.swap_rate if split == "train" else 0.0
    return [_pair(spec, source, swap_rate, row) for row in range(getattr(spec, source.size))]


def _pair(spec: ReviewsSpec, source: _Split, swap_rate: float, row: int) -> Preference:
    draws = Draws(spec.seed, source.stream, row)
    # the numbers that decide the label come first, so that neither depends on how many words were drawn
    label, swap = draws.uniform(), draws.uniform()
    opening, kind = draw_opening(draws, source.lexicon, source.openings)
    first = draw_continuation(draws, source.lexicon, kind)
    second = draw_continuation(draws, source.lexicon, kind)
    while second == first:
        second = draw_continuation(draws, source.lexicon, kind)
    logit = (gold_reward(opening, first) - gold_reward(opening, second)) / spec.label_temperature
    first_wins = label < 0.5 * (1 + math.tanh(logit / 2))  # the sigmoid, without overflow
    swapped = swap < swap_rate
    chosen, rejected = (first, second) if first_wins != swapped else (second, first)
    return Preference(opening, chosen, rejected, swapped=swapped)


def prompts(spec: ReviewsSpec, split: str) -> list[str]:
    """Openings for rollouts; split "train", "test" or "ood"."""
    source = _split(_PROMPTS, split)
    return [
        draw_opening(Draws(spec.seed, source.stream, row), source.lexicon, source.openings)[0]
        for row in range(getattr(spec, source.size))
    ]


def vocabulary() -> list[str]:
    """Every word and punctuation token that the grammar can produce, sorted."""
    return sorted(all_words())
