"""Texts in plots: long names on several lines, and labels of points that do not cover each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Where a label may stand around its point: direction, then distance in points. Earlier ones are preferred.
_DIRECTIONS: tuple[tuple[int, float], ...] = (
    (1, 0.6),
    (1, -0.6),
    (-1, 0.6),
    (-1, -0.6),
    (0, 1),
    (0, -1),
    (1, 0),
    (-1, 0),
)
_DISTANCES = (6, 12, 20, 30)
_PLACES = [(distance, across, up) for distance in _DISTANCES for across, up in _DIRECTIONS]
_ALIGN_X: dict[int, Literal["left", "center", "right"]] = {1: "left", 0: "center", -1: "right"}


def wrap_name(name: str, width: int, max_lines: int = 3) -> str:
    """`name` on up to `max_lines` lines of at most `width` characters, cut with an ellipsis beyond.

    Lines break after the punctuation that run names are made of (not inside 1e-06), or inside a word that is
    longer than a line.
    """
    pieces = re.split(r"(?<=[_/,= ])|(?<=-)(?<!\de-)", name)
    pieces = [piece[i : i + width] for piece in pieces for i in range(0, len(piece), width)]
    lines = [""]
    for piece in pieces:
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    lines = [line.strip() for line in lines]
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1][: width - 1] + "…"]
    return "\n".join(lines)


def label_points(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    texts: Sequence[str],
    colours: Sequence[str],
    avoid: NDArray[np.float64],
) -> None:
    """Write each text beside its point, where it covers least of the points, `avoid` and earlier labels.

    The figure's layout must be settled and its canvas be an Agg one: positions are compared in pixels.

    Args:
        axes: where the points are.
        xs: positions in data units.
        ys: likewise.
        texts: one per point; an empty one is skipped.
        colours: one per point.
        avoid: further rectangles (x0, y0, x1, y1) in pixels, such as error bars [m, 4].
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    centres = axes.transData.transform(list(zip(xs, ys, strict=True)))
    radius = 4 * figure.dpi / 72
    taken = np.concatenate([np.hstack([centres - radius, centres + radius]), avoid])
    for x, y, text, colour in zip(xs, ys, texts, colours, strict=True):
        if not text:
            continue
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize="small", color=colour)
        costs = []
        for place in _PLACES:
            _move(note, place)
            box = note.get_window_extent(renderer)
            inside = _overlap(box, np.array([axes.bbox.extents]))
            costs.append(_overlap(box, taken) + 4 * (box.width * box.height - inside))
            if costs[-1] == 0:
                break
        best = _PLACES[costs.index(min(costs))]
        _move(note, best)
        taken = np.vstack([taken, note.get_window_extent(renderer).extents])
        note.set_in_layout(False)
        if best[0] > _DISTANCES[1]:  # far enough from its point to need a line to it
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            offset = note.get_position()
            axes.annotate("", (x, y), offset, textcoords="offset points", arrowprops=line).set_in_layout(False)


def _move(note: Annotation, place: tuple[float, int, float]) -> None:
    distance, across, up = place
    note.set_position((distance * across, distance * up))
    note.set_horizontalalignment(_ALIGN_X[across])
    note.set_verticalalignment("center" if abs(up) < 1 else "bottom" if up > 0 else "top")


def _overlap(box: Bbox, others: NDArray[np.float64]) -> float:
    """Area in square pixels that `box` shares with the rectangles [m, 4], summed."""
    width = np.minimum(box.x1, others[:, 2]) - np.maximum(box.x0, others[:, 0])
    height = np.minimum(box.y1, others[:, 3]) - np.maximum(box.y0, others[:, 1])
    return float(np.sum(np.maximum(width, 0) * np.maximum(height, 0)))
