import dataclasses
import hashlib
import itertools
import math
import re

import numpy as np
import pytest

from rlhf_cli.data import reviews
from rlhf_cli.data.reviews import (
    _PAIRS,
    _PROMPTS,
    _SFT,
    GENERATOR_VERSION,
    MAX_COMPLETION_WORDS,
    MAX_PROMPT_WORDS,
    ReviewsSpec,
    gold_reward,
    preference_pairs,
    prompts,
    sft_examples,
    vocabulary,
)
from rlhf_cli.data.reviews_gold import _parse
from rlhf_cli.data.reviews_grammar import (
    ADJECTIVES,
    HELD_OUT_ADJECTIVES,
    HELD_OUT_ASPECTS,
    HELD_OUT_KINDS,
    LOOK,
    Draws,
)
from rlhf_cli.errors import RequestError
from rlhf_cli.types import Example, Preference

SPEC = ReviewsSpec(num_sft=800, num_pairs=600, num_validation=100, num_test=300, num_prompts=1000)
HELD_OUT_WORDS = {*HELD_OUT_KINDS, *HELD_OUT_ASPECTS, *itertools.chain(*HELD_OUT_ADJECTIVES.values())}


def all_rows(spec: ReviewsSpec) -> dict[str, list[Example] | list[Preference] | list[str]]:
    rows: dict[str, list[Example] | list[Preference] | list[str]] = {}
    rows |= {f"sft/{split}": sft_examples(spec, split) for split in ("train", "validation")}
    rows |= {f"pairs/{split}": preference_pairs(spec, split) for split in ("train", "validation", "test", "ood")}
    rows |= {f"prompts/{split}": prompts(spec, split) for split in ("train", "test", "ood")}
    return rows


def opening(row: Example | Preference | str) -> str:
    prompt = row if isinstance(row, str) else row.prompt
    assert isinstance(prompt, str)
    return prompt


def texts(row: Example | Preference | str) -> list[str]:
    if isinstance(row, Example):
        return [opening(row) + row.completion]
    return [row] if isinstance(row, str) else [opening(row) + row.chosen, opening(row) + row.rejected]


def gap(pair: Preference) -> float:
    return gold_reward(opening(pair), pair.chosen) - gold_reward(opening(pair), pair.rejected)


def test_the_rows_of_this_generator_version_are_pinned() -> None:
    spec = ReviewsSpec(seed=3, num_sft=40, num_pairs=40, num_validation=20, num_test=20, num_prompts=40)
    lines = [f"{name}: {text}" for name, rows in all_rows(spec).items() for row in rows for text in texts(row)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    # rows that change need a new GENERATOR_VERSION
    assert (GENERATOR_VERSION, digest) == (1, "69f58ed39c95b126")


def test_rows_are_a_function_of_the_spec() -> None:
    first, again, other = all_rows(SPEC), all_rows(SPEC), all_rows(dataclasses.replace(SPEC, seed=1))
    assert first == again
    for name, rows in first.items():
        assert sum(a == b for a, b in zip(rows, other[name], strict=True)) < 0.02 * len(rows), name


@pytest.mark.parametrize("size", ["num_sft", "num_pairs", "num_validation", "num_test", "num_prompts"])
def test_a_larger_split_leaves_every_other_row_as_it_is(size: str) -> None:
    small, large = all_rows(SPEC), all_rows(dataclasses.replace(SPEC, **{size: getattr(SPEC, size) + 37}))
    grown = {name for name in small if len(large[name]) == len(small[name]) + 37}
    assert grown
    for name, rows in small.items():
        assert large[name][: len(rows)] == rows, name
        assert name in grown or len(large[name]) == len(rows)


def test_splits_do_not_share_rows() -> None:
    rows = [(name, row) for name, split in all_rows(SPEC).items() for row in split]
    completions: dict[str, set[str]] = {}
    for name, row in rows:
        if not isinstance(row, str):
            completions.setdefault(name, set()).update(text[len(opening(row)) :] for text in texts(row))
    for (_, one), (_, two) in itertools.combinations(completions.items(), 2):
        assert len(one & two) < 0.01 * len(one)


def test_no_two_splits_share_a_generator() -> None:
    streams = [split.stream for splits in (_SFT, _PAIRS, _PROMPTS) for split in splits.values()]
    assert len(set(streams)) == len(streams) == 9


def test_a_swap_rate_only_swaps_training_labels() -> None:
    rate = 0.25
    clean, noisy = all_rows(SPEC), all_rows(dataclasses.replace(SPEC, swap_rate=rate))
    train = noisy.pop("pairs/train")
    restored = [
        dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen, swapped=False)
        if pair.swapped
        else pair
        for pair in train
    ]
    assert restored == clean.pop("pairs/train")
    assert noisy == clean
    observed = np.mean([pair.swapped for pair in train])
    assert abs(observed - rate) < 4 * math.sqrt(rate * (1 - rate) / len(train))
    always = all_rows(dataclasses.replace(SPEC, swap_rate=1.0))
    assert all(pair.swapped for pair in always["pairs/train"])
    assert not any(pair.swapped for name in ("validation", "test", "ood") for pair in always[f"pairs/{name}"])


