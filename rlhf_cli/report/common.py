"""What tables and plots share: the shape of an estimate, and files that are never half written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

from rlhf_cli.files import write_bytes_atomic


class Interval(Protocol):
    """A figure with its interval: what `evaluation.statistics.Estimate` is, known here by its shape alone.

    `lo` and `hi` are NaN where there is no interval.
    """

    @property
    def value(self) -> float:
        """The figure."""

    @property
    def lo(self) -> float:
        """Lower end."""

    @property
    def hi(self) -> float:
        """Upper end."""

    @property
    def n(self) -> int:
        """Independent observations behind it."""


def is_interval(item: object) -> bool:
    """Whether `item` has the shape of `Interval`."""
    return all(hasattr(item, name) for name in ("value", "lo", "hi", "n"))


def excludes_zero(estimate: Interval) -> bool:
    """Whether the interval lies on one side of 0; without an interval it does not."""
    return estimate.lo > 0 or estimate.hi < 0


def format_number(x: float, digits: int = 2, sign: bool = False) -> str:
    """`x` with `digits` decimals (`sign` adds a plus), never a minus zero; "n/a" where it is not finite."""
    if not math.isfinite(x):
        return "n/a"
    text = f"{x:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "+" if sign else "") if float(text) == 0 else text


def format_estimate(estimate: Interval, digits: int = 2, sign: bool = False) -> str:
    """`0.42 [0.31, 0.55]`, or `0.42` alone where there is no interval."""
    value = format_number(estimate.value, digits, sign)
    if math.isnan(estimate.lo) or math.isnan(estimate.hi):
        return value
    return f"{value} [{format_number(estimate.lo, digits)}, {format_number(estimate.hi, digits)}]"


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file that appears whole or not at all; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, content)
