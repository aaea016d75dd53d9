"""Intervals, so that no figure is reported without one: over prompts, over seeds, and of a proportion.

Evaluation is paired: every policy answers the same prompts with the same seeds. `Bootstrap` keeps that
pairing by resampling prompts, with the same resamples for every policy and metric. Numpy only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]
Transform = Callable[[Vector], Vector]

# Second word of the generator's key: resampling shares no draws with other uses of the same seed.
_STREAM = 0x626F6F74

# Entries of the count matrix that are float64 at one time (16 MB), and that are kept as uint16 (64 MB).
_CHUNK_ENTRIES = 2_000_000
_KEPT_ENTRIES = 32_000_000

# Resamples of a statistic that takes a call for each.
_MAX_CALLS = 1000

# Quantile 0.975 of Student's t for 1..30 degrees of freedom: half-widths of a two-sided 95% interval.
# fmt: off
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,  # 1..10
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,  # 11..20
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,  # 21..30
)
# fmt: on


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; `lo` and `hi` are NaN where one observation allows no interval."""

    value: float
    lo: float
    hi: float
    n: int  # independent observations behind it: prompts, seeds or pairs

    @property
    def half_width(self) -> float:
        """Half the length of the interval, in the figure's own unit; NaN without an interval."""
        return (self.hi - self.lo) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0: a difference that is resolved."""
        return self.lo > 0 or self.hi < 0


class Bootstrap:
    """Paired percentile bootstrap over n prompts (Efron and Tibshirani 1993, section 13.3).

    A resample draws n prompts with replacement; it is stored as how often each prompt was drawn, a row of a
    count matrix C [num_resamples, n]. The resamples of a mean are then C x / n, one matrix-vector product,
    and the same C serves every policy and every metric, so that their differences are paired.

    The draws depend on (n, num_resamples, seed) alone. With n = 1 all resamples are equal: `lo` and `hi` are
    NaN rather than an interval of no width. For few prompts (n < 20) percentile intervals are somewhat too
    narrow.

    Every vector has shape [n], one number a prompt (with k samples per prompt: their mean or sum); a NaN or
    an infinity in it raises ValueError, as does another length. To leave prompts out without losing the
    pairing, use `ratio(x * kept, kept)` with `kept` in {0, 1}.
    """

    def __init__(self, n: int, num_resamples: int = 2000, seed: int = 0, level: float = 0.95) -> None:
        if n < 1:
            raise ValueError(f"n={n}: a bootstrap needs at least one prompt")
        if num_resamples < 1:
            raise ValueError(f"num_resamples={num_resamples}: expected at least 1")
        if not 0 < level < 1:
            raise ValueError(f"level={level}: expected a number between 0 and 1")
        self.n = n
        self.num_resamples = num_resamples
        self.seed = seed
        self.level = level
        self._kept: list[NDArray[np.uint16]] | None = None

    def mean(self, x: ArrayLike) -> Estimate:
        """Mean over prompts."""
        column = self._column(x)
        # Equal numbers become exact zeros, so that constant data has an interval of exactly no width.
        centre = float(np.median(column))
        return self.of_means(lambda mean: mean + centre, column - centre)

    def mean_delta(self, x: ArrayLike, y: ArrayLike) -> Estimate:
        """Mean of x - y, paired by prompt."""
        return self.mean(self._column(x) - self._column(y))

    def ratio(self, num: ArrayLike, den: ArrayLike, transform: Transform | None = None) -> Estimate:
        """transform(sum num / sum den), for example exp for perplexity = exp(sum nll / sum tokens).

        Args:
            num: numerators [n].
            den: denominators [n], none negative and not all zero (ValueError). Resamples that happen to draw
                only zero denominators are left out.
            transform: elementwise function of the ratio; none by default.
        """
        return self.of_means(lambda a, b: _ratio(a, b, transform), self._column(num), self._denominator(den))

    def ratio_delta(
        self,
        num_x: ArrayLike,
        den_x: ArrayLike,
        num_y: ArrayLike,
        den_y: ArrayLike,
        transform: Transform | None = None,
    ) -> Estimate:
        """transform(sum num_x / sum den_x) - transform(sum num_y / sum den_y), paired by prompt."""
        return self.of_means(
            lambda a, b, c, d: _ratio(a, b, transform) - _ratio(c, d, transform),
            self._column(num_x),
            self._denominator(den_x),
            self._column(num_y),
            self._denominator(den_y),
        )

    def of_means(self, function: Callable[..., Vector], *columns: ArrayLike) -> Estimate:
        """Any smooth function of means: what the other methods are made of.

        Args:
            function: maps the columns' means to the statistic, elementwise: called once with one array
                [num_resamples + 1] per column, whose entry 0 is the mean of the data itself. Resamples for
                which it gives NaN are left out.
            columns: vectors [n].
        """
        data = [self._column(column) for column in columns]
        means = np.empty((len(data), self.num_resamples + 1))
        means[:, 0] = [column.mean() for column in data]
        if self.n > 1:
            start = 1
            for counts in self._counts():
                stop = start + len(counts)
                for row, column in zip(means, data, strict=True):
                    # A product per column, not one for all: equal columns then have bitwise equal means.
                    row[start:stop] = counts @ column / self.n
                start = stop
        else:
            means[:, 1:] = means[:, :1]
        statistic = function(*means)
        return self._interval(float(statistic[0]), statistic[1:])

    def of_rows(self, statistic: Callable[[NDArray[np.int64]], float]) -> Estimate:
        """Any statistic of the prompts drawn, such as a rank correlation: a call for each resample, so 1000 at most.

        Args:
            statistic: maps row numbers [n] to a number; NaN leaves a resample out.
        """
        rows = np.arange(self.n)
        value = statistic(rows)
        if self.n == 1:
            return self._interval(value, np.empty(0))
        draws = itertools.islice(itertools.chain.from_iterable(self._counts()), _MAX_CALLS)
        return self._interval(value, np.array([statistic(np.repeat(rows, c.astype(np.int64))) for c in draws]))

    def _interval(self, value: float, resampled: Vector) -> Estimate:
        defined = resampled[~np.isnan(resampled)]
        if self.n == 1 or not len(defined):
            return Estimate(value, math.nan, math.nan, self.n)
        tail = (1 - self.level) / 2
        lo, hi = np.quantile(defined, [tail, 1 - tail])
        return Estimate(value, float(lo), float(hi), self.n)

    def _counts(self) -> Iterator[Vector]:
        """Blocks of rows of the count matrix, as float64: drawn once where they fit, else anew each time."""
        if self.n * self.num_resamples <= _KEPT_ENTRIES:
            self._kept = self._kept or list(self._draw())
            blocks: Iterator[NDArray[np.uint16]] = iter(self._kept)
        else:
            blocks = self._draw()
        for block in blocks:
            yield block.astype(np.float64)

    def _draw(self) -> Iterator[NDArray[np.uint16]]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, _STREAM]))
        rows = max(1, _CHUNK_ENTRIES // self.n)
        for start in range(0, self.num_resamples, rows):
            size = min(rows, self.num_resamples - start)
            drawn = rng.integers(0, self.n, size=(size, self.n))
            drawn += self.n * np.arange(size)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=size * self.n)
            # A count has mean 1 and variance 1: it does not come near the end of uint16.
            yield counts.reshape(size, self.n).astype(np.uint16)

    def _column(self, values: ArrayLike) -> Vector:
        column = np.ascontiguousarray(values, dtype=np.float64)
        if column.shape != (self.n,):
            raise ValueError(f"expected one number for each of {self.n} prompts, got shape {column.shape}")
        return _finite(column)

    def _denominator(self, values: ArrayLike) -> Vector:
        column = self._column(values)
        if column.min() < 0 or column.max() == 0:
            raise ValueError("denominators: expected none negative and not all zero")
        return column


def _ratio(num: Vector, den: Vector, transform: Transform | None) -> Vector:
    ratio = np.divide(num, den, out=np.full_like(num, math.nan), where=den > 0)
    return ratio if transform is None else transform(ratio)


def _finite(values: Vector) -> Vector:
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(f"{len(bad)} of {values.size} numbers are not finite, the first in row {bad[0]}")
    return values


def student_t_quantile(df: int) -> float:
    """Quantile 0.975 of Student's t: what a 95% interval multiplies a standard error by.

    A table for df <= 30; above it the Cornish-Fisher expansion around the normal quantile to order df^-3
    (Abramowitz and Stegun 1964, 26.7.5), whose error there is below 2e-6.
    """
    if df < 1:
        raise ValueError(f"df={df}: expected at least 1")
    if df <= len(_T_975):
        return _T_975[df - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / df + second / df**2 + third / df**3


def mean_interval_over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of a figure over independent runs, with its 95% Student-t interval.

    mean +- t_{0.975, n-1} * s / sqrt(n), s with n - 1 in its denominator. One run: `lo` and `hi` are NaN. No
    run, or a value that is not finite: ValueError (leave failed runs out, and say so, before this).
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError("expected the figures of at least one run")
    _finite(data)
    n = len(data)
    # Around the median, as in Bootstrap.mean: equal runs give an interval of exactly no width.
    centre = float(np.median(data))
    mean = centre + float((data - centre).mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    half = student_t_quantile(n - 1) * float((data - centre).std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n)


def wilson_interval(successes: float, n: int, level: float = 0.95) -> Estimate:
    """Proportion with the score interval of Wilson (1927): inside [0, 1], and sound for few trials.

    `successes` may be a sum of scores in [0, 1] (a tie counted 1/2): the interval is then wider than needed.
    ValueError for n < 1 or successes outside [0, n].
    """
    if n < 1:
        raise ValueError(f"n={n}: a proportion needs at least one trial")
    if not 0 <= successes <= n:
        raise ValueError(f"successes={successes}: expected a number from 0 to n={n}")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    p = successes / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At p = 0 and p = 1 one end is p itself; rounding must not push it past.
    return Estimate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


@dataclass(frozen=True)
class ReliabilityBin:
    """Predictions that fall between two edges: what was predicted, and what came about."""

    count: int
    probability: float  # mean prediction
    frequency: float  # mean outcome


def reliability(probability: ArrayLike, outcome: ArrayLike, num_bins: int = 15) -> list[ReliabilityBin]:
    """Symmetrised pair probabilities in `num_bins` equal bins of [0, 1]: those that are not empty.

    A pair can be read in two orders: besides (p, o) it contributes (1 - p, 1 - o), so a preferred completion
    always written first, (p, 1), also counts as (1 - p, 0). Without this all outcomes would be 1 and no model
    that is ever in doubt could be calibrated.

    Args:
        probability: P(first is preferred over second) [n], in [0, 1].
        outcome: 1 where the first was preferred, 0 where the second was [n]; a soft label in between is
            allowed.
        num_bins: at least 1; a prediction on an edge belongs to the bin above, 1 to the last.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: expected at least 1")
    p, o = _pairs(probability, outcome)
    return _binned(np.concatenate([p, 1 - p]), np.concatenate([o, 1 - o]), num_bins)


