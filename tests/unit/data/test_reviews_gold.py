import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.data.reviews import vocabulary
from rlhf_cli.data.reviews_gold import GOLD_BOUND, gold_reward
from rlhf_cli.data.reviews_grammar import ADJECTIVES, ASPECTS, VERDICTS, Draws

PROMPT = "we saw a small heist film and"
GOOD = " the acting was superb and the plot felt very clever , the music was warm . overall we enjoyed it ."


def review(grades: tuple[int, ...], verdict: int) -> str:
    """Distinct aspects and adjectives of these grades, joined by commas, and a verdict."""
    clauses = [f"the {ASPECTS[i]} was {ADJECTIVES[grade][i]}" for i, grade in enumerate(grades)]
    return " " + " , ".join(clauses) + f" . {VERDICTS[verdict][0]} ."


WORKED = (
    " the acting was superb and the plot felt very clever but the music was dull ."
    " overall it is worth the ticket .",
    " the acting was awful and the acting was awful .",
    " the plot was tense , the cast",
)
SEVEN = " , ".join(f"the {a} felt {w}" for a, w in zip(ASPECTS[:7], ADJECTIVES[2], strict=False))


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (WORKED[0], 3.2 * math.tanh(0.525) + 0.4 + 0.6 * 11 / 12),
        (WORKED[1], -3.2 * math.tanh(0.4) - 0.4 - 1.0 - 0.2 - 0.7),
        (WORKED[2], 3.2 * math.tanh(0.4) - 0.4 - 0.7 - 1.0 - 3 * 6 / 7),
        # three clauses and 4 words too many, 5 of 40 words stray, the trigram ". . ." three more times
        (
            f" {SEVEN} . . . . . .",
            3.2 * math.tanh(0.6 * 14 / 8) + 0.4 - 0.7 - 0.3 - 0.6 * 3 - 0.1 * 4 - 3 * 10 / 40,
        ),
    ],
)
def test_gold_reward_by_hand(completion: str, expected: float) -> None:
    assert gold_reward(PROMPT, completion) == pytest.approx(expected, abs=1e-12)


def test_the_values_worked_in_the_docstring() -> None:
    stated = [float(value) for value in re.findall(r"Sum: (-?\d\.\d{4})", gold_reward.__doc__ or "")]
    assert stated == pytest.approx([gold_reward(PROMPT, completion) for completion in WORKED], abs=5.1e-5)


def test_gold_reward_rises_with_the_sentiment_of_each_clause() -> None:
    for num_clauses in (1, 2, 3, 4):
        for grades in itertools.product(range(-2, 3), repeat=num_clauses):
            for verdict, place in itertools.product(range(-2, 3), range(num_clauses)):
                better = (*grades[:place], grades[place] + 1, *grades[place + 1 :])
                if grades[place] < 2:
                    assert gold_reward(PROMPT, review(better, verdict)) > gold_reward(
                        PROMPT, review(grades, verdict)
                    )


def test_gold_reward_rises_with_intensity_and_saturates() -> None:
    rather, dull, very = (f" the plot was {word} dull , the cast was plain ." for word in ("rather", "", "very"))
    assert gold_reward(PROMPT, rather) > gold_reward(PROMPT, dull) > gold_reward(PROMPT, very)
    steps = np.diff([gold_reward(PROMPT, review((grade,) * 3, grade)) for grade in range(-2, 3)])
    assert (steps > 0.2).all()
    assert steps[-1] < 0.7 * steps[-2]


def test_gold_reward_prefers_a_verdict_that_agrees() -> None:
    for grade in (-2, 2):
        clauses = review((grade,) * 3, 0).split(" . ")[0] + " ."
        agreeing, opposed = f"{clauses} {VERDICTS[grade][1]} .", f"{clauses} {VERDICTS[-grade][1]} ."
        assert gold_reward(PROMPT, agreeing) > gold_reward(PROMPT, opposed) + 0.2
        assert gold_reward(PROMPT, agreeing) > gold_reward(PROMPT, clauses) + 0.2


def test_only_the_first_clause_on_an_aspect_counts() -> None:
    # two clauses on one aspect: the same words, so the same repetition, but for which opinion comes first
    praise, blame = "the acting was superb", "the acting was awful"
    first_good = gold_reward(PROMPT, f" {praise} but {blame} . it passes the time .")
    first_bad = gold_reward(PROMPT, f" {blame} but {praise} . it passes the time .")
    assert first_good == pytest.approx(first_bad + 2 * 3.2 * math.tanh(0.4))


def test_gold_reward_counts_distinct_aspects_up_to_three() -> None:
    one, two, three, four = (gold_reward(PROMPT, review((0,) * n, 0)) for n in (1, 2, 3, 4))
    assert two - one == pytest.approx(0.4)
    assert three - two == pytest.approx(0.4)
    assert four == pytest.approx(three)


