"""Plots: what is drawn where, in pixels and data units, and the files they become."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from rlhf_cli.report import figures
from rlhf_cli.report.labels import wrap_name
from rlhf_cli.report.plots import (
    FrontPoint,
    SweepGroup,
    moving_average,
    reward_bars,
    reward_vs_kl,
    smoothing_window,
    sweep_reward_vs_kl,
    training_curves,
)


@dataclass(frozen=True)
class Estimate:
    value: float
    lo: float
    hi: float
    n: int = 100


def around(value: float, half: float = 0.1) -> Estimate:
    return Estimate(value, value - half, value + 2 * half)


def alone(value: float) -> Estimate:
    return Estimate(value, math.nan, math.nan, 1)


NAMES = [
    "sft",
    "reinforce-beta0.03-ema-baseline",
    "rloo-k4-beta0.03-lr1e-06",
    "rloo-k2-beta0.10-distributional-rm",
    "warp-mu0.01-eta0.3-M2-I5-T9000-warm-ensemble",
    "dpo-beta0.1-lora-r16",
    "raft-k4",
    "ppo_gae_lambda0.95_clip0.2_value_head",
]
REWARD = [0.0, 0.9, 1.5, 1.1, 1.8, 0.55, 1.2, -0.35]
GOLD = [-0.7, 0.2, 0.9, 1.0, 1.3, 0.1, 0.5, -1.4]
KL = [0.0, 4.1, 8.3, 6.4, 5.9, 7.7, 8.6, 21.0]
POINTS = [
    FrontPoint(name, "", around(kl, 0.3), around(reward), around(gold, 0.15))
    for name, kl, reward, gold in zip(NAMES, KL, REWARD, GOLD, strict=True)
]


def segments(axes: Any) -> list[np.ndarray]:
    """Every error bar as [[x0, y0], [x1, y1]]."""
    bars = [np.array(s) for collection in axes.collections for s in collection.get_segments()]
    return [bar for bar in bars if len(bar)]


def boxes(figure: Figure, texts: list[Any]) -> list[Any]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text()]


def assert_nothing_clipped(figure: Figure) -> None:
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    for axes in figure.axes:
        ticks = set(axes.get_xticklabels() + axes.get_yticklabels())
        texts = [text for text in texts if text not in ticks]  # those beyond the limits are not drawn
    texts += [label for axes in figure.axes for label in axes.get_yticklabels() if label.get_text() in NAMES]
    for text, box in zip(texts, boxes(figure, texts), strict=True):
        frame = figure.bbox
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text
        assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text


def assert_apart(figure: Figure, texts: list[Any]) -> None:
    for a, b in itertools.combinations(boxes(figure, texts), 2):
        assert not a.overlaps(b)


# Bars


@pytest.mark.parametrize("count", [1, 3, 8])
def test_bars_show_values_and_intervals(drawn: list[Figure], tmp_path: Path, count: int) -> None:
    rewards, golds = [around(r) for r in REWARD[:count]], [around(g, 0.2) for g in GOLD[:count]]
    reward_bars(tmp_path / "bars.png", NAMES[:count], rewards, golds)
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == ["reward (SFT standard deviations)", "gold reward"]
    for axes, estimates in zip(figure.axes, (rewards, golds), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [e.value for e in estimates]
        bars = [bar[:, 0] for bar in segments(axes)]
        np.testing.assert_allclose(bars, [[e.lo, e.hi] for e in estimates], atol=1e-12)
        numbers = list(axes.texts)
        assert [text.get_text() for text in numbers] == [f"{e.value:.2f}" for e in estimates]
        for box, (lo, hi), estimate in zip(boxes(figure, numbers), bars, estimates, strict=True):
            ends = axes.transData.transform([[lo, 0], [hi, 0]])[:, 0]
            assert box.x1 < ends[0] if estimate.value < 0 else box.x0 > ends[1]  # beside the error bar
            assert axes.bbox.x0 < box.x0 < box.x1 < axes.bbox.x1
    left, right = figure.axes
    labels = left.get_yticklabels()
    assert [label.get_text().replace("\n", "") for label in labels] == NAMES[:count]
    assert_apart(figure, labels)
    assert_nothing_clipped(figure)
    tops = [bar.get_window_extent().y0 for bar in right.patches]
    assert tops == sorted(tops, reverse=True)  # the first model stands on top


def test_bars_without_gold_or_interval_or_value(drawn: list[Figure], tmp_path: Path) -> None:
    reward_bars(tmp_path / "bars.png", ["a", "b"], [alone(1.25), alone(math.nan)])
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["1.25", "n/a"]
    assert [bar.get_width() for bar in axes.patches] == [1.25, 0]


# Reward against KL


def test_points_have_both_error_bars(drawn: list[Figure], tmp_path: Path) -> None:
    reward_vs_kl(tmp_path / "kl.png", POINTS)
    (figure,) = drawn
    assert [axes.get_xlabel() for axes in figure.axes] == ["KL to SFT (nats)"] * 2
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward (SFT standard deviations)", "gold reward"]
    for axes, of in zip(figure.axes, ("reward", "gold"), strict=True):
        bars = segments(axes)
        for point in POINTS:
            y = getattr(point, of)
            horizontal = [[point.kl.lo, y.value], [point.kl.hi, y.value]]
            vertical = [[point.kl.value, y.lo], [point.kl.value, y.hi]]
            for expected in (horizontal, vertical):
                assert any(np.allclose(bar, expected) for bar in bars)
        left, right = axes.get_xlim()
        assert left < 0 < 21.6 < right


def test_each_series_has_its_own_look() -> None:
    looks = {(figures.colour(i), figures.marker(i)) for i in range(56)}
    assert len(looks) == 56
    assert len({figures.colour(i) for i in range(8)}) == 8
    assert all(to_hex(figures.colour(i)).upper() == figures.colour(i) for i in range(8))
    assert figures.ink(1) == "#8A3D00"  # 0.65 of D5, 5E, 00


def test_labels_of_points_keep_apart_and_inside(drawn: list[Figure], tmp_path: Path) -> None:
    reward_vs_kl(tmp_path / "kl.png", POINTS)
    (figure,) = drawn
    assert not figure.legends  # each point bears the name of its series
    for axes in figure.axes:
        names = [text for text in axes.texts if text.get_text()]
        assert {text.get_text().replace("\n", "") for text in names} == set(NAMES)
        assert_apart(figure, names)
        markers = axes.transData.transform([[p.kl.value, p.reward.value] for p in POINTS])
        if axes is figure.axes[0]:
            for box in boxes(figure, names):
                assert not any(box.contains(x, y) for x, y in markers)
    assert_nothing_clipped(figure)


def test_points_of_a_series_share_a_line_and_a_legend(drawn: list[Figure], tmp_path: Path) -> None:
    points = [
        FrontPoint(series, f"step {10 * i}", around(scale * i), around(i**0.5), None)
        for i in range(1, 5)
        for series, scale in (("rloo", 2.0), ("warp", 1.0))
    ]
    reward_vs_kl(tmp_path / "front.png", points)
    (figure,) = drawn
    (axes,) = figure.axes  # nobody has a gold reward
    lines = {str(c.get_label()): c.lines[0] for c in axes.containers}
    assert list(lines) == ["rloo", "warp"]
    np.testing.assert_array_equal(lines["rloo"].get_xdata(), [2, 4, 6, 8])
    np.testing.assert_array_equal(lines["warp"].get_xdata(), [1, 2, 3, 4])
    assert lines["rloo"].get_color() != lines["warp"].get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["rloo", "warp"]
    texts = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in texts] == 2 * ["step 10", "step 20", "step 30", "step 40"]
    assert_apart(figure, texts)
    assert_nothing_clipped(figure)


def test_many_points_label_the_last_of_each_series(drawn: list[Figure], tmp_path: Path) -> None:
    points = [FrontPoint("rloo", f"step {i}", around(i), around(i)) for i in range(30)]
    reward_vs_kl(tmp_path / "front.png", points)
    assert [text.get_text() for text in drawn[0].axes[0].texts if text.get_text()] == ["step 29"]


@pytest.mark.parametrize(
    "points",
    [
        [FrontPoint("rloo", "", around(5.0), around(1.0))],
        [FrontPoint(name, "", Estimate(0, 0, 0), around(y)) for name, y in (("sft", 0.0), ("rloo", 0.01))],
        [FrontPoint(name, "", alone(3.0), alone(1.0)) for name in ("a", "b")],  # the same place
        [FrontPoint("a", "", alone(3.0), alone(1.0)), FrontPoint("b", "", alone(math.nan), alone(2.0))],
        [FrontPoint("a", "", alone(3.0), alone(math.nan))],
        [
            FrontPoint("a", "", alone(3.0), around(1.0), around(2.0)),
            FrontPoint("b", "", alone(4.0), around(2.0)),
        ],
        [FrontPoint(r"$\frac$ {", "", Estimate(3.0, 3.1, 3.2), Estimate(1.0, -math.inf, math.inf))],
    ],
    ids=["one", "equal KL", "no interval", "no KL", "nothing", "gold of one", "odd"],
)
def test_awkward_points_are_drawn(drawn: list[Figure], tmp_path: Path, points: list[FrontPoint]) -> None:
    reward_vs_kl(tmp_path / "kl.png", points)
    (figure,) = drawn
    shown = [p for p in points if math.isfinite(p.kl.value) and math.isfinite(p.reward.value)]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == [p.series for p in shown]
    assert_apart(figure, [text for text in axes.texts if text.get_text()])
    assert len(figure.axes) == 1 + any(p.gold is not None for p in points)
    assert_nothing_clipped(figure)


# Sweeps


def test_sweep_shows_means_and_seeds(drawn: list[Figure], tmp_path: Path) -> None:
    groups = [
        SweepGroup(f"algo=rloo, algo.beta={b}", around(k), around(r), around(-r), [k - 1, k + 1], [r, r], [-r, 0])
        for b, k, r in ((0.03, 9.0, 1.5), (0.1, 5.0, 1.2))
    ]
    sweep_reward_vs_kl(tmp_path / "sweep.png", groups)
    (figure,) = drawn
    for axes, sign, seeds in ((figure.axes[0], 1, "seed_reward"), (figure.axes[1], -1, "seed_gold")):
        means = [container.lines[0] for container in axes.containers]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in means] == [
            (9, sign * 1.5),
            (5, sign * 1.2),
        ]
        faint = [line for line in axes.lines if line.get_alpha() is not None]
        for line, mean, group in zip(faint, means, groups, strict=True):
            np.testing.assert_array_equal(line.get_xdata(), group.seed_kl)
            np.testing.assert_array_equal(line.get_ydata(), getattr(group, seeds))
            assert line.get_color() == mean.get_color()
            assert line.get_alpha() < 0.5
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [group.label for group in groups]
    assert_nothing_clipped(figure)


def test_sweep_of_many_groups_or_of_one_seed(drawn: list[Figure], tmp_path: Path) -> None:
    many = [SweepGroup(f"algo=rloo, seed group with a long name {i}", around(i), around(i)) for i in range(30)]
    sweep_reward_vs_kl(tmp_path / "many.png", many)
    sweep_reward_vs_kl(tmp_path / "one.png", [SweepGroup("rloo", alone(2.0), alone(1.0), None, [2.0], [1.0])])
    assert [len(figure.axes) for figure in drawn] == [1, 1]
    assert_apart(drawn[0], drawn[0].legends[0].get_texts())
    assert_nothing_clipped(drawn[0])


# Training curves


def test_curves_keep_the_order_asked_for_and_skip_gaps(drawn: list[Figure], tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": i, "loss": 1 / i, "kl/full": None} for i in range(1, 61)]
    rows[9]["kl/full"] = 3.0
    rows[19]["kl/full"] = 4.0
    rows[29]["kl/full"] = math.nan
    rows.append({"loss": 7.0})  # no step
    path = tmp_path / "plots" / "training.png"
    assert training_curves(path, rows, ["kl/full", "absent", "loss"]) == ("kl/full", "loss")
    assert path.exists()
    kl, loss = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (kl, loss)] == ["kl/full (nats)", "loss"]
    np.testing.assert_array_equal(kl.lines[0].get_xydata(), [[10, 3], [20, 4]])
    assert len(kl.lines) == 1  # too short to smooth
    raw, smooth = loss.lines
    values = 1 / np.arange(1, 61)
    np.testing.assert_allclose(raw.get_ydata(), values)
    np.testing.assert_allclose(smooth.get_ydata(), moving_average(values, smoothing_window(60)))
    assert raw.get_alpha() < 0.5
    assert_nothing_clipped(drawn[0])


def test_learning_rate_is_not_smoothed(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [{"step": i, "lr": 1e-6 * min(1, i / 10)} for i in range(100)]
    training_curves(tmp_path / "lr.png", rows, ["lr"])
    assert len(drawn[0].axes[0].lines) == 1


def test_no_curve_no_file(tmp_path: Path) -> None:
    assert training_curves(tmp_path / "x.png", [{"step": 1, "loss": None}], ["loss", "kl/full"]) == ()
    assert not list(tmp_path.iterdir())


def test_moving_average_worked_by_hand() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0])
    np.testing.assert_allclose(moving_average(values, 3), [1.5, 3.0, 11 / 3, 4.5])
    np.testing.assert_allclose(moving_average(values, 1), values)
    np.testing.assert_allclose(moving_average(values, 9), [3, 3, 3, 3])
    assert [smoothing_window(n) for n in (1, 14, 15, 60, 300)] == [1, 1, 3, 7, 23]


# Names


def test_names_wrap_at_their_punctuation() -> None:
    assert wrap_name("rloo", 10) == "rloo"
    assert wrap_name("rloo-k4-beta0.03", 10) == "rloo-k4-\nbeta0.03"
    assert wrap_name("rloo-k4-lr1e-06", 13) == "rloo-k4-\nlr1e-06"  # not inside the number
    assert wrap_name("abcdefghij", 4) == "abcd\nefgh\nij"
    assert wrap_name("aa bb cc dd ee ff", 5, max_lines=2) == "aa bb\ncc d…"
    assert all(len(line) <= 26 for name in NAMES for line in wrap_name(name, 26).split("\n"))


# Files


def draw_all(folder: Path) -> list[Path]:
    reward_bars(folder / "bars.png", NAMES, [around(r) for r in REWARD])
    reward_vs_kl(folder / "kl.png", POINTS)
    training_curves(folder / "curves.png", [{"step": i, "loss": i % 7} for i in range(50)], ["loss"])
    sweep_reward_vs_kl(folder / "sweep.png", [SweepGroup("a", around(1), around(2), None, [1], [2])])
    return sorted(folder.iterdir())


def test_files_are_the_same_bytes_whatever_the_users_style(tmp_path: Path) -> None:
    first = draw_all(tmp_path / "first")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "yellow", "savefig.bbox": "tight"}):
        second = draw_all(tmp_path / "second")
        assert matplotlib.rcParams["font.size"] == 30  # and the user's style is left as it was
    assert [path.name for path in first] == ["bars.png", "curves.png", "kl.png", "sweep.png"]  # no leftovers
    for a, b in zip(first, second, strict=True):
        content = a.read_bytes()
        assert content == b.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert b"tEXt" not in content  # neither a date nor a version
        assert b"matplotlib" not in content


def test_size_is_inches_times_150(tmp_path: Path) -> None:
    reward_vs_kl(tmp_path / "kl.png", POINTS[:1])
    header = (tmp_path / "kl.png").read_bytes()[16:24]
    height = (tmp_path / "kl.png").read_bytes()[20:24]
    assert int.from_bytes(header[:4], "big") == 11 * 150
    assert int.from_bytes(height, "big") == 5 * 150


def test_failed_plot_leaves_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="half way"),
        figures.new_figure(tmp_path / "x.png", (2, 2), "title"),
    ):
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())


def test_matplotlib_comes_late_and_pyplot_never(tmp_path: Path) -> None:
    script = f"""
import sys
from rlhf_cli.report import plots
assert "matplotlib" not in sys.modules
plots.training_curves({str(tmp_path / "x.png")!r}, [{{"step": 1, "loss": 2.0}}], ["loss"])
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert (tmp_path / "x.png").exists()


def test_the_parts_of_a_run_are_lines_of_their_own(drawn: list[Figure], tmp_path: Path) -> None:
    rows = [
        {"step": step, "kl/k1": float(step % 20), "warp/iteration": 1, "warp/member": 1 + step // 20}
        for step in range(60)
    ]
    training_curves(tmp_path / "x.png", rows, ["kl/k1"])
    (axes,) = drawn[0].axes
    assert [list(line.get_xdata()) for line in axes.lines[::2]] == [
        list(range(20 * i, 20 * i + 20)) for i in range(3)
    ]
    smooth = axes.lines[3].get_ydata()
    assert smooth[0] < 3, "the average of the second part has nothing of the first one's end"
