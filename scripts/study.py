"""What the studies share: commands side by side, each with a log of its own, and the figures they leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOLD = 2000  # characters of a failed command's log


@dataclass(frozen=True)
class Command:
    """One call of rlhf."""

    arguments: Sequence[str]
    log: Path


def overrides_apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A study's own arguments, and the overrides for every run, which follow `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def run_all(commands: Sequence[Command], jobs: int) -> None:
    """Runs the commands, `jobs` at a time; ends the study where one of them fails."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for status in pool.map(_run, commands):
            if status:
                pool.shutdown(wait=True, cancel_futures=True)
                raise SystemExit(status)


def _run(command: Command) -> int:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    print("rlhf", *command.arguments, flush=True)
    with command.log.open("w", encoding="utf-8") as log:
        arguments = [sys.executable, "-m", "rlhf_cli", *command.arguments]
        status = subprocess.run(arguments, stdout=log, stderr=subprocess.STDOUT).returncode
    if status:
        said = command.log.read_text(encoding="utf-8", errors="replace")
        print(f"{command.log}: status {status}\n{said[-_TOLD:]}", file=sys.stderr, flush=True)
    return status


def read(folder: Path) -> dict[str, Any]:
    """A run's final figures."""
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return values


def write_json(file: Path, value: Any) -> None:
    """Readable, and the same bytes for the same value."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
