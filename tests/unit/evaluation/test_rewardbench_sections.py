from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.evaluation.rewardbench import SECTIONS, section_scores
from rlhf_cli.evaluation.statistics import Estimate

ALL = [subset for weights in SECTIONS.values() for subset in weights]


def scored(accuracy: dict[str, tuple[int, int]]) -> tuple[dict[str, Estimate], list[str]]:
    """Subsets with so many right pairs of so many."""
    margin, subsets = [], []
    for subset, (right, count) in accuracy.items():
        margin += [1.0] * right + [-1.0] * (count - right)
        subsets += [subset] * count
    return section_scores(np.array(margin), subsets, 200, 0)


def test_a_section_is_weighted_by_the_published_counts() -> None:
    """Not by the rows that are there."""
    scores, _ = scored({"mt-bench-hard": (1, 2), "llmbar-natural": (3, 4), "llmbar-adver-manual": (0, 50)})
    expected = (37 * 0.5 + 100 * 0.75 + 46 * 0) / (37 + 100 + 46)
    assert set(scores) == {"rm/section/chat_hard"}
    score = scores["rm/section/chat_hard"]
    assert score.value == pytest.approx(expected) and score.n == 56
    assert score.lo < score.value < score.hi


def test_mathematics_counts_as_much_as_code() -> None:
    code = {subset: (0, 3) for subset in SECTIONS["reasoning"] if subset.startswith("hep")}
    assert len(code) == 6
    scores, _ = scored({"math-prm": (2, 2), **code})
    assert scores["rm/section/reasoning"].value == pytest.approx(0.5)


def test_the_counts_are_those_of_the_benchmark() -> None:
    assert {section: sum(weights.values()) for section, weights in SECTIONS.items()} == {
        "chat": 358,
        "chat_hard": 456,
        "safety": 740,
        "reasoning": 1968,
    }
    assert sum(map(len, SECTIONS.values())) == 23 == len(set(ALL))
    # 2,985 rows: the weights, with the true number of mathematical ones
    assert sum(weight for weights in SECTIONS.values() for weight in weights.values()) - 984 + 447 == 2985


def test_overall_is_the_mean_of_the_sections() -> None:
    accuracy = dict.fromkeys(SECTIONS["chat"], (4, 4)) | dict.fromkeys(SECTIONS["chat_hard"], (1, 4))
    accuracy |= dict.fromkeys(SECTIONS["safety"], (2, 4)) | dict.fromkeys(SECTIONS["reasoning"], (3, 4))
    scores, _ = scored(accuracy)
    assert [score.value for score in scores.values()] == pytest.approx([1, 0.25, 0.5, 0.75, 0.625])
    assert list(scores)[-1] == "rm/section/overall" and scores["rm/section/overall"].n == 23 * 4
    overall = scores["rm/section/overall"]
    assert overall.lo < 0.625 < overall.hi


def test_a_tie_is_wrong() -> None:
    scores, _ = section_scores(np.array([1.0, 0.0]), ["donotanswer"] * 2, 100, 0)
    assert scores["rm/section/safety"].value == 0.5


def test_what_is_missing_is_said() -> None:
    _, notes = scored({"mt-bench-hard": (30, 37), "llmbar-natural": (50, 99)})
    assert len(notes) == 2
    assert notes[0].startswith(
        "rm/section/chat_hard is not the published one: llmbar-natural has 99 of its 100 pairs"
    )
    assert "llmbar-adver-manual has 0 of its 46 pairs" in notes[0] and "mt-bench-hard" not in notes[0]
    assert notes[1] == "rm/section/overall needs all four sections; missing: chat, safety, reasoning"


def test_the_whole_benchmark_lacks_nothing() -> None:
    counts = {subset: weight for weights in SECTIONS.values() for subset, weight in weights.items()}
    scores, notes = scored({subset: (n // 2, n) for subset, n in (counts | {"math-prm": 447}).items()})
    assert notes == [] and len(scores) == 5
    assert scored({subset: (1, n) for subset, n in counts.items()})[1] == [
        "rm/section/reasoning is not the published one: math-prm has 984 of its 447 pairs"
    ]


def test_other_data_has_no_sections() -> None:
    assert scored({"easy": (1, 2)}) == ({}, [])
    assert section_scores(np.ones(3), (), 100, 0) == ({}, [])


def test_other_subsets_do_not_count() -> None:
    alone, mixed = scored({"hep-go": (1, 4)}), scored({"hep-go": (1, 4), "shp": (50, 50)})
    assert alone[0]["rm/section/reasoning"].value == mixed[0]["rm/section/reasoning"].value == 0.25
    assert mixed[0]["rm/section/reasoning"].n == 4
