"""Tables for the terminal, and the same figures as CSV.

The tables fit any width: identifying columns are repeated and the metrics split over as many tables as it
takes.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from rlhf_cli.report.common import (
    Interval,
    excludes_zero,
    format_estimate,
    format_number,
    is_interval,
    write_file,
)

MISSING = "-"
_MAX_LABEL = 32  # characters; a longer name is folded onto more lines
_GAP = 3  # characters between two columns; the last one needs a character less


@dataclass(frozen=True)
class PolicyRow:
    """One policy's figures, and their differences to the reference (none for the reference itself)."""

    name: str
    metrics: Mapping[str, Interval]
    deltas: Mapping[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True)
class _Column:
    title: str
    cells: Sequence[Text]
    justify: str = "right"

    @property
    def width(self) -> int:
        lines = [line for cell in self.cells for line in cell.plain.split("\n")]
        return max(cell_len(line) for line in [self.title, *lines])


@dataclass(frozen=True)
class WideTable:
    """A rich renderable that breaks between columns, never inside a number.

    `labels` are repeated in each part; `values` are spread over the parts.
    """

    labels: Sequence[_Column]
    values: Sequence[_Column]
    title: str = ""
    caption: str = ""
    widest_label: int = _MAX_LABEL
    label_share: int = 3  # labels take at most this part of the width: a third

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render as one table, or as several below each other."""
        if self.title:
            yield Text(self.title, style="bold")
        max_label = max(8, min(self.widest_label, options.max_width // self.label_share - _GAP))
        for i, part in enumerate(self._parts(options.max_width, max_label)):
            if i:
                yield Text()
            yield self._table(part, max_label)
        if self.caption:
            yield Text(self.caption, style="dim")

    def _parts(self, width: int, max_label: int) -> list[list[_Column]]:
        free = width + 1 - sum(min(column.width, max_label) + _GAP for column in self.labels)
        parts: list[list[_Column]] = [[]]
        used = 0
        for column in self.values:
            if parts[-1] and used + column.width + _GAP > free:
                parts.append([])
                used = 0
            parts[-1].append(column)
            used += column.width + _GAP
        return parts

    def _table(self, values: Sequence[_Column], max_label: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        for column in self.labels:
            table.add_column(
                Text(column.title),
                justify="right" if column.justify == "right" else "left",
                overflow="fold",
                max_width=max_label,
            )
        for column in values:
            header = Text(column.title, justify="right" if column.justify == "right" else "left")
            table.add_column(header, justify="left", min_width=column.width, overflow="fold")
        for cells in zip(*(column.cells for column in [*self.labels, *values]), strict=True):
            table.add_row(*cells)
        return table


def policy_table(rows: Sequence[PolicyRow], digits: int = 2, title: str = "Policies") -> WideTable:
    """A row per policy: its name and, for each metric, the value and the difference to the reference.

    A cell is two lines, `1.23 [1.10, 1.36]` and below it `+0.40 [0.31, 0.49] *`; the star stands where the
    interval of the difference excludes 0. Metrics appear in the order in which the rows first name them.
    """
    metrics = list(dict.fromkeys(metric for row in rows for metric in row.metrics))
    columns = [
        _Column(
            metric,
            _policy_cells([(row.metrics.get(metric), row.deltas.get(metric)) for row in rows], digits),
        )
        for metric in metrics
    ]
    counts = {row.metrics[metric].n for row in rows for metric in row.metrics}
    over = f" over {counts.pop()} prompts" if len(counts) == 1 else ""
    caption = f"[lo, hi]: 95% interval{over}"
    if any(row.deltas for row in rows):
        caption += "; second line: difference to the reference, * where its interval excludes 0"
    names = _Column("policy", [Text(row.name) for row in rows], justify="left")
    return WideTable([names], columns, title, caption)


def figure_table(
    columns: Mapping[str, Mapping[str, Interval]], digits: int = 3, title: str = "", label: str = "figure"
) -> WideTable:
    """A row per figure, in the order in which the columns first name them; what a column lacks is a dash.

    Args:
        columns: title -> figures by name; beside a figure stands n, what it is over.
        digits: decimals.
        title: shown above the table.
        label: what the rows are.
    """
    names = list(dict.fromkeys(name for figures in columns.values() for name in figures))
    values = []
    for heading, figures in columns.items():
        texts = _aligned([_figure_numbers(figures.get(name), digits) for name in names])
        counts = ["n", *(str(figures[name].n) if name in figures else MISSING for name in names)]
        width = max(len(text) for text in counts)
        first, *cells = (
            f"{text}   {count.rjust(width)}"
            for text, count in zip([heading.rjust(len(texts[0])), *texts], counts, strict=True)
        )
        values.append(_Column(first, [Text(cell, justify="left") for cell in cells]))
    rows = _Column(label, [Text(name) for name in names], justify="left")
    return WideTable([rows], values, title, "[lo, hi]: 95% interval", widest_label=40, label_share=2)


def _figure_numbers(estimate: Interval | None, digits: int) -> tuple[str, str, str]:
    """As `_numbers`, but a figure without an interval that would be rounded to 0 is written with its power of ten."""
    value, lo, hi = _numbers(estimate, digits)
    if estimate is not None and not lo and 0 < abs(estimate.value) < 0.5 * 10**-digits:
        value = f"{estimate.value:.1e}"
    return value, lo, hi


def _policy_cells(pairs: Sequence[tuple[Interval | None, Interval | None]], digits: int) -> list[Text]:
    """Cells of one metric, all lines equally long so that the numbers stand below each other."""
    values = [_numbers(value, digits) for value, _ in pairs]
    deltas = [_numbers(delta, digits, sign=True) for _, delta in pairs if delta is not None]
    texts = _aligned(values + deltas)
    lines = iter(texts[len(values) :])
    cells = []
    for text, (_, delta) in zip(texts[: len(values)], pairs, strict=True):
        cell = Text(text + ("  " if deltas else ""), justify="left")
        if delta is not None:
            resolved = excludes_zero(delta)
            cell.append(f"\n{next(lines)} {'*' if resolved else ' '}", style="bold" if resolved else "dim")
        cells.append(cell)
    return cells


def _numbers(estimate: Interval | None, digits: int, sign: bool = False) -> tuple[str, str, str]:
    """Value, lower and upper end as texts; the ends are empty where there is no interval."""
    if estimate is None:
        return MISSING, "", ""
    value = format_number(estimate.value, digits, sign)
    if math.isnan(estimate.lo) or math.isnan(estimate.hi):
        return value, "", ""
    return value, format_number(estimate.lo, digits), format_number(estimate.hi, digits)


def _aligned(numbers: Sequence[tuple[str, str, str]]) -> list[str]:
    """`value [lo, hi]` for each, equally long, every part padded to its widest."""
    widths = [max(len(part[i]) for part in numbers) for i in range(3)]
    width = widths[0] + (widths[1] + widths[2] + len(" [, ]") if widths[1] else 0)
    texts = []
    for value, lo, hi in numbers:
        ends = f" [{lo.rjust(widths[1])}, {hi.rjust(widths[2])}]" if lo else ""
        texts.append((value.rjust(widths[0]) + ends).ljust(width))
    return texts


def sweep_table(
    rows: Sequence[Mapping[str, object]], labels: Sequence[str], digits: int = 2, title: str = "Sweep"
) -> WideTable:
    """A row per job, or per group of seeds.

    Args:
        rows: values are text, numbers, estimates (an `Interval`: shown with its ends) or None (shown as a
        dash). labels: the keys that tell the rows apart (swept keys, seed, status), in order. All other keys
        are metrics,
            in the order in which the rows first name them.
        digits: decimals of metrics; labels are shown as they are.
        title: shown above the table.
    """
    metrics = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in labels]
    return WideTable(
        [_label_column(key, [row.get(key) for row in rows]) for key in labels],
        [_value_column(key, [row.get(key) for row in rows], digits) for key in metrics],
        title,
        "[lo, hi]: 95% interval" if any(is_interval(v) for row in rows for v in row.values()) else "",
    )


def _label_column(title: str, values: Sequence[object]) -> _Column:
    texts = [MISSING if v is None else f"{v:g}" if isinstance(v, float) else str(v) for v in values]
    numeric = all(v is None or _is_number(v) for v in values)
    return _Column(title, [Text(text) for text in texts], "right" if numeric else "left")


def _value_column(title: str, values: Sequence[object], digits: int) -> _Column:
    if any(is_interval(v) for v in values):
        texts = _aligned([_numbers(cast(Interval, v) if is_interval(v) else None, digits) for v in values])
        justify = "right"
    else:
        texts = [_scalar(v, digits) for v in values]
        justify = "right" if all(v is None or _is_number(v) for v in values) else "left"
    width = max(len(text) for text in [title, *texts])
    pad = str.rjust if justify == "right" else str.ljust
    return _Column(title, [Text(pad(text, width), justify="left") for text in texts], justify)


def _scalar(value: object, digits: int) -> str:
    if value is None:
        return MISSING
    return format_number(value, digits) if isinstance(value, float) else str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_csv(
    path: str | Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None
) -> None:
    """Write rows as UTF-8 CSV with a header; the file appears whole or not at all.

    An estimate under the key `metric` becomes the columns metric, metric_lo and metric_hi. Columns come in
    the order of `columns` first (present even where no row has them), then in the order in which the rows
    first name them. None, NaN and missing keys are empty fields; floats keep all their digits.
    """
    flat = [_flatten(row) for row in rows]
    header = list(dict.fromkeys([*(columns or ()), *(key for row in flat for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_file(path, text.getvalue().encode("utf-8", errors="replace"))


def _flatten(row: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in row.items():
        if is_interval(value):
            estimate = cast(Interval, value)
            flat |= {key: estimate.value, f"{key}_lo": estimate.lo, f"{key}_hi": estimate.hi}
        else:
            flat[key] = value
    return {key: "" if _is_empty(value) else value for key, value in flat.items()}


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


__all__ = ["PolicyRow", "WideTable", "figure_table", "format_estimate", "policy_table", "sweep_table", "write_csv"]
