import math

import numpy as np
import pytest
from scipy.special import expit

from rlhf_cli.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    fit_temperature,
    mean_nll,
    temperature_note,
)
from rlhf_cli.evaluation.statistics import expected_calibration_error


def _pairs(true_temperature, n=40_000, seed=0, scale=2.0):
    """Log-odds of the preferred side, where sigmoid(z / T) is how often a model's z for the first side is right."""
    rng = np.random.default_rng(seed)
    z = scale * true_temperature * rng.standard_normal(n)
    first_is_preferred = rng.random(n) < 1 / (1 + np.exp(-z / true_temperature))
    return np.where(first_is_preferred, z, -z)


def _ece(z, temperature):
    return expected_calibration_error(expit(z / temperature), np.ones_like(z))


@pytest.mark.parametrize("temperature", [0.05, 0.4, 1.0, 3.0, 50.0])
def test_the_temperature_behind_the_outcomes_is_found(temperature):
    z = _pairs(temperature)
    assert fit_temperature(z) == pytest.approx(temperature, rel=0.03)
    found = fit_temperature(z)
    assert _ece(z, found) < 0.01
    if temperature != 1.0:
        assert _ece(z, 1.0) > 0.03 and mean_nll(z) > mean_nll(z, found)


def test_it_is_found_in_a_case_worked_by_hand():
    # Three right pairs to one wrong at one distance: sigmoid(2 / T) = 3/4, T = 2 / ln 3
    assert fit_temperature([2, 2, 2, -2]) == pytest.approx(2 / math.log(3), rel=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_no_temperature_is_better_and_there_is_one_valley(seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal(rng.integers(2, 60)) * 10 ** rng.uniform(-2, 2) + rng.uniform(-1, 3)
    grid = np.exp(np.linspace(-6, 6, 2001))
    nll = np.array([mean_nll(z, temperature) for temperature in grid])
    if z.min() >= 0:
        assert fit_temperature(z) == 1.0, "no pair is wrong: the likelihood would have every temperature lower"
        return
    fitted = mean_nll(z, fit_temperature(z))
    assert fitted <= nll.min() + 1e-12
    assert fitted <= mean_nll(z)
    lowest = int(nll.argmin())
    assert (np.diff(nll[: lowest + 1]) <= 1e-12).all() and (np.diff(nll[lowest:]) >= -1e-12).all()


def test_the_unit_of_the_log_odds_does_not_matter():
    z = _pairs(1.0, n=500)
    assert fit_temperature(7 * z) == pytest.approx(7 * fit_temperature(z), rel=1e-6)


def test_pairs_that_say_nothing_of_a_temperature_give_a_bound_and_a_note():
    assert fit_temperature([1.0, -1.0]) == MAX_TEMPERATURE  # as good as its opposite
    assert fit_temperature([-1.0, -2.0]) == MAX_TEMPERATURE
    assert "lowest" in temperature_note(MIN_TEMPERATURE) and "highest" in temperature_note(MAX_TEMPERATURE)
    assert temperature_note(1.0) is None
    # The minimum lies beyond the bounds: 1e-3 / ln 3 and 1e4 / ln 3.
    assert fit_temperature(np.array([1, 1, 1, -1]) * 1e-3) == MIN_TEMPERATURE
    assert fit_temperature(np.array([1, 1, 1, -1]) * 1e4) == MAX_TEMPERATURE


def test_pairs_that_are_all_right_leave_the_temperature_alone():
    assert fit_temperature([0.5, 3.0, 0.0]) == fit_temperature([1000.0]) == 1.0


def test_pairs_that_are_all_ties_leave_the_temperature_alone():
    assert fit_temperature([0.0, 0.0]) == 1.0


@pytest.mark.parametrize("z", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_no_pair_and_numbers_that_are_none_are_refused(z):
    with pytest.raises(ValueError, match="log-odds"):
        fit_temperature(z)


def test_the_likelihood_is_finite_where_the_probability_is_not_above_0():
    assert mean_nll([-2000.0, 2000.0]) == 1000.0
