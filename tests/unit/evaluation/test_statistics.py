"""Intervals: against exact enumeration, slow references, published tables and simulated data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from rlhf_cli.evaluation import statistics
from rlhf_cli.evaluation.statistics import (
    Bootstrap,
    Estimate,
    ReliabilityBin,
    accuracy_by_confidence,
    expected_calibration_error,
    mean_interval_over_seeds,
    reliability,
    resolution_note,
    student_t_quantile,
    wilson_interval,
)


def generator(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def explicit(boot: Bootstrap, statistic, *columns: np.ndarray) -> tuple[float, float]:
    """Percentiles of a statistic recomputed on the rows of each of `boot`'s resamples, one by one."""
    values = []
    for counts in np.concatenate(list(boot._counts())).astype(int):
        rows = [i for i, count in enumerate(counts) for _ in range(count)]
        assert len(rows) == boot.n
        values.append(statistic(*(column[rows] for column in columns)))
    tail = (1 - boot.level) / 2
    return np.quantile(values, tail), np.quantile(values, 1 - tail)


# Bootstrap


def test_every_method_agrees_with_explicit_resampling() -> None:
    rng = generator(1)
    n = 9
    x, y = rng.normal(3, 1, n), rng.normal(2, 1, n)
    tokens, more = rng.integers(1, 20, n).astype(float), rng.integers(1, 20, n).astype(float)
    boot = Bootstrap(n, num_resamples=150, seed=4, level=0.9)

    def perplexity(nll: np.ndarray, count: np.ndarray) -> float:
        return float(np.exp(nll.sum() / count.sum()))

    cases = [
        (boot.mean(x), x.mean(), explicit(boot, np.mean, x)),
        (boot.mean_delta(x, y), x.mean() - y.mean(), explicit(boot, lambda a, b: a.mean() - b.mean(), x, y)),
        (
            boot.ratio(x, tokens),
            x.sum() / tokens.sum(),
            explicit(boot, lambda a, b: a.sum() / b.sum(), x, tokens),
        ),
        (boot.ratio(x, tokens, np.exp), perplexity(x, tokens), explicit(boot, perplexity, x, tokens)),
        (
            boot.ratio_delta(x, tokens, y, more, np.exp),
            perplexity(x, tokens) - perplexity(y, more),
            explicit(boot, lambda a, b, c, d: perplexity(a, b) - perplexity(c, d), x, tokens, y, more),
        ),
    ]
    for estimate, value, (lo, hi) in cases:
        assert (estimate.value, estimate.lo, estimate.hi) == pytest.approx((value, lo, hi), rel=1e-12)
        assert estimate.lo < estimate.value < estimate.hi
        assert estimate.n == n


def test_a_statistic_of_rows_agrees_with_explicit_resampling() -> None:
    x = generator(5).normal(size=11)
    boot = Bootstrap(11, num_resamples=150, seed=2)
    estimate = boot.of_rows(lambda rows: float(np.median(x[rows])))
    assert (estimate.value, estimate.lo, estimate.hi) == (np.median(x), *explicit(boot, np.median, x))
    mean = boot.of_rows(lambda rows: float(x[rows].mean()))
    assert (mean.value, mean.lo, mean.hi) == pytest.approx(
        (boot.mean(x).value, boot.mean(x).lo, boot.mean(x).hi), rel=1e-12
    )  # the same resamples, so that it is paired with the other figures
    calls: list[int] = []
    Bootstrap(4, num_resamples=5000).of_rows(lambda rows: calls.append(len(rows)) or 0.0)
    assert len(calls) == 1001 and set(calls) == {4}
    undefined = Bootstrap(4).of_rows(lambda rows: math.nan if len(set(rows)) < 4 else 1.0)
    assert (undefined.value, undefined.lo, undefined.hi) == (1, 1, 1)
    alone = Bootstrap(1).of_rows(lambda rows: 3.0)
    assert alone.value == 3 and math.isnan(alone.lo) and math.isnan(alone.hi)


def test_distribution_is_that_of_all_resamples() -> None:
    x = np.array([0.0, 1.0, 4.0, 10.0])
    means = sorted(np.mean(rows) for rows in itertools.product(x, repeat=4))  # all 256, equally likely
    num_resamples = 20_000
    boot = Bootstrap(4, num_resamples, level=0.5)
    estimate = boot.mean(x)
    # The quartiles of the sampled distribution lie between the exact quantiles at 1/4 -+ 5 standard errors.
    slack = 5 * math.sqrt(0.25 * 0.75 / num_resamples)
    for drawn, level in ((estimate.lo, 0.25), (estimate.hi, 0.75)):
        low, high = np.quantile(means, [level - slack, level + slack], method="nearest")
        assert low <= drawn <= high
    assert np.quantile(means, 0.25 + slack) < np.quantile(means, 0.4)  # the bounds are not everything


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    n, trials = 60, 2000
    boot = Bootstrap(n, num_resamples=1000)
    rng = generator(2)
    covered = 0
    for _ in range(trials):
        estimate = boot.mean(rng.normal(1.5, 2.0, n))
        covered += estimate.lo <= 1.5 <= estimate.hi
    # For a normal mean the percentile interval is about mean +- 1.96 s sqrt((n-1)/n) / sqrt(n).
    expected = t_within(1.959964 * math.sqrt((n - 1) / n), n - 1)
    assert 0.94 < expected < 0.945
    assert abs(covered / trials - expected) < 4 * math.sqrt(expected * (1 - expected) / trials)


