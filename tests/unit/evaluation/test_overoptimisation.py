from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import ArrayLike

from rlhf_cli.evaluation.overoptimisation import Fit, fit_best_of_n, fit_rl

FITS = [fit_best_of_n, fit_rl]
Fitting = Callable[[ArrayLike, ArrayLike], Fit]


def test_worked_by_hand() -> None:
    fit = fit_best_of_n([1, 2], [3, 4])  # 1 (4 - 1) and 2 (4 - 2)
    assert (fit.a, fit.b) == pytest.approx((4, 1))
    fit = fit_rl([1, math.e], [2, -math.e])  # 1 (2 - 0) and e (2 - 3)
    assert (fit.a, fit.b) == pytest.approx((2, 3))


def test_exact_curves_are_found() -> None:
    d = np.array([0, 0.3, 1, 1.7, 2.6, 5])
    fit = fit_best_of_n(d, d * (1.3 - 0.2 * d))
    assert (fit.a, fit.b, fit.r_squared) == pytest.approx((1.3, 0.2, 1))
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-12)
    fit = fit_rl(d, [0, *(d[1:] * (0.9 - 0.4 * np.log(d[1:])))])  # R(0) = 0 is the limit
    assert (fit.a, fit.b, fit.r_squared) == pytest.approx((0.9, 0.4, 1))
    np.testing.assert_allclose(fit.residuals, 0, atol=1e-12)


@pytest.mark.parametrize(("fit", "shape"), [(fit_best_of_n, lambda d: d), (fit_rl, np.log)])
def test_the_least_squares(fit: Fitting, shape: Callable[[np.ndarray], np.ndarray]) -> None:
    """No other pair of coefficients is closer to noisy points, and R^2 is what its definition says."""
    rng = np.random.default_rng(0)
    d = np.linspace(0.2, 4, 25)
    r = d * (1.0 - 0.3 * shape(d)) + rng.normal(0, 0.1, 25)
    found = fit(d, r)
    np.testing.assert_allclose(found.residuals, r - d * (found.a - found.b * shape(d)), atol=1e-12)
    np.testing.assert_allclose(found(d), r - found.residuals, atol=1e-12)
    best = (found.residuals**2).sum()
    for da, db in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert ((r - d * (found.a + da - (found.b + db) * shape(d))) ** 2).sum() > best
    assert found.r_squared == pytest.approx(1 - best / ((r - r.mean()) ** 2).sum())
    assert 0.5 < found.r_squared < 1


@pytest.mark.parametrize("fit", FITS)
def test_a_curve_begins_at_zero(fit: Fitting) -> None:
    found = fit([1, 2, 3], [1, 1.5, 1.2])
    assert found([0.0]) == pytest.approx([0]) and found([2.0, 1.0]).shape == (2,)


@pytest.mark.parametrize("fit", FITS)
def test_constant_reward_has_no_r_squared(fit: Fitting) -> None:
    assert math.isnan(fit([1, 2, 3], [1, 1, 1]).r_squared)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    ("d", "r", "reason"),
    [
        ([1, 2], [1], "shapes"),
        ([[1, 2]], [[1, 2]], "shapes"),
        ([1, -2], [1, 2], "negative"),
        ([1, math.nan], [1, 2], "finite"),
        ([1, 2], [1, math.inf], "finite"),
        ([0, 1, 1], [0, 1, 2], "two different"),
        ([], [], "two different"),
    ],
)
def test_points_that_decide_nothing_are_refused(fit: Fitting, d: ArrayLike, r: ArrayLike, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fit(d, r)