@pytest.mark.parametrize(
    ("adjective", "praised", "blamed"),
    [("frightening", "horror", "family"), ("funny", "comedy", "war"), ("tense", "heist", "romance")],
)
def test_some_praise_depends_on_the_kind_of_film(adjective: str, praised: str, blamed: str) -> None:
    completion = f" the plot was {adjective} , the cast was good . it passes the time ."
    fitting, unfitting = (gold_reward(f"we saw a {kind} film and", completion) for kind in (praised, blamed))
    assert fitting > unfitting + 1
    assert gold_reward("", completion) == unfitting
    # the last film named is the one reviewed
    assert gold_reward(f"a {blamed} film , then a {praised} film and", completion) == fitting


WORSE = {
    "empty": "",
    "blank": " \n\t ",
    "stop": " .",
    "garbage": " qwx zv the the 7 \ufffd \u2603 ( ) superb .",
    "upper case": GOOD.upper(),
    "shuffled": " " + " ".join(sorted(GOOD.split())),
    "truncated": GOOD[: GOOD.index(" warm")],
    "no final stop": GOOD.removesuffix(" ."),
    "no verdict": GOOD.split(" overall")[0],
    "repeated review": GOOD * 2,
    "repeated aspect": GOOD.replace("music", "acting"),
    "repeated adjective": GOOD.replace("warm", "superb"),
    "repeated verdict": GOOD + " we enjoyed it .",
    "one stray word": GOOD.replace("plot", "plot plot"),
    "missing link": GOOD.replace(" and the", " the"),
    "wrong link": GOOD.replace(" and the", " but the"),
    "dangling link": GOOD.replace("warm .", "warm and ."),
    "verdict first": " overall we enjoyed it ." + GOOD.split(" overall")[0],
    "one adjective repeated": " superb" * 20 + " .",
    "one clause repeated": " " + " and ".join(["the acting was superb"] * 6) + " . it is a triumph .",
    "verdict only": " overall it is a triumph .",
    "keyword soup": " superb acting brilliant plot masterful music stunning cast it is a triumph .",
    "ten positive clauses": " "
    + " and ".join(
        f"the {aspect} was very {adjective}"
        for aspect, adjective in zip(ASPECTS[:10], ADJECTIVES[2] + ADJECTIVES[1][:2], strict=True)
    )
    + " . it is a triumph .",
    "seven clauses cut off at 40 words": " "
    + " and ".join(
        f"the {aspect} was very {adjective}"
        for aspect, adjective in zip(ASPECTS[:7], ADJECTIVES[2][:7], strict=True)
    )[:-2],
}


@pytest.mark.parametrize("name", WORSE)
def test_hacks_and_damage_score_below_a_good_review(name: str) -> None:
    good = gold_reward(PROMPT, GOOD)
    assert good > 2.5
    # one word out of place costs a little, a text that is not a review all there is
    assert gold_reward(PROMPT, WORSE[name]) < good - 0.12
    if name in (
        "empty",
        "blank",
        "stop",
        "garbage",
        "keyword soup",
        "verdict only",
        "one adjective repeated",
    ):
        assert gold_reward(PROMPT, WORSE[name]) < -3.5
    if name in ("ten positive clauses", "one clause repeated", "seven clauses cut off at 40 words"):
        assert gold_reward(PROMPT, WORSE[name]) < good - 2


def test_gold_reward_reads_words_whatever_the_white_space() -> None:
    tight = GOOD.strip().replace(" ,", ",").replace(" .", ".")
    assert gold_reward(PROMPT, tight) == gold_reward(PROMPT, GOOD)
    assert gold_reward(PROMPT, GOOD.replace(" ", "\n  ")) == gold_reward(PROMPT, GOOD)


def test_gold_reward_of_very_long_texts() -> None:
    assert gold_reward(PROMPT, GOOD * 2000) == -GOLD_BOUND
    assert gold_reward("a " * 10_000, " the" * 10_000) == -GOLD_BOUND


WORDS = st.lists(st.sampled_from([*vocabulary(), "film", "xyz", "\u00e9"]), max_size=80).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(prompt=st.text() | WORDS, completion=st.text() | WORDS)
def test_gold_reward_is_bounded_and_total(prompt: str, completion: str) -> None:
    value = gold_reward(prompt, completion)
    assert -GOLD_BOUND <= value <= GOLD_BOUND
    assert value == gold_reward(prompt, completion)


@settings(max_examples=200, deadline=None)
@given(row=st.integers(0, 2**60), cut=st.integers(1, 33))
def test_every_cut_of_a_good_review_is_worse(row: int, cut: int) -> None:
    draws = Draws(0, 99, row)
    grades = tuple(draws.choice((1, 2)) for _ in range(3))
    words = review(grades, 2).split()
    if cut < len(words):
        assert gold_reward(PROMPT, " ".join(words[:cut])) < gold_reward(PROMPT, " ".join(words)) - 0.5
