"""What a finished run prints on stdout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Of WARP's front and layers: many, and shown as a table or not at all.
OF_PARTS = ("front/", "warp/i")
_HIDDEN = ("parameters/", "stopped_early", "samples", "tokens", "time/", *OF_PARTS)

# Columns of the models between the SFT model and the merged one, where a run has them.
_FRONT = ("reward/mean", "gold/mean", "kl/full")


def show_run(folder: Path) -> None:
    """The final figures and the paths of what was written."""
    console = Console(highlight=False)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in summary.items():
        if not key.startswith(_HIDDEN):
            table.add_row(key, shown(value))
    console.print(table)
    if front := front_table(summary):
        console.print(front)
    for path in (folder / "model", *sorted((folder / "plots").glob("*.png"))):
        if path.exists():
            console.print(str(display_path(path)), markup=False, soft_wrap=True)


def shown(value: float | None) -> str:
    """A figure with four digits; whole numbers with all of theirs."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def front_table(summary: Mapping[str, float | None]) -> Table | None:
    """A row for each point of an output front, `front/<point>/<metric>` in the summary; None without one."""
    points = list(dict.fromkeys(key.split("/")[1] for key in summary if key.startswith("front/")))
    points.sort(key=lambda point: float(point.removeprefix("eta-")))
    if not points:
        return None
    table = Table("point", box=None, pad_edge=False)
    metrics = [metric for metric in _FRONT if f"front/{points[0]}/{metric}" in summary]
    for metric in metrics:
        table.add_column(metric, justify="right", no_wrap=True)
    for point in points:
        cells = []
        for metric in metrics:
            value, low, high = (summary[f"front/{point}/{metric}{end}"] for end in ("", "_lo", "_hi"))
            has_interval = low is not None and high is not None
            cells.append(f"{value:.2f}" + (f" [{low:.2f}, {high:.2f}]" if has_interval else ""))
        table.add_row(point, *cells)
    return table


def display_path(path: Path) -> Path:
    """Relative to the working folder where it is inside."""
    cwd = Path.cwd()
    return path.relative_to(cwd) if path.is_relative_to(cwd) else path