def accuracy_by_confidence(probability: ArrayLike, outcome: ArrayLike, num_bins: int = 15) -> list[ReliabilityBin]:
    """Confidence max(p, 1 - p) and accuracy of the likelier side, each pair once, in the bins of `reliability`.

    A tie, p = 1/2, is right by one half. Arguments as there; in a bin `probability` is the mean confidence and
    `frequency` the accuracy. Bins below 1/2 are empty.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: expected at least 1")
    p, o = _pairs(probability, outcome)
    right = np.where(p > 0.5, o, np.where(p < 0.5, 1 - o, 0.5))
    return _binned(np.maximum(p, 1 - p), right, num_bins)


def _binned(p: Vector, o: Vector, num_bins: int) -> list[ReliabilityBin]:
    index = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
    count = np.bincount(index, minlength=num_bins)
    sum_p = np.bincount(index, weights=p, minlength=num_bins)
    sum_o = np.bincount(index, weights=o, minlength=num_bins)
    return [
        ReliabilityBin(int(count[b]), float(sum_p[b] / count[b]), float(sum_o[b] / count[b]))
        for b in np.flatnonzero(count)
    ]


def expected_calibration_error(probability: ArrayLike, outcome: ArrayLike, num_bins: int = 15) -> float:
    """ECE = sum_b (count_b / count) |frequency_b - probability_b| (Naeini et al. 2015).

    The bins are those of `reliability`.
    """
    bins = reliability(probability, outcome, num_bins)
    total = sum(b.count for b in bins)
    return sum(b.count / total * abs(b.frequency - b.probability) for b in bins)


def _pairs(probability: ArrayLike, outcome: ArrayLike) -> tuple[Vector, Vector]:
    p = np.asarray(probability, dtype=np.float64)
    o = np.asarray(outcome, dtype=np.float64)
    if p.ndim != 1 or p.shape != o.shape or not len(p):
        raise ValueError(f"expected two vectors of one length, got shapes {p.shape} and {o.shape}")
    for name, values in (("probability", p), ("outcome", o)):
        if _finite(values).min() < 0 or values.max() > 1:
            raise ValueError(f"{name}: expected numbers in [0, 1]")
    return p, o


def resolution_note(delta: Estimate) -> str:
    """One sentence on how small a difference this many prompts can tell from 0.

    A difference is resolved when it is larger than the half-width h of its interval. h falls as 1/sqrt(n), so
    an observed difference d below h would take about n (h/d)^2 prompts.
    """
    half = delta.half_width
    prompts = "1 prompt" if delta.n == 1 else f"{delta.n} prompts"
    if math.isnan(half):
        return f"With {prompts} there is no interval: no difference can be told from 0."
    note = f"With {prompts} a difference below about {_short(half)} cannot be told from 0"
    if delta.excludes_zero or delta.value == 0 or half == 0:
        return note + "."
    needed = max(delta.n + 1, math.ceil(delta.n * (half / delta.value) ** 2))
    return f"{note}; this one, {_short(delta.value)}, would take about {_short(needed)}."


def _short(x: float) -> str:
    """Two significant digits, without an exponent for everyday sizes."""
    return f"{float(f'{x:.2g}'):g}"