def test_difference_of_equal_vectors_is_exactly_zero() -> None:
    x = generator(3).normal(size=257)
    den = generator(4).integers(1, 9, 257).astype(float)
    boot = Bootstrap(257, num_resamples=300)
    assert boot.mean_delta(x, x.copy()) == Estimate(0.0, 0.0, 0.0, 257)
    assert boot.ratio_delta(x, den, x.copy(), den.copy(), np.exp) == Estimate(0.0, 0.0, 0.0, 257)


def test_pairing_narrows_the_interval_of_correlated_policies() -> None:
    n = 400
    rng = generator(5)
    prompt = rng.normal(0, 3, n)  # some prompts are easy for both
    x, y = prompt + rng.normal(0, 0.5, n), prompt + rng.normal(0, 0.5, n)
    boot = Bootstrap(n)
    paired = boot.mean_delta(x, y).half_width
    unpaired = math.hypot(boot.mean(x).half_width, boot.mean(y).half_width)
    assert paired == pytest.approx(1.96 * np.std(x - y) / math.sqrt(n), rel=0.1)
    assert paired < unpaired / 4
    # A ratio over constant denominators is the same mean, through the same resamples.
    ratio = boot.ratio_delta(x, np.full(n, 2.0), y, np.full(n, 2.0))
    mean = boot.mean_delta(x / 2, y / 2)
    assert (ratio.value, ratio.lo, ratio.hi) == pytest.approx((mean.value, mean.lo, mean.hi), rel=1e-9)


@pytest.mark.parametrize("constant", [0.1, -3.0, 1e9, 0.0])
def test_constant_data_has_an_interval_of_no_width(constant: float) -> None:
    assert Bootstrap(37, 50).mean(np.full(37, constant)) == Estimate(constant, constant, constant, 37)


def test_draws_depend_on_n_resamples_and_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = generator(6).normal(size=500)
    boot = Bootstrap(500, 200, seed=7)
    first = boot.mean(x)
    assert boot.mean(x) == first
    assert Bootstrap(500, 200, seed=7).mean(x) == first
    assert Bootstrap(500, 200, seed=8).mean(x) != first
    monkeypatch.setattr(statistics, "_KEPT_ENTRIES", 0)  # drawn anew at each call
    again = Bootstrap(500, 200, seed=7)
    assert again.mean(x) == again.mean(x) == first
    assert again._kept is None


def test_several_chunks_are_all_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_CHUNK_ENTRIES", 70)  # 7 rows of 10 at a time
    x = generator(7).normal(size=10)
    boot = Bootstrap(10, 24)
    blocks = list(boot._counts())
    assert [len(block) for block in blocks] == [7, 7, 7, 3]
    assert all((block.sum(axis=1) == 10).all() for block in blocks)
    assert len(np.unique(np.concatenate(blocks), axis=0)) > 20  # not the same rows again and again
    estimate = boot.mean(x)
    assert (estimate.lo, estimate.hi) == pytest.approx(explicit(boot, np.mean, x), rel=1e-12)


def test_one_prompt_has_no_interval() -> None:
    boot = Bootstrap(1)
    for estimate in (boot.mean([2.5]), boot.mean_delta([4.0], [1.5]), boot.ratio([5.0], [2.0])):
        assert estimate.value == 2.5
        assert math.isnan(estimate.lo)
        assert math.isnan(estimate.hi)
        assert math.isnan(estimate.half_width)
        assert not estimate.excludes_zero


def test_resamples_without_a_denominator_are_left_out() -> None:
    with np.errstate(all="raise"):
        assert Bootstrap(2, 100).ratio([0.0, 6.0], [0.0, 3.0]) == Estimate(2.0, 2.0, 2.0, 2)


def test_subset_through_a_mask() -> None:
    x = generator(8).normal(size=40)
    kept = (np.arange(40) < 25).astype(float)
    estimate = Bootstrap(40).ratio(x * kept, kept)
    assert estimate.value == pytest.approx(x[:25].mean(), rel=1e-12)
    assert estimate.half_width == pytest.approx(1.96 * x[:25].std() / 5, rel=0.15)


