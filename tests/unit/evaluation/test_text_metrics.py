"""Variety of texts, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_cli.evaluation.text_metrics import (
    distinct_n,
    distinct_n_per_prompt,
    words,
)


def test_words_are_separated_by_white_space() -> None:
    assert words("  a  film,\nwell made ") == ["a", "film,", "well", "made"]
    assert words("") == []


def test_distinct_pools_the_texts() -> None:
    texts = [["a", "b", "a"], ["a", "b"]]
    assert distinct_n(texts, 1) == 2 / 5
    # a b, b a | a b: the n-gram "a a" across the two texts does not exist.
    assert distinct_n(texts, 2) == 2 / 3
    assert distinct_n([[1, 2], [1, 3]], 2) == 1  # token ids do as well


def test_texts_without_an_ngram_are_not_varied() -> None:
    assert distinct_n([], 1) == 0
    assert distinct_n([[], []], 1) == 0
    assert distinct_n([["a"], ["b"]], 2) == 0
    assert distinct_n([[], ["a", "b"]], 2) == 1  # an empty text beside others adds nothing


def test_distinct_per_prompt_groups_neighbours() -> None:
    completions = ["good film", "good film", "bad plot", "dull cast"]
    np.testing.assert_array_equal(distinct_n_per_prompt(completions, 2, 1), [0.5, 1.0])
    np.testing.assert_array_equal(distinct_n_per_prompt(completions, 1, 1), [1, 1, 1, 1])
    np.testing.assert_array_equal(distinct_n_per_prompt(completions, 4, 2), [0.75])
    np.testing.assert_array_equal(distinct_n_per_prompt(["aa"], 1, 1, split=list), [0.5])
    assert distinct_n_per_prompt([], 3, 1).shape == (0,)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="n=0"):
        distinct_n([["a"]], 0)
    with pytest.raises(ValueError, match="groups of 2"):
        distinct_n_per_prompt(["a", "b", "c"], 2, 1)
    with pytest.raises(ValueError, match="groups of 0"):
        distinct_n_per_prompt(["a"], 0, 1)
