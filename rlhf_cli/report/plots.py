"""Plots of runs, evaluations and sweeps, as PNG files written whole or not at all.

matplotlib is imported only where a figure is drawn: importing it takes longer than a command should to start.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.report.common import Interval, format_number
from rlhf_cli.report.figures import colour, error_lengths, ink, marker, new_figure
from rlhf_cli.report.labels import label_points, wrap_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Vector = NDArray[np.float64]

KL_LABEL = "KL to SFT (nats)"
REWARD_LABEL = "reward (SFT standard deviations)"
GOLD_LABEL = "gold reward"

# Units of the metrics of training, by name or by the part of it before the slash.
_UNITS = {
    "kl": "nats",
    "entropy": "nats",
    "rm/entropy": "nats",
    "reward": "SFT standard deviations",
    "length/mean": "tokens",
    "throughput/tokens_per_s": "tokens/s",
    "throughput/samples_per_s": "samples/s",
    "time": "s",
    "memory": "GiB",
}

_PART_KEYS = ("warp/iteration", "warp/member")  # rows in which these differ belong to different lines
_EXACT = ("lr",)  # metrics without noise, which smoothing would only distort
_MAX_DOTS = 15  # shorter curves show their points
_MAX_LABELS = 24  # with more points than this, only the last one of each series is labelled


@dataclass(frozen=True)
class FrontPoint:
    """A policy's place in the plane of reward and KL."""

    series: str  # what shares a colour, a marker and a line: the method
    label: str  # what tells the points of a series apart: a step, a beta; may be empty
    kl: Interval  # nats
    reward: Interval
    gold: Interval | None = None


@dataclass(frozen=True)
class SweepGroup:
    """Runs of one setting: means over seeds, and the seeds one by one."""

    label: str
    kl: Interval  # nats
    reward: Interval
    gold: Interval | None = None
    seed_kl: Sequence[float] = ()
    seed_reward: Sequence[float] = ()  # as long as seed_kl
    seed_gold: Sequence[float] = ()  # as long as seed_kl, or empty


def reward_bars(
    path: str | Path,
    names: Sequence[str],
    reward: Sequence[Interval],
    gold: Sequence[Interval] | None = None,
    title: str = "Reward by model, 95% intervals",
) -> None:
    """Bars of reward, and in a second panel with a scale of its own of gold reward, one a model."""
    panels = [(REWARD_LABEL, reward)] + ([(GOLD_LABEL, gold)] if gold is not None else [])
    assert names and all(len(estimates) == len(names) for _, estimates in panels)
    rows = range(len(names))
    labels = [wrap_name(name, 26) for name in names]
    height = 1.5 + sum(0.22 + 0.19 * (1 + label.count("\n")) for label in labels)
    with new_figure(path, (3.2 + 3.6 * len(panels), height), title) as figure:
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for index, (axes, (label, estimates)) in enumerate(zip(all_axes, panels, strict=True)):
            values = np.array([e.value for e in estimates], dtype=np.float64)
            below, above = error_lengths(estimates)
            axes.barh(rows, np.nan_to_num(values), height=0.62, color=colour(index), alpha=0.75)
            axes.errorbar(values, rows, xerr=(below, above), fmt="none", ecolor="#222222", elinewidth=1.3)
            axes.axvline(0, color="#666666", linewidth=0.8)
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.2)
            axes.set_xlabel(label)
            for row, value, minus, plus in zip(rows, values, below, above, strict=True):
                _bar_number(axes, row, value, minus, plus)
        all_axes[0].set_yticks(rows, labels)
        all_axes[0].set_ylim(len(names) - 0.4, -0.6)  # the first model on top


