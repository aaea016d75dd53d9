"""A run that is made of several fits, one after the other: one count of steps, samples and time over all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cli.files import write_json_atomic
from rlhf_cli.train.checkpoint import Checkpoints
from rlhf_cli.train.loop import FitResult, Recorder

# In the folder of a part whose end and rows have reached the disk.
_FINISHED_FILE = "finished.json"


@dataclass(frozen=True)
class PartResult:
    """How a part ended; JSON on the disk."""

    score: float  # of its last evaluation
    step: int = 0
    samples: int = 0
    tokens: int = 0
    time_s: float = 0.0
    checkpoint_s: float = 0.0
    parameters: Mapping[str, int] = field(default_factory=dict)  # trained, and all

    @classmethod
    def of(cls, result: FitResult, parameters: Mapping[str, int]) -> PartResult:
        """What remains of a fit."""
        return cls(
            result.final.score,
            result.last_step,
            result.samples,
            result.tokens,
            result.time_s,
            result.checkpoint_s,
            dict(parameters),
        )


def mark_finished(folder: Path, result: PartResult) -> None:
    """Says that the part in `folder` need not be run again."""
    write_json_atomic(folder / _FINISHED_FILE, asdict(result))


def finished(folder: Path) -> PartResult | None:
    """How the part in `folder` ended; None where it has not."""
    file = folder / _FINISHED_FILE
    return PartResult(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None


def steps_done(folders: Sequence[Path], keep: int) -> int:
    """Steps that a resumed run need not take again: of the finished parts, and of the next one's checkpoint."""
    done = 0
    for folder in folders:
        result = finished(folder)
        if result is None:
            return done + (Checkpoints(folder / "checkpoints", keep, lambda line: None).newest_step() or 0)
        done += result.step
    return done


class PartRecorder:
    """Records a part as a stretch of the whole run."""

    def __init__(self, whole: Recorder, before: Sequence[PartResult], extra: Mapping[str, float]) -> None:
        """Where the part stands.

        Args:
            whole: the run's recorder.
            before: the parts that have ended.
            extra: what every row of the part has beside its own metrics.
        """
        self._whole = whole
        self._extra = dict(extra)
        self._step = sum(part.step for part in before)
        self._totals = {
            "samples": sum(part.samples for part in before),
            "tokens": sum(part.tokens for part in before),
            "time_s": sum(part.time_s for part in before),
        }

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """One row of metrics, counted over the whole run."""
        counted = {name: row[name] + before for name, before in self._totals.items()}
        self._whole.metrics(self._step + step, {**row, **counted, **self._extra})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples."""
        self._whole.samples(self._step + step, [{**row, "step": self._step + step} for row in rows])

    def message(self, text: str) -> None:
        """A line for the person watching."""
        self._whole.message(text)

    def sync(self) -> None:
        """Brings the rows to the disk."""
        self._whole.sync()
