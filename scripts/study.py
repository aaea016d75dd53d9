"""What the studies share: commands that are run, figures that are read, tables that are written."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rlhf_cli.build import dataset
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.settings import ReviewsSettings
from rlhf_cli.evaluation.statistics import Estimate


def rlhf(*arguments: str, log: Path | None = None) -> None:
    """One command; ends the study where it fails. What it prints goes to the end of `log`, where there is one."""
    print("rlhf", *arguments, flush=True)
    line = [sys.executable, "-m", "rlhf_cli", *arguments]
    if log is None:
        status = subprocess.run(line).returncode
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a", encoding="utf-8") as stream:
            status = subprocess.run(line, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL).returncode
    if status:
        print(f"failed with status {status}: rlhf {' '.join(arguments)}{f' (see {log})' if log else ''}")
        raise SystemExit(status)


def quiet() -> None:
    """No progress bars where models are loaded."""
    disable_progress_bar()


def read(folder: Path) -> dict[str, float]:
    """A run's final figures."""
    values: dict[str, float] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return values


def reviews_of(folder: Path) -> Dataset:
    """The rows that a run on the embedded data was given.

    Args:
        folder: of the run, or below it.

    Raises:
        SystemExit: no run there, or one on other data.
    """
    for place in (folder, *folder.parents[:3]):
        file = place / "run_config.json"
        if file.is_file():
            config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            data = {key.removeprefix("data."): value for key, value in config.items() if key.startswith("data.")}
            known = {name for name in ReviewsSettings.__dataclass_fields__ if name in data}
            if not {"num_pairs", "label_temperature"} <= known:
                raise SystemExit(
                    f"{place}: was run on data={data.get('name')}; expected the embedded data, reviews"
                )
            return dataset(ReviewsSettings(**{name: data[name] for name in known}), num_validation_prompts=1)
    raise SystemExit(f"{folder}: is not in the folder of a run (no run_config.json)")


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return math.fsum(values) / len(values)


def cell(one: Estimate, digits: int) -> str:
    """Mean and half of the interval.

    >>> cell(Estimate(1.0, 0.5, 1.5, 3), 2)
    '1.00 ± 0.50'
    """
    spread = "" if math.isnan(one.lo) else f" ± {one.half_width:.{digits}f}"
    return f"{one.value:.{digits}f}{spread}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"
