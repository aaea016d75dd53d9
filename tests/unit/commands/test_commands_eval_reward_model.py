"""What eval says of a reward model, from figures to tables."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rlhf_cli.commands.eval_reward_model import (
    RewardModelReport,
    _best_of_figures,
    _bins,
    _fitted,
    _pair_plots,
    show_reward_model,
)
from rlhf_cli.evaluation.best_of_n import BestOf
from rlhf_cli.evaluation.reward_models import PairScores, Side
from rlhf_cli.evaluation.statistics import Estimate


def around(value: float, n: int = 50) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.1, n)


def said(report: RewardModelReport, width: int = 120) -> str:
    file = io.StringIO()
    show_reward_model(report, Console(file=file, width=width))
    return file.getvalue()


def report(temperature: float = 1.0) -> RewardModelReport:
    figures = {
        "rm/accuracy": around(0.7),
        "rm/nll": around(0.6),
        "rm/calibrated/nll": around(0.5),
        "rm/temperature": Estimate(temperature, math.nan, math.nan, 50),
    }
    return RewardModelReport({}, {"test": figures, "ood": figures}, (), ("a [note]",), (), ())


SIZES = [BestOf(n, kl, around(kl, 30), around(-kl, 30)) for n, kl in ((1, 0.0), (2, 0.2), (4, 0.6), (8, 1.2))]


def test_calibrated_figures_are_shown_where_there_is_a_calibration() -> None:
    assert "rm/calibrated/nll" not in said(report()) and "rm/temperature" not in said(report())
    text = said(report(1.5))
    assert "rm/calibrated/nll" in text and "1.500" in text
    assert "a [note]" in text


def test_best_of_n_has_a_table_of_its_own() -> None:
    assert "Best of n" not in said(report())
    lines = said(replace(report(), best_of=SIZES)).splitlines()
    start = lines.index("Best of n, over 30 prompts")
    assert " ".join(lines[start + 1].split()) == "n KL reward that chooses gold reward of its choice"
    assert lines[start + 4].split()[:3] == ["2", "0.200", "0.20"]
    without = [replace(one, gold=None) for one in SIZES]
    assert "gold" not in said(replace(report(), best_of=without))


def test_best_of_n_in_the_summary() -> None:
    figures = _best_of_figures(SIZES)
    assert figures["rm/best_of/4/proxy"] == around(0.6, 30) and figures["rm/best_of/4/gold"] == around(-0.6, 30)
    assert figures["rm/best_of/8/kl"].value == 1.2 and math.isnan(figures["rm/best_of/8/kl"].lo)
    assert set(_best_of_figures([replace(SIZES[0], gold=None)])) == {"rm/best_of/1/proxy", "rm/best_of/1/kl"}


def test_a_curve_is_fitted_to_the_gain_over_one_sample() -> None:
    kls = np.array([0.0, 0.2, 0.6, 1.2])
    values = [around(3 + d * (2 - 0.5 * d)) for d in np.sqrt(kls)]
    curve = _fitted(SIZES, values)
    assert curve is not None and curve.label == "d (2.00 - 0.50 d) above n=1"
    np.testing.assert_allclose(curve.of(np.array([0.0, 1.0])), [3, 4.5])
    rising = _fitted(SIZES, [around(d * (2 + 0.5 * d)) for d in np.sqrt(kls)])
    assert rising is not None and rising.label == "d (2.00 + 0.50 d) above n=1"
    assert _fitted(SIZES[:3], values[:3]) is None, "two coefficients pass through any two gains"


def pairs(temperature: float = 1.0) -> PairScores:
    margin = np.array([2.0, 1.0, -1.0, 0.5])
    one, zero = np.ones(4), np.zeros(4)
    return PairScores(Side(margin, margin, one), Side(zero, zero, one), margin, temperature)


def test_the_plots_numbers_are_kept() -> None:
    bins = _bins(pairs(2.0))
    assert sum(bins["margin_counts"]) == 4 and len(bins["margin_edges"]) == len(bins["margin_counts"]) + 1
    for name, of in (
        ("reliability", pairs().probability),
        ("calibrated_reliability", pairs(2.0).calibrated_probability),
    ):
        counts = [one["count"] for one in bins[name]]
        confidence = sum(one["count"] * one["confidence"] for one in bins[name]) / 4
        accuracy = sum(one["count"] * one["accuracy"] for one in bins[name]) / 4
        assert sum(counts) == 4 and accuracy == 0.75
        assert confidence == pytest.approx(np.maximum(of, 1 - of).mean())


def test_plots_of_every_split(tmp_path: Path) -> None:
    figures = {"rm/accuracy": around(0.7), "rm/ece": around(0.1), "rm/calibrated/ece": around(0.05)}
    paths = _pair_plots(tmp_path, {"test": pairs(), "ood": pairs(2.0)}, {"test": figures, "ood": figures})
    assert [path.name for path in paths] == ["rm_margin.png", "rm_reliability.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
