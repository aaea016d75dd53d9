"""Measuring a reward model on held-out pairs: accuracy, margin, calibration, each with an interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.evaluation.statistics import Bootstrap, Estimate, expected_calibration_error
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Preference

Column = NDArray[np.float64]


@dataclass(frozen=True)
class PairScores:
    """Raw scores of pairs."""

    chosen: Column  # [Q]
    rejected: Column  # [Q]
    subsets: Sequence[str] = ()  # part of the data each pair is from, Q; empty where the data has no parts

    @property
    def margin(self) -> Column:
        """r+ - r-, raw."""
        return self.chosen - self.rejected

    @property
    def probability(self) -> Column:
        """P(chosen is preferred) = sigmoid(r+ - r-)."""
        return 1.0 / (1.0 + np.exp(-np.clip(self.margin, -700, 700)))


def score_pairs(reward_model: Scorer, pairs: Sequence[Preference], precision: Precision) -> PairScores:
    """Scores both completions of every pair."""
    prompts = [pair.prompt for pair in pairs]
    with precision.autocast():
        chosen = reward_model.score(prompts, [pair.chosen for pair in pairs]).raw
        rejected = reward_model.score(prompts, [pair.rejected for pair in pairs]).raw
    subsets = [pair.subset for pair in pairs]
    return PairScores(chosen.double().numpy(), rejected.double().numpy(), subsets if any(subsets) else ())


def summarise_pairs(scores: PairScores, num_resamples: int, seed: int) -> Mapping[str, Estimate]:
    """rm/accuracy (a tie counts one half), rm/margin (raw), rm/nll (nats), rm/ece (15 bins, symmetrised).

    Where the data has several subsets, rm/accuracy/<subset> is the accuracy on each.

    Resamples of the ECE are larger on average than the figure itself, because |.| adds up their noise: its interval
    is that of the resamples, moved back by their mean excess.
    """
    margin, probability = scores.margin, scores.probability
    bootstrap = Bootstrap(len(margin), num_resamples, seed)
    right = (margin > 0) + 0.5 * (margin == 0)
    return {
        "rm/accuracy": bootstrap.mean(right),
        "rm/margin": bootstrap.mean(margin),
        "rm/nll": bootstrap.mean(np.logaddexp(0.0, -margin)),
        "rm/ece": _calibration(probability, num_resamples, seed),
        **_by_subset(right, scores.subsets, num_resamples, seed),
    }


def _by_subset(right: Column, subsets: Sequence[str], num_resamples: int, seed: int) -> dict[str, Estimate]:
    names = list(dict.fromkeys(subsets))
    if len(names) < 2:
        return {}
    parts = {name: right[np.array([one == name for one in subsets])] for name in names}
    return {
        f"rm/accuracy/{name}": Bootstrap(len(part), num_resamples, seed).mean(part) for name, part in parts.items()
    }


def _calibration(probability: Column, num_resamples: int, seed: int) -> Estimate:
    n = len(probability)
    outcome = np.ones(n)
    value = expected_calibration_error(probability, outcome)
    if n == 1:
        return Estimate(value, math.nan, math.nan, n)
    rng = np.random.Generator(np.random.Philox(key=[seed, n]))
    resampled = [
        expected_calibration_error(probability[rng.integers(0, n, n)], outcome)
        for _ in range(min(num_resamples, 1000))
    ]
    excess = float(np.mean(resampled)) - value
    lo, hi = np.clip(np.quantile(resampled, [0.025, 0.975]) - excess, 0.0, 1.0)
    return Estimate(value, float(lo), float(hi), n)