def test_a_temperature_only_changes_labels() -> None:
    one, two = all_rows(SPEC), all_rows(dataclasses.replace(SPEC, label_temperature=20.0))
    changed = 0
    for name, rows in one.items():
        if not name.startswith("pairs"):
            assert two[name] == rows
            continue
        for a, b in zip(rows, two[name], strict=True):
            assert opening(a) == opening(b)
            assert {a.chosen, a.rejected} == {b.chosen, b.rejected}
            changed += a != b
    assert changed > 100


@pytest.mark.parametrize("split", ["train", "test", "ood"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_labels_are_bradley_terry_draws(split: str, temperature: float) -> None:
    spec = ReviewsSpec(num_pairs=2500, num_test=2500, label_temperature=temperature)
    gaps = np.array([gap(pair) for pair in preference_pairs(spec, split)])
    expected = 1 / (1 + np.exp(-np.abs(gaps) / temperature))
    error = math.sqrt((expected * (1 - expected)).sum()) / len(gaps)
    observed = np.where(gaps == 0, 0.5, gaps > 0).mean()
    assert abs(observed - expected.mean()) < 4 * error
    if temperature == 1:
        assert 0.78 < expected.mean() < 0.86  # the best that a reward model can reach


def test_label_temperature_limits() -> None:
    cold = preference_pairs(dataclasses.replace(SPEC, label_temperature=1e-300), "train")
    assert min(gap(pair) for pair in cold) >= 0
    hot = [gap(pair) > 0 for pair in preference_pairs(dataclasses.replace(SPEC, label_temperature=1e9), "train")]
    assert abs(np.mean(hot) - 0.5) < 4 * 0.5 / math.sqrt(len(hot))


def test_pairs_have_no_stored_margin_and_are_not_swapped_by_default() -> None:
    assert all(pair.margin == 0 and not pair.swapped for pair in preference_pairs(SPEC, "train"))


def test_a_continuation_drawn_twice_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([" one .", " one .", " one .", " two ."])
    monkeypatch.setattr(reviews, "draw_continuation", lambda *_: next(drawn))
    (pair,) = preference_pairs(ReviewsSpec(num_pairs=1), "train")
    assert {pair.chosen, pair.rejected} == {" one .", " two ."}


def test_openings_of_train_validation_and_test_are_disjoint_whatever_the_seed() -> None:
    groups: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for seed in (0, 1):
        for name, rows in all_rows(dataclasses.replace(SPEC, seed=seed)).items():
            group = name.split("/")[1].replace("ood", "test")
            groups[group] |= {opening(row) for row in rows}
    assert not groups["train"] & groups["validation"]
    assert not groups["train"] & groups["test"]
    assert not groups["validation"] & groups["test"]


def test_there_are_tens_of_thousands_of_openings() -> None:
    drawn = prompts(ReviewsSpec(num_prompts=6000), "train")
    repeated = len(drawn) - len(set(drawn))
    # n draws out of N repeat about n^2 / 2N times: 900 for N = 20000
    assert repeated < 300


def test_held_out_words_are_in_sft_and_ood_only() -> None:
    words = {
        name: {word for row in rows for text in texts(row) for word in text.split()}
        for name, rows in all_rows(ReviewsSpec(num_pairs=2000, num_test=1000)).items()
    }
    assert words["sft/train"] >= HELD_OUT_WORDS
    for name in ("pairs/train", "pairs/validation", "pairs/test", "prompts/train", "prompts/test"):
        assert not words[name] & HELD_OUT_WORDS, name
    assert words["pairs/ood"] >= HELD_OUT_WORDS
    for pair in preference_pairs(SPEC, "ood"):
        assert set(opening(pair).split()) & set(HELD_OUT_KINDS)
        for completion in (pair.chosen, pair.rejected):
            found = _parse(completion.split(), "")
            assert set(found.aspects + found.adjectives) <= HELD_OUT_WORDS
    assert all(set(prompt.split()) & set(HELD_OUT_KINDS) for prompt in prompts(SPEC, "ood"))


def test_texts_keep_to_the_grammar() -> None:
    used: set[str] = set()
    lengths: list[tuple[int, int]] = []
    for row in sft_examples(ReviewsSpec(num_sft=6000), "train"):
        prompt = opening(row)
        assert re.fullmatch(r"[a-z]+( [a-z]+)+ and", prompt)
        assert re.fullmatch(r"( ([a-z]+|,|\.))+ \.", row.completion)
        found = _parse(row.completion.split(), "horror")
        assert 2 <= len(found.values) <= 4
        used.update((prompt + row.completion).split())
        lengths.append((len(prompt.split()), len(row.completion.split())))
    assert sorted(used) == vocabulary()
    assert 100 <= len(used) <= 250
    assert min(p for p, _ in lengths) >= 4
    assert max(p for p, _ in lengths) == MAX_PROMPT_WORDS <= 16
    assert max(c for _, c in lengths) in (MAX_COMPLETION_WORDS - 1, MAX_COMPLETION_WORDS)
    assert max(p + c for p, c in lengths) <= 45


def test_the_gold_reward_accounts_for_every_word_of_the_grammar() -> None:
    for row in sft_examples(SPEC, "train"):
        words = opening(row).split()
        assert _parse(row.completion.split(), words[words.index("film") - 1]).stray == 0, row


def test_sentiment_words_describe_films_nowhere_else() -> None:
    assert not set(LOOK) & set(itertools.chain(*ADJECTIVES.values(), *HELD_OUT_ADJECTIVES.values()))


def test_the_verdict_follows_the_clauses() -> None:
    found = [_parse(row.completion.split(), "") for row in sft_examples(ReviewsSpec(), "train")]
    stated = [(np.mean(parse.values), parse.verdict) for parse in found if parse.verdict is not None]
    assert 0.6 < np.corrcoef(np.array(stated).T)[0, 1] < 0.8


def test_a_known_share_of_the_reviews_is_weak() -> None:
    found = [_parse(row.completion.split(), "") for row in sft_examples(ReviewsSpec(), "train")]
    shares = {
        "aspect": [len(set(parse.aspects)) < len(parse.aspects) for parse in found],
        "adjective": [len(set(parse.adjectives)) < len(parse.adjectives) for parse in found],
        "verdict": [parse.verdict is None for parse in found],
    }
    for aspect, adjective, parse in zip(shares["aspect"], shares["adjective"], found, strict=True):
        # one weakness at a time, and the last clause is the one that repeats the first
        assert not (aspect and adjective)
        assert not aspect or parse.aspects[0] == parse.aspects[-1]
        assert not adjective or parse.adjectives[0] == parse.adjectives[-1]
    for name, expected in (("aspect", 0.07), ("adjective", 0.07), ("verdict", 0.06)):
        assert abs(np.mean(shares[name]) - expected) < 4 * math.sqrt(expected / len(found)), name
    # 5% without an opinion by design, 7% by chance
    assert 0.1 < np.mean([not any(parse.values) for parse in found]) < 0.15


def test_the_corpus_is_mixed_and_leaves_room_above() -> None:
    gold = np.array([gold_reward(opening(row), row.completion) for row in sft_examples(ReviewsSpec(), "train")])
    assert -0.3 < gold.mean() < 0.1
    assert 1.5 < gold.std() < 2.0
    assert np.quantile(gold, 0.1) < -1.5
    assert np.quantile(gold, 0.99) > 3.4


def test_draws_are_uniform_and_keyed() -> None:
    def numbers(*key: int) -> list[float]:
        draws = Draws(*key)
        return [draws.uniform() for _ in range(400)]

    values = np.array(numbers(1, 2, 3))
    assert 0 < values.min() < 0.02 < 0.98 < values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 400)
    for key in ((0, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not set(numbers(*key)) & set(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", 2**63),
        ("num_sft", 0),
        ("num_pairs", -3),
        ("num_validation", 0),
        ("num_test", 0),
        ("num_prompts", 0),
        ("label_temperature", 0.0),
        ("label_temperature", -1.0),
        ("label_temperature", math.nan),
        ("label_temperature", math.inf),
        ("swap_rate", -0.1),
        ("swap_rate", 1.1),
        ("swap_rate", math.nan),
    ],
)
def test_a_spec_out_of_range_names_the_key_and_the_value(key: str, value: float) -> None:
    with pytest.raises(RequestError, match=re.escape(f"data.{key}={value}")):
        ReviewsSpec(**{key: value})  # type: ignore[arg-type]


def test_an_unknown_split_names_the_choices() -> None:
    for rows, valid in ((sft_examples, "validation"), (preference_pairs, "ood"), (prompts, "test")):
        with pytest.raises(RequestError, match=rf"data\.split=valid: .*{valid}"):
            rows(SPEC, "valid")