@pytest.mark.parametrize("bad", [[1.0, math.nan, 2.0], [1.0, math.inf, 2.0], [1.0, 2.0], [[1.0, 2.0, 3.0]]])
def test_bad_vectors_are_refused(bad: list[float]) -> None:
    boot = Bootstrap(3, 10)
    good = [1.0, 2.0, 3.0]
    for call in (
        lambda: boot.mean(bad),
        lambda: boot.mean_delta(good, bad),
        lambda: boot.ratio(bad, good),
        lambda: boot.ratio(good, bad),
        lambda: boot.of_means(lambda m: m, bad),
    ):
        with pytest.raises(ValueError, match=r"finite|expected one number"):
            call()


@pytest.mark.parametrize("den", [[1.0, -1.0], [0.0, 0.0]])
def test_bad_denominators_are_refused(den: list[float]) -> None:
    with pytest.raises(ValueError, match="denominators"):
        Bootstrap(2, 10).ratio([1.0, 2.0], den)


@pytest.mark.parametrize("arguments", [{"n": 0}, {"n": 5, "num_resamples": 0}, {"n": 5, "level": 1.0}])
def test_bad_settings_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=list(arguments)[-1]):
        Bootstrap(**arguments)  # type: ignore[arg-type]


# Student's t, seeds, proportions


