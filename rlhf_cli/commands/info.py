"""info: this installation, or a run folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf_cli.commands.help import GROUPS, conf_path, usable_choices
from rlhf_cli.commands.job import ERROR_FILE
from rlhf_cli.commands.show import OF_PARTS, display_path, front_table, shown
from rlhf_cli.errors import RequestError
from rlhf_cli.train.provenance import versions


def info(path: Path | None) -> int:
    """Prints; returns the exit status."""
    console = Console(highlight=False, markup=False, emoji=False)  # [a,b] is a list here, not a style
    if path is None:
        _installation(console)
        return 0
    try:
        record, summary = _read(path)
    except RequestError as error:
        print(f"rlhf: {error}", file=sys.stderr)
        return 2
    _run(console, path, record, summary)
    return 0


def _read(path: Path) -> tuple[dict[str, Any], dict[str, float | None]]:
    """run.json, and summary.json where the run got that far. Raises RequestError."""
    begun = (path / "run.json").is_file()
    if not begun and not (path / ERROR_FILE).is_file():
        raise RequestError(f"info {path}: holds no run (no run.json)")
    found = []
    for name in ("run.json" if begun else ERROR_FILE, "summary.json"):
        file = path / name
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
        except ValueError as error:
            raise RequestError(f"info {path}: {name} is not JSON ({error})") from None
    return found[0], found[1]


def _installation(console: Console) -> None:
    import torch

    table = _table()
    for name, version in versions().items():
        table.add_row(name, version or "not installed")
    table.add_row("devices", ", ".join(_devices()))
    table.add_row("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores")
    table.add_row("config", str(conf_path()))
    for group in GROUPS:
        table.add_row(f"{group}=", ", ".join(usable_choices(group)))
    cached = sorted(Path("outputs/cache").glob("*/stage.json"))
    table.add_row("cached stages", ", ".join(file.parent.name for file in cached) or "none in outputs/cache")
    console.print(table)


def _devices() -> list[str]:
    import torch

    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def _run(console: Console, path: Path, record: dict[str, Any], summary: dict[str, float | None]) -> None:
    table = _table()
    for key in ("status", "error", "command", "name", "start", "end", "seed", "device", "threads", "git_commit"):
        if record.get(key) is not None:
            table.add_row(key, str(record[key]))
    if "argv" in record:  # not in ERROR_FILE
        table.add_row("argv", " ".join(record["argv"]))
    for stage, artifact in record.get("upstream", {}).items():
        table.add_row(stage, f"{artifact['path']} ({artifact['digest'][:12]})")
    console.print(table)
    if summary:
        figures = _table()
        for key, value in summary.items():
            if not key.startswith(OF_PARTS):
                figures.add_row(key, shown(value))
        console.print(figures)
        if front := front_table(summary):
            console.print(front)
    for file in sorted(path.rglob("*.png")):
        console.print(str(display_path(file)), markup=False, soft_wrap=True)


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table
