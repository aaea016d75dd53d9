"""What the studies share: commands that are run, figures that are read, tables that are written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from rlhf_cli.build import dataset
from rlhf_cli.commands.launch import launch
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.settings import ReviewsSettings
from rlhf_cli.evaluation.statistics import Estimate

_TOLD = 2000  # characters of a failed command's log


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
    _ended(status, arguments, log)


def rlhf_here(*arguments: str, log: Path) -> None:
    """As `rlhf`, in this process, which has loaded what a process of its own would spend its first seconds on."""
    print("rlhf", *arguments, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream, redirect_stdout(stream), redirect_stderr(stream):
        status = launch(arguments[0], arguments[1:])
    _ended(status, arguments, log)


def _ended(status: int, arguments: Sequence[str], log: Path | None) -> None:
    if status:
        said = "" if log is None else f"{log}:\n{log.read_text(encoding='utf-8', errors='replace')[-_TOLD:]}"
        print(f"failed with status {status}: rlhf {' '.join(arguments)}\n{said}", file=sys.stderr, flush=True)
        raise SystemExit(status)


@dataclass(frozen=True)
class Command:
    """One call of rlhf, and where what it prints goes."""

    arguments: Sequence[str]
    log: Path


def run_all(commands: Sequence[Command], jobs: int) -> None:
    """Runs the commands, `jobs` at a time; ends the study where one of them fails."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        started = [pool.submit(rlhf, *command.arguments, log=command.log) for command in commands]
        try:
            for one in as_completed(started):
                one.result()
        except SystemExit:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def end_with_parent(parent: int) -> None:
    """This process ends when its parent has, however that ended; what it was at goes on when the study is run again."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def overrides_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A study's own arguments, and the overrides for every run, which follow `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def quiet() -> None:
    """No progress bars where models are loaded."""
    disable_progress_bar()


def read(folder: Path) -> dict[str, float]:
    """A run's final figures."""
    values: dict[str, float] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return values


def write_json(file: Path, value: Any) -> None:
    """Readable, and the same bytes for the same value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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
