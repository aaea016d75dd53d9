"""The gold reward of a film review: the truth that the reward models of the embedded data approximate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlhf_cli.data.reviews_grammar import (
    EVERYTHING,
    INTENSIFIERS,
    LEADS,
    LINKS,
    STOP,
    VERBS,
    VERDICTS,
    adjective_value,
    intensified,
)

GOLD_BOUND = 4.0
MAX_CLAUSES = 4  # more than the grammar ever has is rambling
MAX_WORDS = 36
PARSED_WORDS = 120  # words beyond this many are neither parsed nor compared, only counted

SENTIMENT_COEF, SENTIMENT_SLOPE = 3.2, 0.6
COVERAGE_COEF = 0.4
AGREEMENT_COEF = 0.6
REPEATED_WORD_COEF, REPEATED_TRIGRAM_COEF = 0.5, 0.1
NO_VERDICT_COEF, UNFINISHED_COEF = 0.7, 1.0
EXTRA_CLAUSE_COEF, EXTRA_WORD_COEF = 0.6, 0.1
STRAY_COEF = 3.0

_ASPECTS, _VERBS, _LINKS = frozenset(EVERYTHING.aspects), frozenset(VERBS), frozenset(LINKS)
_KINDS = frozenset(EVERYTHING.kinds)
# First word -> the verdicts that start with it, longest first, each as its words and its grade.
_VERDICTS: dict[str, list[tuple[list[str], int]]] = {}
for _grade, _phrases in VERDICTS.items():
    for _phrase in _phrases:
        for _lead in ("", *LEADS):
            _words = f"{_lead} {_phrase}".split()
            _VERDICTS.setdefault(_words[0], []).append((_words, _grade))
for _entries in _VERDICTS.values():
    _entries.sort(key=lambda entry: -len(entry[0]))


@dataclass
class _Parse:
    """What the grammar finds in a text; `stray` counts the words that it has no place for."""

    aspects: list[str] = field(default_factory=list)
    adjectives: list[str] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    verdict: int | None = None
    stray: int = 0


def _film_kind(prompt: str) -> str:
    """The kind of the film that a prompt names last; "" if none."""
    words = prompt.split()
    for position in range(len(words) - 1, 0, -1):
        if words[position] == "film" and words[position - 1] in _KINDS:
            return words[position - 1]
    return ""


def _clause_at(words: list[str], start: int, kind: str) -> tuple[int, float]:
    """(number of words, value) of the clause at `start`; (0, 0.0) where there is none. `words` is padded."""
    if words[start + 1] not in _ASPECTS or words[start + 2] not in _VERBS:
        return 0, 0.0
    intensifier = words[start + 3] if words[start + 3] in INTENSIFIERS else ""
    length = 5 if intensifier else 4
    value = adjective_value(words[start + length - 1], kind)
    return (0, 0.0) if value is None else (length, intensified(value, intensifier))


def _verdict_at(words: list[str], start: int) -> tuple[int, int]:
    """(number of words, grade) of the verdict, lead included, at `start`; (1, 0) where there is none."""
    for phrase, grade in _VERDICTS[words[start]]:
        if words[start : start + len(phrase)] == phrase:
            return len(phrase), grade
    return 1, 0


def _parse(words: list[str], kind: str) -> _Parse:
    """Read the words from left to right; what the grammar has no place for is stray, and skipped."""
    found = _Parse()
    padded = [*words, "", "", "", ""]
    state = "start"  # start | clause | a link | stop (after the clauses) | verdict | end
    position = 0
    while position < len(words):
        word = words[position]
        length = 1
        if word == "the" and (clause := _clause_at(padded, position, kind))[0]:
            length, value = clause
            if state == "start" or state in _LINKS:
                # "but" joins opposites, "and" does not
                before = found.values[-1] if found.values else 0.0
                clash = (state == "and" and before * value < 0) or (state == "but" and before * value > 0)
                found.stray += clash
                found.aspects.append(words[position + 1])
                found.adjectives.append(words[position + length - 1])
                found.values.append(value)
                state = "clause"
            else:
                found.stray += length
        elif word in _LINKS and state == "clause":
            state = word
        elif word == STOP and state in ("clause", "verdict"):
            state = "stop" if state == "clause" else "end"
        elif word in _VERDICTS:
            length, grade = _verdict_at(words, position)
            if length > 1 and state == "stop":
                found.verdict, state = grade, "verdict"
            else:
                found.stray += length
        else:
            found.stray += 1
        position += length
    found.stray += state in _LINKS  # a link that joins nothing
    return found


def _repeats(items: list[str] | list[tuple[str, str, str]]) -> int:
    return len(items) - len(set(items))


def gold_reward(prompt: str, completion: str) -> float:
    """Quality of a review, within [-4, 4]: a pure function of the two texts, defined for any text.

        gold = clip( 3.2 tanh(0.6 m) + 0.4 (min(A, 3) - 2) + 0.6 g
                     - 0.5 (repeated aspects + repeated adjectives) - 0.1 (repeated word trigrams)
                     - 0.7 [no verdict] - 1.0 [the last word is not "."]
                     - 0.6 max(0, clauses - 4) - 0.1 max(0, words - 36) - 3 min(1, 2 U),  -4, 4)

    Words are what white space separates, "." and "," being words of their own (they may touch another). The
    grammar of `reviews_grammar` is read off the completion from left to right. s_i is the value of clause i:
    the grade of its adjective, -2 to +2, which for a few adjectives depends on the kind of film that the
    prompt names, one half further from 0 or nearer to it by an intensifier. With A the number of distinct
    aspects and v the grade of the verdict, counting only the first clause on an aspect,

        m = (sum_i s_i + v) / (max(A, 2) + 1)   v = 0 without a verdict; m = 0 without a clause
        g = 1 - |v - c| / 2                     c = mean s_i clipped to [-2, 2]; g = 0 without a verdict

    U is the share of words that have no place in the grammar: unknown words, a clause without a link before
    it, a link that joins nothing, "and" between opposite or "but" between like sentiments, anything after
    the verdict. U = 1 for a text without a clause: an empty one, a verdict alone. What follows the first 120
    words is stray.

    Worked by hand, after the prompt "we saw a small heist film and":

    1. " the acting was superb and the plot felt very clever but the music was dull . overall it is worth the
       ticket ."  s = 2, 1.5, -1 and v = 1: m = 3.5 / 4, 3.2 tanh(0.525) = 1.5410. A = 3: +0.4. c = 5/6,
       g = 11/12: +0.55. Sum: 2.4910.
    2. " the acting was awful and the acting was awful ."  s = -2: m = -2/3, 3.2 tanh(-0.4) = -1.2158. A = 1:
       -0.4. One aspect and one adjective again: -1. The trigrams "the acting was" and "acting was awful"
       again: -0.2. No verdict: -0.7. Sum: -3.5158.
    3. " the plot was tense , the cast"  tense praises a heist film, s = 2: m = 2/3, 3.2 tanh(0.4) = 1.2158.
       A = 1: -0.4. No verdict: -0.7. Unfinished: -1. Stray ", the cast", U = 3/7: -18/7. Sum: -3.4556.
    """
    words = completion.replace(",", " , ").replace(".", " . ").split()
    found = _parse(words[:PARSED_WORDS], _film_kind(prompt))
    stray = found.stray + max(0, len(words) - PARSED_WORDS)
    first: dict[str, float] = {}
    for aspect, value in zip(found.aspects, found.values, strict=True):
        first.setdefault(aspect, value)
    verdict = found.verdict or 0
    gold = COVERAGE_COEF * (min(len(first), 3) - 2)
    if first:
        mean = (sum(first.values()) + verdict) / (max(len(first), 2) + 1)
        gold += SENTIMENT_COEF * math.tanh(SENTIMENT_SLOPE * mean)
    if found.verdict is None:
        gold -= NO_VERDICT_COEF
    else:
        clauses = max(-2.0, min(2.0, sum(first.values()) / len(first)))
        gold += AGREEMENT_COEF * (1 - abs(verdict - clauses) / 2)
    trigrams = list(zip(words, words[1:PARSED_WORDS], words[2:PARSED_WORDS], strict=False))
    gold -= REPEATED_WORD_COEF * (_repeats(found.aspects) + _repeats(found.adjectives))
    gold -= REPEATED_TRIGRAM_COEF * _repeats(trigrams)
    gold -= UNFINISHED_COEF * (not words or words[-1] != STOP)
    gold -= EXTRA_CLAUSE_COEF * max(0, len(found.values) - MAX_CLAUSES)
    gold -= EXTRA_WORD_COEF * max(0, len(words) - MAX_WORDS)
    gold -= STRAY_COEF * min(1.0, 2 * stray / len(words) if first else 1.0)
    return max(-GOLD_BOUND, min(GOLD_BOUND, gold))
