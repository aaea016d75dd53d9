"""Plots of a reward model's evaluation: margins, reliability, best-of-n."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.report.common import Interval
from rlhf_cli.report.figures import colour, error_lengths, marker, new_figure
from rlhf_cli.report.plots import GOLD_LABEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Vector = NDArray[np.float64]

_RIGHT, _WRONG = 0, 1  # colours


@dataclass(frozen=True)
class MarginPanel:
    """Margins of the pairs of one split, counted."""

    title: str
    edges: Vector  # [B + 1]; 0 is one of them
    counts: Sequence[int]  # B


@dataclass(frozen=True)
class ReliabilityPoint:
    """The pairs of one bin of confidence."""

    confidence: float  # their mean
    accuracy: Interval
    count: int


@dataclass(frozen=True)
class ReliabilityPanel:
    """Accuracy against confidence for the pairs of one split, before a calibration and after it."""

    title: str
    edges: Vector  # of the bins, from 1/2 or below to 1
    series: Sequence[tuple[str, Sequence[ReliabilityPoint]]]  # what it is called in the legend, its points


@dataclass(frozen=True)
class BestOfPoint:
    """What the best of n samples is worth."""

    n: int
    d: float  # sqrt(KL), sqrt(nats)
    proxy: Interval
    gold: Interval | None


@dataclass(frozen=True)
class Curve:
    """A function drawn through points, and what the legend says of it."""

    label: str
    of: Callable[[Vector], Vector]  # d [m] -> [m]


def margin_histograms(path: str | Path, panels: Sequence[MarginPanel], title: str = "Margins of pairs") -> None:
    """How many pairs have which margin, rightly ranked ones in another colour than wrongly ranked ones."""
    assert panels
    with new_figure(path, (1.0 + 4.6 * len(panels), 4.0), title) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            left, width = panel.edges[:-1], np.diff(panel.edges)
            counts = np.asarray(panel.counts)
            for place, index, name in ((left >= 0, _RIGHT, "right or tied"), (left < 0, _WRONG, "wrong")):
                bars = axes.bar(
                    left[place], counts[place], width[place], align="edge", color=colour(index), alpha=0.75
                )
                bars.set_label(f"{name}: {counts[place].sum():,} pairs")
            axes.axvline(0, color="#666666", linewidth=0.8)
            axes.grid(axis="x", visible=False)
            axes.set_title(panel.title)
            axes.set_xlabel("raw reward of chosen minus rejected")
            axes.set_ylabel("pairs")
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.set_ylim(top=1.22 * max(1, counts.max()))  # room for the legend
            axes.legend(loc="upper left", fontsize="small")


def members_curve(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Accuracy on the selection split of the first 1, 2, ... members, the best first: each alone, and averaged.

    Args:
        path: of the picture.
        rows: lines of metrics.jsonl with "step", the number of members, and the three figures under "selection/".
    """
    lines = {
        "member": "the one that joins",
        "weight_average": "mean of the weights",
        "ensemble": "mean of the predictions",
    }
    with new_figure(path, (6.0, 4.0), "Members, best first") as figure:
        axes = figure.subplots()
        for index, (key, name) in enumerate(lines.items()):
            points = [(row["step"], row[f"selection/{key}"]) for row in rows]
            axes.plot(*zip(*points, strict=True), color=colour(index), marker=marker(index), label=name)
        axes.set_xlabel("members")
        axes.set_ylabel("accuracy on the validation pairs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")


def reliability_diagram(
    path: str | Path,
    panels: Sequence[ReliabilityPanel],
    title: str = "Accuracy against confidence, 95% Wilson intervals",
) -> None:
    """How often the side that is likelier for the model is the preferred one; below it, how many pairs a bin has."""
    assert panels
    with new_figure(path, (1.0 + 4.6 * len(panels), 5.4), title) as figure:
        grid = figure.subplots(2, len(panels), sharex="col", squeeze=False, height_ratios=(3, 1))
        for (above, below), panel in zip(grid.T, panels, strict=True):
            above.plot(
                [0.5, 1], [0.5, 1], color="#666666", linewidth=0.8, linestyle="--", label="perfect calibration"
            )
            for index, (name, points) in enumerate(panel.series):
                _draw_reliability(above, index, name, points)
                share = 0.9 / len(panel.series)
                _draw_counts(below, index, share, panel.edges, points)
            above.set_title(panel.title)
            above.set_ylabel("accuracy")
            above.set_xlim(0.49, 1.01)
            lowest = min(0.38, above.get_ylim()[0])
            above.set_yticks([tick for tick in above.get_yticks() if tick <= 1])
            above.set_ylim(lowest, 1.22)  # room for the legend
            above.legend(loc="upper left", fontsize="small")
            below.set_xlabel("confidence: P of the likelier side")
            below.set_ylabel("pairs")
            below.grid(axis="x", visible=False)
            below.yaxis.get_major_locator().set_params(integer=True)


def _draw_reliability(axes: Axes, index: int, name: str, points: Sequence[ReliabilityPoint]) -> None:
    axes.errorbar(
        [point.confidence for point in points],
        [point.accuracy.value for point in points],
        yerr=error_lengths([point.accuracy for point in points]),
        color=colour(index),
        marker=marker(index),
        markersize=6,
        elinewidth=1.2,
        linewidth=0.8,
        label=name,
    )


def _draw_counts(axes: Axes, index: int, share: float, edges: Vector, points: Sequence[ReliabilityPoint]) -> None:
    """Bars over the bins, those of several series side by side."""
    places = np.searchsorted(edges, [point.confidence for point in points], side="right") - 1
    places = np.minimum(places, len(edges) - 2)
    width = np.diff(edges)[places]
    left = edges[places] + width * (0.05 + share * index)
    axes.bar(left, [p.count for p in points], share * width, align="edge", color=colour(index), alpha=0.75)


def best_of_n_curves(
    path: str | Path,
    points: Sequence[BestOfPoint],
    proxy_fit: Curve | None = None,
    gold_fit: Curve | None = None,
    title: str = "Best of n samples, 95% intervals",
) -> None:
    """Proxy, and in a second panel gold, over sqrt(KL), each point with its n; fitted curves dashed."""
    assert points
    d = np.array([point.d for point in points])
    panels = [("reward that chooses (SFT standard deviations)", [point.proxy for point in points], proxy_fit)]
    golds = [point.gold for point in points if point.gold is not None]
    if len(golds) == len(points):
        panels.append((GOLD_LABEL + " of what it chooses", golds, gold_fit))
    with new_figure(path, (1.0 + 4.6 * len(panels), 4.4), title) as figure:
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for index, (axes, (label, estimates, fit)) in enumerate(zip(all_axes, panels, strict=True)):
            values = [estimate.value for estimate in estimates]
            style = {"color": colour(index), "marker": marker(index), "markersize": 7, "elinewidth": 1.2}
            axes.errorbar(d, values, yerr=error_lengths(estimates), linestyle="none", label="measured", **style)
            if fit is not None:
                line = np.linspace(0, d.max(), 101)
                axes.plot(line, fit.of(line), color=colour(index), linewidth=1.2, linestyle="--", label=fit.label)
                axes.legend(loc="lower right", fontsize="small")
            for point, value in zip(points, values, strict=True):
                where = {"textcoords": "offset points", "ha": "right", "fontsize": "small"}
                axes.annotate(f"n={point.n}", (point.d, value), (-6, 5), **where)
            axes.set_xlabel("d = sqrt(KL to the policy sampled), sqrt(nats)")
            axes.set_ylabel(label)
            axes.margins(x=0.12, y=0.12)
