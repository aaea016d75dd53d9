"""The words of the film reviews and the grammar that draws openings and continuations from them.

    opening       when who saw "a" look kind "film" "and"  |  who saw "a" look kind "film" "by" name "and"
    continuation  clause (link clause){1,3} "." [[lead] verdict "."]
    clause        "the" aspect verb [intensifier] adjective
    link          "and" (same sentiment) | "but" (opposite sentiment) | ","

Every adjective has a grade from -2 to +2, every verdict too. A latent quality of the review moves the grades
of its clauses together, and the verdict follows the clauses, so that the sentiment of a word can be learnt
from the company it keeps. A quarter of the continuations are weak: an aspect or an adjective said twice, no
opinion, no verdict.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TypeVar

import numpy as np

T = TypeVar("T")

WHEN = (
    "today", "yesterday", "last night", "last week", "this morning", "on friday", "on saturday",
    "on sunday", "in april", "in winter", "after dinner", "after work", "at noon", "at home",
)  # fmt: skip
WHO = ("i", "we", "they", "my sister", "my brother", "our neighbours", "two friends", "the children")
SAW = ("watched", "saw", "rented", "borrowed", "found", "tried")
LOOK = (
    "small", "big", "new", "old", "long", "short", "french", "danish", "silent", "famous", "foreign",
    "recent", "modest", "costly",
)  # fmt: skip
NAMES = ("okafor", "lindqvist", "moretti", "hansen", "tanaka", "duarte", "novak", "reyes")

KINDS = (
    "heist", "horror", "comedy", "family", "romance", "war", "crime", "space", "road", "action",
    "western", "spy",
)  # fmt: skip
HELD_OUT_KINDS = ("pirate", "vampire", "courtroom", "arctic")

ASPECTS = (
    "acting", "plot", "music", "ending", "dialogue", "cast", "pacing", "script", "lighting", "scenery",
    "directing", "story",
)  # fmt: skip
HELD_OUT_ASPECTS = ("editing", "soundtrack", "humour", "choreography", "photography")

Grades = dict[int, tuple[str, ...]]
ADJECTIVES: Grades = {
    2: (
        "superb",
        "brilliant",
        "wonderful",
        "masterful",
        "stunning",
        "magnificent",
        "outstanding",
        "glorious",
    ),
    1: ("good", "solid", "pleasant", "clever", "warm", "fresh", "lively", "graceful"),
    0: ("ordinary", "average", "plain", "usual", "unremarkable"),
    -1: ("dull", "weak", "flat", "slow", "thin", "clumsy", "stale", "tired"),
    -2: ("awful", "terrible", "dreadful", "horrible", "atrocious", "unbearable", "disastrous", "wretched"),
}
HELD_OUT_ADJECTIVES: Grades = {
    2: ("exquisite", "dazzling", "flawless", "breathtaking"),
    1: ("charming", "neat", "vivid", "crisp"),
    0: ("standard", "typical", "middling", "conventional"),
    -1: ("bland", "messy", "stiff", "muddled"),
    -2: ("abysmal", "appalling", "hideous", "dismal"),
}

# Adjectives that praise (+2) some kinds of film and blame (-1) all others.
TASTES: dict[str, frozenset[str]] = {
    "frightening": frozenset({"horror", "vampire"}),
    "funny": frozenset({"comedy", "family"}),
    "tense": frozenset({"heist", "crime", "spy", "courtroom"}),
    "tender": frozenset({"romance", "family"}),
    "loud": frozenset({"action", "war", "pirate"}),
    "lonely": frozenset({"western", "road", "space", "arctic"}),
}
TASTE_WANTED, TASTE_UNWANTED = 2, -1

VERBS = ("was", "felt", "seemed", "stayed")
INTENSIFIERS = {
    "very": 0.5,
    "truly": 0.5,
    "remarkably": 0.5,
    "rather": -0.5,
    "fairly": -0.5,
    "somewhat": -0.5,
}
STRONG, WEAK = ("very", "truly", "remarkably"), ("rather", "fairly", "somewhat")
LINKS = ("and", "but", ",")
STOP = "."

LEADS = ("overall", "in short", "all in all")
VERDICTS: Grades = {
    2: ("it is a triumph", "we loved every minute", "do not miss it"),
    1: ("it is worth the ticket", "we enjoyed it", "do give it a chance"),
    0: ("it passes the time", "we have no strong opinion", "do wait for television"),
    -1: ("it is not worth the ticket", "we looked at the clock", "it left us cold"),
    -2: ("it is a disaster", "we hated every minute", "do not waste the money"),
}

MAX_PROMPT_WORDS = 10
MAX_COMPLETION_WORDS = 34  # punctuation included

_NORMAL = NormalDist()


class Draws:
    """Uniform numbers of one row: a pure function of (seed, stream, row), from Philox's raw output.

    The raw output of a NumPy bit generator is fixed for good; the methods of `Generator` may change.
    """

    def __init__(self, seed: int, stream: int, row: int) -> None:
        self._bits = np.random.Philox(
            key=np.array([seed, stream], np.uint64), counter=np.array([0, row, 0, 0], np.uint64)
        )
        self._pool: list[int] = []

    def uniform(self) -> float:
        """The next number, strictly between 0 and 1."""
        if not self._pool:
            self._pool = self._bits.random_raw(48)[::-1].tolist()
        return ((self._pool.pop() >> 12) + 0.5) * 2.0**-52

    def normal(self) -> float:
        """The next standard normal number."""
        return _NORMAL.inv_cdf(self.uniform())

    def choice(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        return items[int(self.uniform() * len(items))]

    def weighted(self, items: Sequence[tuple[T, float]]) -> T:
        """One of (item, probability); the last takes what rounding leaves."""
        u = self.uniform()
        for item, probability in items[:-1]:
            u -= probability
            if u < 0:
                return item
        return items[-1][0]


@dataclass(frozen=True)
class Lexicon:
    """The words that a split may use where splits differ."""

    kinds: tuple[str, ...]
    aspects: tuple[str, ...]
    adjectives: Grades
    tastes: tuple[str, ...]


SEEN = Lexicon(KINDS, ASPECTS, ADJECTIVES, tuple(TASTES))
HELD_OUT = Lexicon(HELD_OUT_KINDS, HELD_OUT_ASPECTS, HELD_OUT_ADJECTIVES, ())
EVERYTHING = Lexicon(
    KINDS + HELD_OUT_KINDS,
    ASPECTS + HELD_OUT_ASPECTS,
    {grade: ADJECTIVES[grade] + HELD_OUT_ADJECTIVES[grade] for grade in ADJECTIVES},
    tuple(TASTES),
)


def opening_split(opening: str) -> str:
    """The only split that may use an opening: "test" 10%, "validation" 10%, "train" 80%.

    A function of the text alone, so that no opening of one split is met in another, whatever seeds and sizes.
    """
    return {0: "test", 1: "validation"}.get(zlib.crc32(opening.encode()) % 10, "train")


def draw_opening(draws: Draws, lexicon: Lexicon, split: str) -> tuple[str, str]:
    """An opening that belongs to the split, and the kind of film it names."""
    while True:
        who, saw, look = draws.choice(WHO), draws.choice(SAW), draws.choice(LOOK)
        kind = draws.choice(lexicon.kinds)
        if draws.uniform() < 0.6:
            opening = f"{draws.choice(WHEN)} {who} {saw} a {look} {kind} film and"
        else:
            opening = f"{who} {saw} a {look} {kind} film by {draws.choice(NAMES)} and"
        if opening_split(opening) == split:
            return opening, kind


def adjective_value(adjective: str, kind: str) -> float | None:
    """Grade of an adjective said of this kind of film ("" where unknown); None for any other word."""
    if adjective in TASTES:
        return float(TASTE_WANTED if kind in TASTES[adjective] else TASTE_UNWANTED)
    return _GRADE.get(adjective)


_GRADE = {word: float(grade) for grade, words in EVERYTHING.adjectives.items() for word in words}


def intensified(value: float, intensifier: str) -> float:
    """A grade moved away from 0 ("very") or towards it ("rather") by one half; 0 stays 0."""
    return value + INTENSIFIERS[intensifier] * ((value > 0) - (value < 0)) if intensifier else value


@dataclass(frozen=True)
class Clause:
    """What one clause says. `value` is its sentiment, -2.5 to +2.5."""

    aspect: str
    adjective: str
    value: float
    text: str


def _clause(draws: Draws, aspect: str, adjective: str, kind: str) -> Clause:
    grade = adjective_value(adjective, kind)
    assert grade is not None
    intensifier = ""
    if grade:
        group = draws.weighted(((STRONG, 0.25), (WEAK, 0.15), (("",), 0.6)))
        intensifier = draws.choice(group)
    words = ["the", aspect, draws.choice(VERBS), *([intensifier] if intensifier else []), adjective]
    return Clause(aspect, adjective, intensified(grade, intensifier), " ".join(words))


def _adjective(draws: Draws, lexicon: Lexicon, kind: str, grade: int, used: set[str]) -> str:
    """An unused adjective of this grade; at times one whose grade depends on the kind of film."""
    pool = [word for word in lexicon.adjectives[grade] if word not in used]
    special = [word for word in lexicon.tastes if word not in used and adjective_value(word, kind) == grade]
    return draws.choice(special if special and draws.uniform() < 0.3 else pool)


def _link(draws: Draws, before: Clause, after: Clause) -> str:
    product = before.value * after.value
    if product > 0:
        return draws.weighted((("and", 0.6), (",", 0.4)))
    if product < 0:
        return draws.weighted((("but", 0.75), (",", 0.25)))
    return draws.weighted((("and", 0.25), ("but", 0.25), (",", 0.5)))


def _grade(x: float) -> int:
    return max(-2, min(2, round(x)))


STYLES = (
    ("plain", 0.75),
    ("same aspect", 0.07),
    ("same adjective", 0.07),
    ("no verdict", 0.06),
    ("no opinion", 0.05),
)
QUALITY_MEAN, QUALITY_SD, CLAUSE_SD, VERDICT_SD = -0.5, 1.4, 0.6, 1.2


def draw_continuation(draws: Draws, lexicon: Lexicon, kind: str) -> str:
    """A continuation of an opening about this kind of film: starts with a space, ends with " ."."""
    style = draws.weighted(STYLES)
    quality = QUALITY_MEAN + QUALITY_SD * draws.normal()
    num_clauses = draws.weighted(((2, 0.35), (3, 0.4), (4, 0.25)))
    clauses: list[Clause] = []
    for position in range(num_clauses):
        last = position == num_clauses - 1
        spoken = {clause.aspect for clause in clauses}
        aspect = draws.choice([aspect for aspect in lexicon.aspects if aspect not in spoken])
        grade = 0 if style == "no opinion" else _grade(quality + CLAUSE_SD * draws.normal())
        adjective = _adjective(draws, lexicon, kind, grade, {clause.adjective for clause in clauses})
        if last and style == "same aspect":
            aspect = clauses[0].aspect
        if last and style == "same adjective":
            adjective = clauses[0].adjective
        clauses.append(_clause(draws, aspect, adjective, kind))
    words = [clauses[0].text]
    for before, after in pairwise(clauses):
        words += [_link(draws, before, after), after.text]
    words.append(STOP)
    if style != "no verdict":
        mean = sum(clause.value for clause in clauses) / num_clauses
        verdict = draws.choice(VERDICTS[_grade(mean + VERDICT_SD * draws.normal())])
        lead = draws.choice((*LEADS, ""))
        words += [f"{lead} {verdict}" if lead else verdict, STOP]
    return " " + " ".join(words)


def all_words() -> set[str]:
    """Every word and punctuation token that an opening or a continuation can have."""
    phrases = [*WHEN, *WHO, *SAW, *LOOK, *NAMES, *EVERYTHING.kinds, *EVERYTHING.aspects, *TASTES, *VERBS]
    phrases += [*INTENSIFIERS, *LINKS, STOP, *LEADS, "a film by and the"]
    phrases += [word for words in EVERYTHING.adjectives.values() for word in words]
    phrases += [verdict for verdicts in VERDICTS.values() for verdict in verdicts]
    return {word for phrase in phrases for word in phrase.split()}
