"""Calibration of a reward model's pair probabilities: one temperature.

    P(preferred over other) = sigmoid(z / T),   z the model's log-odds of the preferred side

T is fitted on validation pairs (Guo et al. 2017, arXiv 1706.04599, section 4.2). It changes no decision: accuracy is as
before. The preferred side of every pair being the first, all outcomes here are 1. Numpy and scipy only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from rlhf_cli.evaluation.statistics import Vector

# Between these a temperature is looked for: 0.0025 to 403.
MIN_TEMPERATURE, MAX_TEMPERATURE = math.exp(-6), math.exp(6)

# Of log T.
_PRECISION = 1e-9


def fit_temperature(log_odds: ArrayLike) -> float:
    """T that minimises mean softplus(-z / T), the negative log-likelihood of the preferences.

    It is convex in 1/T, so there is one minimum. Where no pair is wrong it lies at T = 0, which would make the first
    wrong test pair infinitely unlikely: nothing is fitted then, and the result is 1. The pairs of a model that is on
    average no better than its opposite (mean z <= 0) ask for an infinite T: the result is MAX_TEMPERATURE, and
    `temperature_note` says what that means.

    Args:
        log_odds: z [Q] of the preferred side over the other, nats.

    Returns:
        T > 0; the likelihood is at least that of T = 1.

    Raises:
        ValueError: no pair, or a z that is not finite.
    """
    z = _log_odds(log_odds)
    if z.min() >= 0:  # no pair is wrong
        return 1.0
    ends = (math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE))
    found = minimize_scalar(
        lambda log_t: mean_nll(z, math.exp(log_t)), bounds=ends, method="bounded", options={"xatol": _PRECISION}
    )
    # The search stays inside its bounds and ends a little beside the minimum, which may be 1.
    candidates = (math.exp(found.x), MIN_TEMPERATURE, MAX_TEMPERATURE, 1.0)
    return min(candidates, key=lambda temperature: mean_nll(z, temperature))


def temperature_note(temperature: float) -> str | None:
    """One sentence where a fitted temperature is a bound and so none of the pairs' own; None elsewhere."""
    if temperature <= MIN_TEMPERATURE:
        said = "lowest", "hardly a pair is wrong, so none tells how sure to be"
    elif temperature >= MAX_TEMPERATURE:
        said = "highest", "the model is no better than chance on these pairs"
    else:
        return None
    return f"temperature {temperature:.4g} is the {said[0]} allowed: {said[1]}"


def mean_nll(log_odds: ArrayLike, temperature: float = 1.0) -> float:
    """mean softplus(-z / T), nats: finite where a probability of the other side has been rounded to 1.

    Args:
        log_odds: z [Q] of the preferred side.
        temperature: T > 0.
    """
    return float(np.mean(np.logaddexp(0.0, -_log_odds(log_odds) / temperature)))


def _log_odds(values: ArrayLike) -> Vector:
    z = np.asarray(values, dtype=np.float64)
    if z.ndim != 1 or not len(z):
        raise ValueError(f"expected the log-odds of at least one pair, got shape {z.shape}")
    if not np.isfinite(z).all():
        raise ValueError(f"log-odds of {int((~np.isfinite(z)).sum())} of {len(z)} pairs are not finite")
    return z
