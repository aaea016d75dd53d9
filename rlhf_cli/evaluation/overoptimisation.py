"""Scaling laws of over-optimisation (Gao et al. 2022, arXiv:2210.10760, section 1), fitted to measurements.

    best-of-n   R(d) = d (a - b d)
    RL          R(d) = d (a - b log d)

d = sqrt(KL to the initial policy) in sqrt(nats), R = reward gained over the initial policy, so that R(0) = 0. Both are
linear in a and b: ordinary least squares, without an intercept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Fit:
    """One of the two forms, fitted to m points."""

    a: float  # initial slope (best-of-n), reward per sqrt(nat)
    b: float  # how fast the gain wears off
    residuals: Vector  # measured minus fitted [m], in the order given
    r_squared: float  # 1 - sum of squared residuals / sum of squares around the mean of R; NaN where R is constant
    basis: Callable[[Vector], Vector]  # d [m] -> the columns that a and b multiply [m, 2]

    def __call__(self, d: ArrayLike) -> Vector:
        """R(d) of the fitted curve, [m] for d [m]."""
        return self.basis(np.asarray(d, dtype=np.float64)) @ np.array([self.a, self.b])


def fit_best_of_n(d: ArrayLike, r: ArrayLike) -> Fit:
    """R = d (a - b d) to m points.

    Example: d = 1, 2 and R = 3, 4 give a = 4, b = 1.

    Args:
        d: sqrt(KL) [m], none negative.
        r: reward gained over the initial policy [m].

    Raises:
        ValueError: shapes differ, a number is not finite, a d is negative, or fewer than two different d above 0 leave
            a and b undecided.
    """
    return _fit(d, r, _best_of_n_basis)


def fit_rl(d: ArrayLike, r: ArrayLike) -> Fit:
    """R = d (a - b log d) to m points; R(0) = 0, the limit. Arguments as in `fit_best_of_n`."""
    return _fit(d, r, _rl_basis)


def _best_of_n_basis(d: Vector) -> Vector:
    return np.stack([d, -d * d], axis=-1)


def _rl_basis(d: Vector) -> Vector:
    return np.stack([d, -xlogy(d, d)], axis=-1)


def _fit(d: ArrayLike, r: ArrayLike, basis: Callable[[Vector], Vector]) -> Fit:
    x, y = np.asarray(d, dtype=np.float64), np.asarray(r, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"expected two vectors of one length, got shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("d and r: expected finite numbers")
    if (x < 0).any():
        raise ValueError("d: expected square roots of KLs, none negative")
    if len(np.unique(x[x > 0])) < 2:
        raise ValueError("d: expected at least two different numbers above 0, or a and b are not decided")
    columns = basis(x)
    coefficients, *_ = np.linalg.lstsq(columns, y, rcond=None)
    residuals = y - columns @ coefficients
    spread = float(((y - y.mean()) ** 2).sum())
    r_squared = 1 - float(residuals @ residuals) / spread if spread > 0 else float("nan")
    return Fit(float(coefficients[0]), float(coefficients[1]), residuals, r_squared, basis)
