"""What Hydra knows of a job, for the code that does not see Hydra."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Context:
    """A job's place: its folder, its command line, its sweep."""

    folder: Path
    argv: tuple[str, ...]
    sweep: str | None  # name of the sweep's folder, inside a sweep
    flat: dict[str, Any]  # the resolved config by dotted key
