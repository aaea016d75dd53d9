"""Figures that look alike and are the same bytes for the same data: no user style, no date, no pyplot
state."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_cli.report.common import Interval, write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Vector = NDArray[np.float64]

# Okabe and Ito's palette for colour-blind readers, without its yellow (too light on white), with a grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_DPI = 150

_STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.wspace": 0.05,
    "figure.facecolor": "white",
    "figure.titlesize": "large",
    "font.size": 10,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "text.parse_math": False,  # a dollar sign in a run's name is a dollar sign
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def colour(index: int) -> str:
    """Colour of the series with this index; they repeat after eight."""
    return _COLOURS[index % len(_COLOURS)]


def marker(index: int) -> str:
    """Marker of the series with this index; with the colour it repeats after 56."""
    return _MARKERS[index % len(_MARKERS)]


def ink(index: int) -> str:
    """A darker shade of the same colour, in which small text is readable on white."""
    channels = (int(colour(index)[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(0.65 * channel):02X}" for channel in channels)


@contextmanager
def new_figure(path: str | Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """A figure of `size` inches to draw on; leaving the context writes it to `path` as PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, horizontalalignment="left")
        yield figure
        png = io.BytesIO()
        # Without this key matplotlib writes its version into the file; it writes no date into a PNG.
        figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    write_file(path, png.getvalue())


def error_lengths(estimates: Sequence[Interval]) -> tuple[Vector, Vector]:
    """How far the interval reaches below and above each value; 0 without an interval."""
    return _reach([e.value - e.lo for e in estimates]), _reach([e.hi - e.value for e in estimates])


def _reach(lengths: Sequence[float]) -> Vector:
    # A length is negative where the value of a skewed statistic lies outside its percentile interval.
    reach = np.array(lengths, dtype=np.float64)
    return np.where(np.isfinite(reach), np.maximum(reach, 0), 0)