def _bar_number(axes: Axes, row: float, value: float, below: float, above: float) -> None:
    """The bar's figure, beyond the end of its error bar."""
    left = value < 0
    end = value - below if left else value + above
    axes.annotate(
        format_number(value),
        (end if math.isfinite(end) else 0.0, row),
        (-5 if left else 5, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize="small",
    )


@dataclass(frozen=True)
class _Mark:
    """An estimate in the plane of one panel."""

    kl: Interval
    y: Interval
    series: int
    label: str = ""

    @property
    def drawable(self) -> bool:
        return math.isfinite(self.kl.value) and math.isfinite(self.y.value)


def reward_vs_kl(
    path: str | Path, points: Sequence[FrontPoint], title: str = "Reward against KL, 95% intervals"
) -> None:
    """Reward over KL, one colour and marker a series, and the same for gold reward where a point has it.

    The points of a series are joined in the order given. Where every series is a single point the points bear
    the series' names; otherwise a legend does, and the points bear their own labels.
    """
    assert points
    series = list(dict.fromkeys(point.series for point in points))
    single = len(series) == len(points)
    labels = _point_labels(points, single)
    panels = []
    kinds: list[tuple[str, Callable[[FrontPoint], Interval | None]]] = [
        (REWARD_LABEL, lambda point: point.reward),
        (GOLD_LABEL, lambda point: point.gold),
    ]
    for name, of in kinds:
        marks = [
            _Mark(point.kl, y, series.index(point.series), label)
            for point, label in zip(points, labels, strict=True)
            if (y := of(point)) is not None
        ]
        panels.append((name, marks))
    panels = [panel for panel in panels if panel[1]]
    with new_figure(path, _plane_size(len(panels), len(series)), title) as figure:
        all_axes = _planes(figure, [name for name, _ in panels])
        for axes, (_, marks) in zip(all_axes, panels, strict=True):
            for index, name in enumerate(series):
                _draw_marks(axes, [mark for mark in marks if mark.series == index], name)
        _finish_planes(figure, all_axes, legend=not single)
        for axes, (_, marks) in zip(all_axes, panels, strict=True):
            drawn = sorted((mark for mark in marks if mark.drawable), key=lambda mark: mark.series)
            _label_marks(axes, drawn)


def _point_labels(points: Sequence[FrontPoint], single: bool) -> list[str]:
    if single:
        return [wrap_name(point.series, 22) for point in points]
    if len(points) <= _MAX_LABELS:
        return [wrap_name(point.label, 22) for point in points]
    last = {point.series: i for i, point in enumerate(points)}
    return [wrap_name(p.label, 22) if last[p.series] == i else "" for i, p in enumerate(points)]


def sweep_reward_vs_kl(
    path: str | Path,
    groups: Sequence[SweepGroup],
    title: str = "Reward against KL, mean over seeds and 95% intervals",
) -> None:
    """Reward over KL, a marker with intervals for each group of seeds, its seeds faintly behind it."""
    assert groups
    has_gold = any(group.gold is not None for group in groups)
    names = [REWARD_LABEL, GOLD_LABEL] if has_gold else [REWARD_LABEL]
    with new_figure(path, _plane_size(len(names), len(groups)), title) as figure:
        all_axes = _planes(figure, names)
        for axes, name in zip(all_axes, names, strict=True):
            for index, group in enumerate(groups):
                is_gold = name == GOLD_LABEL
                y, seeds = (group.gold, group.seed_gold) if is_gold else (group.reward, group.seed_reward)
                if seeds:
                    axes.plot(
                        group.seed_kl,
                        seeds,
                        marker(index),
                        color=colour(index),
                        markersize=5,
                        alpha=0.35,
                        mew=0,
                    )
                if y is not None:
                    _draw_marks(axes, [_Mark(group.kl, y, index)], group.label)
        _finish_planes(figure, all_axes, legend=True)


def _plane_size(num_panels: int, num_names: int) -> tuple[float, float]:
    """Inches for the panels, and for a legend of this many names beside them."""
    return (7.2 if num_panels < 2 else 11.0), max(5.0, 0.5 + 0.33 * num_names)


def _planes(figure: Figure, names: Sequence[str]) -> list[Axes]:
    all_axes = list(figure.subplots(1, len(names), squeeze=False)[0])
    for axes, name in zip(all_axes, names, strict=True):
        axes.set_xlabel(KL_LABEL)
        axes.set_ylabel(name)
        axes.margins(0.1)
    return all_axes


def _draw_marks(axes: Axes, marks: Sequence[_Mark], name: str) -> None:
    """One series: error bars, markers, and a thin line through them; NaN intervals are left out."""
    marks = [mark for mark in marks if mark.drawable]
    if not marks:
        return
    axes.errorbar(
        [mark.kl.value for mark in marks],
        [mark.y.value for mark in marks],
        xerr=error_lengths([mark.kl for mark in marks]),
        yerr=error_lengths([mark.y for mark in marks]),
        color=colour(marks[0].series),
        marker=marker(marks[0].series),
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.7,
        elinewidth=1.2,
        linewidth=0.8,
        label=name,
    )


def _finish_planes(figure: Figure, all_axes: Sequence[Axes], legend: bool) -> None:
    """Legend and ranges, and the layout settled, so that labels can be placed in pixels."""
    for axes in all_axes:
        # KL is a distance from the reference, so its zero is always in sight.
        left, right = axes.get_xlim()
        axes.set_xlim(min(left, -0.04 * right), right)
    handles, names = all_axes[0].get_legend_handles_labels()
    if legend and handles:
        wrapped = [wrap_name(name, 30) for name in names]
        figure.legend(handles, wrapped, loc="outside right upper", fontsize="small")
    figure.draw_without_rendering()


def _label_marks(axes: Axes, marks: Sequence[_Mark]) -> None:
    """Labels clear of error bars and of the lines; `marks` are grouped by series."""
    if not marks:
        return
    xs, ys = [mark.kl.value for mark in marks], [mark.y.value for mark in marks]
    left, right = error_lengths([mark.kl for mark in marks])
    down, up = error_lengths([mark.y for mark in marks])
    bars = [np.stack([xs - left, ys, xs + right, ys], axis=1), np.stack([xs, ys - down, xs, ys + up], axis=1)]
    boxes = _pixels(axes, np.concatenate(bars))
    for a, b in itertools.pairwise(marks):
        if a.series == b.series:  # joined by a line, which is covered by a chain of small boxes
            line = np.linspace((a.kl.value, a.y.value), (b.kl.value, b.y.value), 21)
            boxes = np.vstack([boxes, _pixels(axes, np.hstack([line[:-1], line[1:]]))])
    texts = [mark.label for mark in marks]
    label_points(axes, xs, ys, texts, [ink(mark.series) for mark in marks], boxes)


def _pixels(axes: Axes, segments: Vector) -> Vector:
    """Rectangles [m, 4] in pixels, two pixels around line segments (x0, y0, x1, y1) in data units [m, 4]."""
    ends = axes.transData.transform(segments.reshape(-1, 2)).reshape(-1, 2, 2)
    return np.hstack([ends.min(axis=1) - 2, ends.max(axis=1) + 2])


def training_curves(
    path: str | Path,
    rows: Sequence[Mapping[str, object]],
    keys: Sequence[str],
    title: str = "Training",
) -> tuple[str, ...]:
    """Small multiples of metrics over steps: each step in a light line, a centred moving average over it.

    Args:
        path: of the picture.
        rows: lines of metrics.jsonl; a row counts for a key where both "step" and the key are finite numbers.
        keys: the metrics wanted, in order; those that no row has are left out.
        title: of the picture.

    A run of several parts (WARP's members) has a line for each: what one ends with, the next does not begin with.

    Returns:
        The keys drawn. Without any no file is written.
    """
    parts = [list(part) for _, part in itertools.groupby(rows, lambda row: [row.get(key) for key in _PART_KEYS])]
    curves = {
        key: found for key in keys if (found := [curve for part in parts if len((curve := _curve(part, key))[0])])
    }
    if not curves:
        return ()
    num_columns = min(3, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    windows = {
        key: 1 if key in _EXACT else min(smoothing_window(len(values)) for _, values in lines)
        for key, lines in curves.items()
    }
    if any(window > 1 for window in windows.values()):
        title += ": each step (light) and moving average"
    with new_figure(path, (1.2 + 3.6 * num_columns, 1.1 + 2.2 * num_rows), title) as figure:
        grid = figure.subplots(num_rows, num_columns, sharex=True, squeeze=False)
        for axes, (key, lines) in zip(grid.flat, curves.items(), strict=False):
            for steps, values in lines:
                if windows[key] > 1:
                    axes.plot(steps, values, color=colour(0), alpha=0.3, linewidth=0.8)
                    axes.plot(steps, moving_average(values, windows[key]), color=colour(0), linewidth=1.8)
                else:
                    dots = {"marker": "o", "markersize": 3} if len(values) < _MAX_DOTS else {}
                    axes.plot(steps, values, color=colour(0), linewidth=1.8, **dots)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.yaxis.set_major_formatter("{x:g}")  # 1e-06 at each tick instead of a factor above the axis
            unit = _UNITS.get(key, _UNITS.get(key.split("/")[0], ""))
            axes.set_title(f"{key} ({unit})" if unit else key)
        for axes in grid.flat[len(curves) :]:
            axes.set_axis_off()
        for axes in grid.flat[max(0, len(curves) - num_columns) : len(curves)]:
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step")
    return tuple(curves)


def smoothing_window(num_points: int) -> int:
    """Steps that a moving average spans: odd, near a fifteenth of the run, and 1 (none) for short runs."""
    return 1 if num_points < _MAX_DOTS else 2 * (num_points // 30) + 3


def moving_average(values: Vector, window: int) -> Vector:
    """Mean of the `window` (odd) values around each, over those that exist at the ends: [n] -> [n]."""
    assert window % 2 == 1
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    start, stop = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def _curve(rows: Sequence[Mapping[str, object]], key: str) -> tuple[Vector, Vector]:
    steps, values = [], []
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if _is_finite(step) and _is_finite(value):
            steps.append(step)
            values.append(value)
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def _is_finite(x: object) -> TypeGuard[float]:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
