"""Plots of reward models: what is drawn where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlhf_cli.report import reward_plots
from rlhf_cli.report.reward_plots import (
    BestOfPoint,
    Curve,
    MarginPanel,
    ReliabilityPanel,
    ReliabilityPoint,
    best_of_n_curves,
    margin_histograms,
    reliability_diagram,
)


@dataclass(frozen=True)
class Estimate:
    value: float
    lo: float
    hi: float
    n: int = 100


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def bars(axes: Any) -> list[tuple[float, float, float]]:
    """Left end, width and height of each."""
    return [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]


def error_bars(axes: Any) -> np.ndarray:
    """Lower and upper ends, in order of x."""
    segments = [np.array(s) for collection in axes.collections for s in collection.get_segments()]
    return np.array([[bar[0, 1], bar[1, 1]] for bar in sorted(segments, key=lambda bar: bar[0, 0])])


def test_margins_are_counted_with_right_and_wrong_apart(drawn: list[Figure], tmp_path: Path) -> None:
    panels = [
        MarginPanel("test: accuracy 0.750", np.array([-1.0, -0.5, 0.0, 0.5]), [2, 3, 15]),
        MarginPanel("ood", np.array([0.0, 2.0]), [4]),
    ]
    margin_histograms(tmp_path / "margin.png", panels)
    assert (tmp_path / "margin.png").read_bytes().startswith(b"\x89PNG")
    first, second = drawn[0].axes
    assert first.get_title(loc="left") == "test: accuracy 0.750"
    assert sorted(bars(first)) == [(-1.0, 0.5, 2), (-0.5, 0.5, 3), (0.0, 0.5, 15)]
    colours = {bar.get_x() < 0: bar.get_facecolor() for bar in first.patches}
    assert colours[True] != colours[False]
    assert legend(first) == ["right or tied: 15 pairs", "wrong: 5 pairs"]
    assert legend(second) == ["right or tied: 4 pairs", "wrong: 0 pairs"]


POINTS = [
    ReliabilityPoint(0.52, Estimate(0.45, 0.3, 0.6), 20),
    ReliabilityPoint(0.7, Estimate(0.8, 0.6, 0.9), 10),
    ReliabilityPoint(1.0, Estimate(1.0, 0.7, 1.0), 8),
]
EDGES = np.linspace(0, 1, 16).clip(0.5)


def test_reliability_shows_accuracy_with_intervals_over_confidence(drawn: list[Figure], tmp_path: Path) -> None:
    reliability_diagram(tmp_path / "reliability.png", [ReliabilityPanel("test", EDGES, [("as trained", POINTS)])])
    above, below = drawn[0].axes
    line = next(line for line in above.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(line.get_xydata(), [[0.52, 0.45], [0.7, 0.8], [1.0, 1.0]])
    np.testing.assert_allclose(error_bars(above), [[0.3, 0.6], [0.6, 0.9], [0.7, 1.0]])
    assert legend(above) == ["perfect calibration", "as trained"]
    low, high = above.get_ylim()
    assert low <= 0.3 and high > 1, "no interval is cut off"
    counted = bars(below)
    assert [height for _, _, height in counted] == [20, 10, 8]
    for (left, width, _), point in zip(counted, POINTS, strict=True):
        assert left < point.confidence <= left + width + 0.01  # inside its bin
        assert 0.02 < width < 1 / 15


def test_a_calibration_is_drawn_beside_what_it_calibrates(drawn: list[Figure], tmp_path: Path) -> None:
    series = [("as trained", POINTS), ("temperature 1.50", POINTS[:2])]
    reliability_diagram(tmp_path / "reliability.png", [ReliabilityPanel("test", EDGES, series)] * 2)
    above, _, below, _ = drawn[0].axes
    assert legend(above) == ["perfect calibration", "as trained", "temperature 1.50"]
    assert [height for _, _, height in bars(below)] == [20, 10, 8, 20, 10]
    (first, width, _), (second, _, _) = bars(below)[0], bars(below)[3]
    assert second == pytest.approx(first + width), "the two of a bin side by side"


def best_of(with_gold: bool = True) -> list[BestOfPoint]:
    return [
        BestOfPoint(n, d, Estimate(d, d - 0.1, d + 0.2), Estimate(-d, -d - 0.3, -d + 0.3) if with_gold else None)
        for n, d in ((1, 0.0), (2, 0.44), (4, 0.8))
    ]


def test_proxy_and_gold_of_the_best_of_n(drawn: list[Figure], tmp_path: Path) -> None:
    curve = Curve("d (1.00 - 0.00 d)", lambda d: 1.0 * d)
    best_of_n_curves(tmp_path / "best.png", best_of(), gold_fit=curve)
    proxy, gold = drawn[0].axes
    assert "reward that chooses" in proxy.get_ylabel() and gold.get_ylabel() == "gold reward of what it chooses"
    for axes, sign, below, above in ((proxy, 1, 0.1, 0.2), (gold, -1, 0.3, 0.3)):
        values = np.array([0, 0.44, 0.8]) * sign
        np.testing.assert_allclose(axes.lines[0].get_xydata(), np.stack([[0, 0.44, 0.8], values], axis=1))
        np.testing.assert_allclose(error_bars(axes), np.stack([values - below, values + above], axis=1))
        assert [text.get_text() for text in axes.texts] == ["n=1", "n=2", "n=4"]
    assert proxy.get_legend() is None and len(proxy.lines) == 1
    fitted = gold.lines[1].get_xydata()
    assert legend(gold)[0] == "d (1.00 - 0.00 d)" or legend(gold)[1] == "d (1.00 - 0.00 d)"
    np.testing.assert_allclose(fitted[:, 1], fitted[:, 0])
    assert (fitted[0, 0], fitted[-1, 0]) == (0, 0.8)


def test_without_gold_there_is_one_panel(drawn: list[Figure], tmp_path: Path) -> None:
    best_of_n_curves(tmp_path / "best.png", best_of(with_gold=False))
    assert len(drawn[0].axes) == 1


def test_estimates_without_interval(drawn: list[Figure], tmp_path: Path) -> None:
    alone = Estimate(0.5, math.nan, math.nan, 1)
    best_of_n_curves(tmp_path / "best.png", [BestOfPoint(1, 0.0, alone, alone)])
    np.testing.assert_array_equal(error_bars(drawn[0].axes[0]), [[0.5, 0.5]])


def test_members_have_a_line_for_each_way_of_averaging(drawn: list[Figure], tmp_path: Path) -> None:
    figures_of = {"member": (0.8, 0.7, 0.6), "weight_average": (0.8, 0.85, 0.7), "ensemble": (0.8, 0.82, 0.81)}
    rows = [
        {"step": count + 1, **{f"selection/{key}": values[count] for key, values in figures_of.items()}}
        for count in range(3)
    ]
    reward_plots.members_curve(tmp_path / "members.png", rows)
    (axes,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axes.lines] == [list(values) for values in figures_of.values()]
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in axes.lines)
    assert len({line.get_color() for line in axes.lines}) == len({line.get_marker() for line in axes.lines}) == 3
    assert (tmp_path / "members.png").stat().st_size > 0