def t_within(t: float, df: int) -> float:
    """P(|T| < t) in closed form, for whole degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    theta = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    if df == 1:
        return 2 * theta / math.pi
    term = total = cosine if df % 2 else 1.0
    for k in range(3 if df % 2 else 2, df - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if df % 2 else sine * total


@pytest.mark.parametrize(
    ("df", "published"),
    [
        *[(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (20, 2.086)],
        *[(30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980), (100_000, 1.960)],
    ],
)
def test_t_quantiles_of_published_tables(df: int, published: float) -> None:
    assert student_t_quantile(df) == pytest.approx(published, abs=5e-4)


def test_t_quantiles_against_the_closed_form() -> None:
    for df in range(1, 200):
        t = student_t_quantile(df)
        error = 6e-5 if df <= 30 else 2e-6  # four decimals in the table; the expansion above it
        assert t_within(t - error, df) < 0.95 < t_within(t + error, df), df


def test_interval_over_seeds_worked_by_hand() -> None:
    estimate = mean_interval_over_seeds([1.0, 2.0, 3.0])  # s = 1, t = 4.3027: half-width 4.3027 / sqrt(3)
    assert (estimate.value, estimate.lo, estimate.hi) == pytest.approx((2, 2 - 2.48416, 2 + 2.48416), abs=1e-5)
    assert estimate.n == 3


def test_interval_over_seeds_at_its_edges() -> None:
    one = mean_interval_over_seeds([0.7])
    assert (one.value, one.n) == (0.7, 1)
    assert math.isnan(one.lo)
    assert math.isnan(one.hi)
    assert mean_interval_over_seeds([0.1] * 3) == Estimate(0.1, 0.1, 0.1, 3)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"finite|at least one"):
            mean_interval_over_seeds(bad)


def test_student_interval_covers_the_truth_for_three_seeds() -> None:
    rng = generator(9)
    trials = 4000
    estimates = [mean_interval_over_seeds(rng.normal(size=3).tolist()) for _ in range(trials)]
    covered = sum(e.lo <= 0 <= e.hi for e in estimates)
    assert abs(covered / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize(
    ("successes", "n", "lo", "hi"),
    [(5, 10, 0.2366, 0.7634), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_known_values(successes: int, n: int, lo: float, hi: float) -> None:
    estimate = wilson_interval(successes, n)
    assert (estimate.lo, estimate.hi) == pytest.approx((lo, hi), abs=5e-5)
    assert (estimate.value, estimate.n) == (successes / n, n)


def test_wilson_ends_solve_the_score_equation() -> None:
    estimate = wilson_interval(7, 31, level=0.9)
    for end in (estimate.lo, estimate.hi):
        assert abs(estimate.value - end) / math.sqrt(end * (1 - end) / 31) == pytest.approx(1.644854, rel=1e-6)


def test_wilson_stays_a_proportion() -> None:
    for n in range(1, 300):
        none, all_of_them = wilson_interval(0, n), wilson_interval(n, n)
        assert none.lo == 0 < none.hi < 1, n
        assert all_of_them.hi == 1 > all_of_them.lo > 0, n


def test_wilson_refuses_what_is_no_proportion() -> None:
    for successes, n in ((0, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="n="):
            wilson_interval(successes, n)


# Calibration


def test_calibration_error_worked_by_hand() -> None:
    # Symmetrised, in two bins: predictions 0.1, 0.4 with outcomes 0, 0 and 0.6, 0.9 with 1, 1: gaps of 0.25.
    assert expected_calibration_error([0.9, 0.6], [1, 1], num_bins=2) == pytest.approx(0.25)
    # Four times 0.8, right three times: gap 0.05, and the same in the mirrored bin.
    assert expected_calibration_error([0.8] * 4, [1, 1, 1, 0]) == pytest.approx(0.05)
    assert expected_calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)


def test_bins_hold_both_orders_of_each_pair() -> None:
    # (0.9, 1), (0.1, 1) and their mirrors (0.1, 0), (0.9, 0): each bin came true half of the time.
    bins = reliability([0.9, 0.1], [1, 1], num_bins=2)
    assert [(b.count, b.frequency) for b in bins] == [(2, 0.5), (2, 0.5)]
    assert [b.probability for b in bins] == pytest.approx([0.1, 0.9])
    assert expected_calibration_error([0.9, 0.1], [1, 1], num_bins=2) == pytest.approx(0.4)
    # Which completion of a pair is written first does not matter.
    p, o = generator(10).random(50), (generator(11).random(50) < 0.5).astype(float)
    assert expected_calibration_error(1 - p, 1 - o) == pytest.approx(expected_calibration_error(p, o))
    assert [b.count for b in reliability([1.0, 0.5], [1, 1], 4)] == [1, 2, 1]  # 0 | 0.5 twice | 1


def test_confidence_is_of_the_likelier_side() -> None:
    # 0.9 right, 0.1 wrong with confidence 0.9, 0.7 right; a tie is half right
    bins = accuracy_by_confidence([0.9, 0.1, 0.7, 0.5], [1, 1, 1, 1], num_bins=4)
    assert [b.count for b in bins] == [2, 2]  # from 1/2 and from 3/4
    assert [b.probability for b in bins] == pytest.approx([0.6, 0.9])
    assert [b.frequency for b in bins] == pytest.approx([0.75, 0.5])
    # which of the two is written first does not matter
    mirrored = accuracy_by_confidence([0.1, 0.9, 0.3, 0.5], [0, 0, 0, 0], num_bins=4)
    assert mirrored == [ReliabilityBin(b.count, pytest.approx(b.probability), b.frequency) for b in bins]
    with pytest.raises(ValueError, match="num_bins=0"):
        accuracy_by_confidence([0.5], [1], 0)


def test_confidence_has_the_bins_of_the_calibration_error() -> None:
    """Above the bin around 1/2, each pair is in the bin that one of its two readings is in."""
    rng = generator(12)
    p, o = rng.random(400), (rng.random(400) < 0.5).astype(float)
    folded, symmetrised = accuracy_by_confidence(p, o), reliability(p, o)
    assert len(folded) == 8 and len(symmetrised) == 15
    for one, other in zip(folded[1:], symmetrised[8:], strict=True):
        assert one.count == other.count
        assert (one.probability, one.frequency) == pytest.approx((other.probability, other.frequency))
    assert 2 * folded[0].count == symmetrised[7].count and sum(b.count for b in folded) == 400


@pytest.mark.parametrize(
    ("p", "o"),
    [
        ([], []),
        ([0.5], [1, 0]),
        ([1.1], [1]),
        ([-0.1], [1]),
        ([0.5], [2]),
        ([math.nan], [1]),
        ([[0.5]], [[1]]),
    ],
)
def test_calibration_refuses_what_is_no_probability(p: list[float], o: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected|finite"):
        expected_calibration_error(p, o)


# What n prompts can resolve


def test_note_says_what_can_be_resolved() -> None:
    # Half-width 0.12 at 100 prompts; a difference of 0.05 needs 100 * (0.12 / 0.05)^2 = 576 prompts.
    assert resolution_note(Estimate(0.05, -0.07, 0.17, 100)) == (
        "With 100 prompts a difference below about 0.12 cannot be told from 0; "
        "this one, 0.05, would take about 580."
    )
    assert resolution_note(Estimate(-0.5, -0.62, -0.38, 100)) == (
        "With 100 prompts a difference below about 0.12 cannot be told from 0."
    )
    assert resolution_note(Estimate(0.5, math.nan, math.nan, 1)) == (
        "With 1 prompt there is no interval: no difference can be told from 0."
    )
    assert resolution_note(Estimate(0.0, 0.0, 0.0, 5)).endswith("below about 0 cannot be told from 0.")


def test_estimate_knows_its_width_and_side() -> None:
    assert Estimate(1.0, 0.5, 2.0, 9).half_width == 0.75
    assert [Estimate(0.0, lo, hi, 9).excludes_zero for lo, hi in ((0.1, 1), (-1, -0.1), (-1, 1), (0, 1))] == [
        True,
        True,
        False,
        False,
    ]
