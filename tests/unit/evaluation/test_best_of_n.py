from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from fixtures_models import FP32, byte_tokenizer, reward_model, tiny_lm

from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.evaluation.best_of_n import Samples, best_of_n, best_of_n_kl, sample_and_score, sizes, summarise
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.types import Prompt

PROMPTS: list[Prompt] = ["the film ", "a ", "the plot is "]


def by_enumeration(proxy: list[float], value: list[float], n: int) -> float:
    """Mean over all subsets of size n of the value of the best; of several best ones, their mean."""
    results = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        chosen = [value[i] for i in subset if proxy[i] == best]
        results.append(sum(chosen) / len(chosen))
    return sum(results) / len(results)


def test_worked_by_hand() -> None:
    proxy, value = np.array([[1.0, 0.0, 2.0]]), np.array([[7.0, 5.0, 3.0]])
    assert best_of_n(proxy, value, 2) == pytest.approx([13 / 3])


@pytest.mark.parametrize("n", range(1, 8))
def test_the_mean_over_all_subsets(n: int) -> None:
    rng = np.random.default_rng(n)
    proxy, value = rng.normal(size=(4, 7)), rng.normal(size=(4, 7))
    expected = [by_enumeration(list(p), list(v), n) for p, v in zip(proxy, value, strict=True)]
    np.testing.assert_allclose(best_of_n(proxy, value, n), expected, rtol=1e-12)
    expected = [by_enumeration(list(p), list(p), n) for p in proxy]
    np.testing.assert_allclose(best_of_n(proxy, proxy, n), expected, rtol=1e-12)


@pytest.mark.parametrize("n", range(1, 9))
def test_one_of_the_tied_is_chosen_at_random(n: int) -> None:
    """In a subset it is one of the tied that are in it: over all subsets each of them is equally often."""
    rng = np.random.default_rng(n)
    proxy, value = rng.integers(0, 3, (5, 8)).astype(float), rng.normal(size=(5, 8))
    expected = [by_enumeration(list(p), list(v), n) for p, v in zip(proxy, value, strict=True)]
    np.testing.assert_allclose(best_of_n(proxy, value, n), expected, rtol=1e-12)


def test_the_ends() -> None:
    rng = np.random.default_rng(0)
    proxy, value = rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    np.testing.assert_allclose(best_of_n(proxy, value, 1), value.mean(axis=1))
    np.testing.assert_allclose(best_of_n(proxy, value, 20), value[np.arange(3), proxy.argmax(axis=1)])
    same = np.ones((3, 20))
    for n in (1, 5, 20):
        np.testing.assert_allclose(best_of_n(same, value, n), value.mean(axis=1), err_msg="a judge that is blind")


def test_many_samples_do_not_overflow() -> None:
    proxy = np.arange(2000.0)[None]
    total = math.comb(2000, 700)
    exact = sum(Fraction(i * math.comb(i, 699), total) for i in range(699, 2000))
    assert best_of_n(proxy, proxy, 700) == pytest.approx([float(exact)], rel=1e-9)


def test_unbiased() -> None:
    """Over many prompts of N = 6 samples it agrees with drawing n = 4 samples anew."""
    rng = np.random.default_rng(3)
    proxy = rng.normal(size=(40_000, 6))
    estimate = best_of_n(proxy, proxy, 4)
    fresh = rng.normal(size=(400_000, 4)).max(axis=1)
    error = math.hypot(estimate.std() / 200, fresh.std() / math.sqrt(400_000))
    assert abs(estimate.mean() - fresh.mean()) < 4 * error


@pytest.mark.parametrize("n", [0, 5, -1])
def test_more_samples_than_there_are(n: int) -> None:
    with pytest.raises(ValueError, match=f"n={n}.*4 samples"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 4)), n)


def test_tables_of_two_shapes() -> None:
    with pytest.raises(ValueError, match="shapes"):
        best_of_n(np.zeros((2, 4)), np.zeros((2, 3)), 1)


def test_kl() -> None:
    assert best_of_n_kl(1) == 0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
    # of the best of n to one sample, for a continuous score u in [0, 1] with density n u^(n-1)
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = 8 * u**7
    assert best_of_n_kl(8) == pytest.approx((density * np.log(density)).mean(), abs=1e-5)


def test_sizes() -> None:
    assert [sizes(largest) for largest in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def gold(prompt: Prompt, completion: str) -> float:
    return len(completion) + 100.0 * PROMPTS.index(prompt)


def sampled(max_rows: int) -> Samples:
    return sample_and_score(
        tiny_lm(),
        byte_tokenizer(),
        reward_model(mean=0.5, std=2.0),
        gold,
        PROMPTS,
        16,
        Sampling(8, 0.9, max_rows),
        6,
        7,
        FP32,
    )


def test_samples_are_scored_in_their_places() -> None:
    found = sampled(512)
    batch = prompt_batch(byte_tokenizer(), PROMPTS, range(3), 16)
    rollout = generate(tiny_lm(), byte_tokenizer(), batch, 6, Sampling(8, 0.9), 7, 0)
    scores = reward_model(mean=0.5, std=2.0).score_rollout(rollout)
    np.testing.assert_allclose(found.proxy, scores.reward.reshape(3, 6), atol=1e-5)
    assert found.gold is not None
    np.testing.assert_array_equal(found.gold // 100, [[0] * 6, [1] * 6, [2] * 6])
    assert rollout.truncated.any() and (found.proxy[0] != found.proxy[1]).all()


def test_prompts_taken_together_change_no_sample() -> None:
    together, apart = sampled(512), sampled(6)
    np.testing.assert_allclose(apart.proxy, together.proxy, atol=1e-5)
    np.testing.assert_array_equal(apart.gold, together.gold)


def test_summary_over_prompts() -> None:
    rng = np.random.default_rng(1)
    samples = Samples(rng.normal(size=(30, 10)), rng.normal(size=(30, 10)))
    assert samples.gold is not None
    table = summarise(samples, 6, 300, 0)
    assert [one.n for one in table] == [1, 2, 4, 6]
    for one in table:
        for estimate, value in ((one.proxy, samples.proxy), (one.gold, samples.gold)):
            assert estimate is not None
            assert estimate.value == pytest.approx(best_of_n(samples.proxy, value, one.n).mean())
            assert estimate.lo < estimate.value < estimate.hi and estimate.n == 30
    assert table[0].kl == 0 and table[2].kl == best_of_n_kl(4)
    assert [one.gold for one in summarise(Samples(samples.proxy, None), 2, 300, 0)] == [None, None]
