"""The files of a run: what was asked, what happened, and the numbers.

    run.json           `RunRecord`: status, command, argv, versions, seed, upstream artifacts, start and end
    metrics.jsonl      one object a line: step, time_s, then the metrics by name; finite numbers or null
    samples.jsonl      prompt, completion, reward, kl, length, step (and gold where it is known)
    summary.json       the final figures, flat
    model/ checkpoints/ plots/ report.html

Appended files may end in a torn line after a kill; readers drop it and say so. The others are replaced whole.
"""

from __future__ import annotations

import json
import math
import operator
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsFloat, cast

from rlhf_cli.errors import RequestError
from rlhf_cli.files import naming, sync_file, write_bytes_atomic, write_json_atomic
from rlhf_cli.train.provenance import git_state, mask_secrets, versions

Status = Literal["running", "finished", "failed", "interrupted"]
Number = int | float | None

_SAMPLE_KEYS = ("prompt", "completion", "reward", "kl", "length", "step")
_OPTIONAL = ("gold", "terms")


@dataclass(frozen=True)
class RunRecord:
    """What run.json holds."""

    id: str  # random, the same over resumes: trackers know the run by it
    status: Status
    command: str  # "train-policy", ...
    name: str  # what tables and plots call the run
    argv: list[str]  # as typed, values of secrets masked
    seed: int
    device: str
    threads: int  # of each process
    versions: dict[str, str | None]
    git_commit: str | None  # of the repository around the working folder
    git_dirty: bool | None  # True where tracked files differ from that commit
    upstream: dict[str, dict[str, str]]  # stage -> {"path": ..., "digest": ...}
    start: str  # ISO 8601, UTC, of the first start
    end: str | None = None
    resumed_from: list[int] = field(default_factory=list)  # steps of the checkpoints that were continued
    error: str | None = None  # one line, where status is failed
    processes: int = 1  # that share the run, since its last start
    rows_digest: str | None = None  # of the rows it trains on


class JsonLines(NamedTuple):
    """The rows of a file of JSON lines."""

    rows: list[dict[str, Any]]
    torn: bool  # True = the last line was cut off by a kill and is not among the rows


@dataclass(frozen=True)
class RunFolder:
    """A run's folder. The object only knows where things are; every call reads or writes the files."""

    path: Path

    @classmethod
    def create(cls, path: Path | str) -> RunFolder:
        """Make the folder of a new run.

        Other files (Hydra's .hydra/ and its log are there before us) are left alone. Raises RequestError
        where the folder holds a run, is a file, or cannot be made.
        """
        folder = cls(Path(path))
        if folder.holds_run:
            raise RequestError(f"run_dir={path}: already holds a run; choose another folder")
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"run_dir={path}: cannot be created ({error.strerror})") from None
        return folder

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """The folder of a run that was started before. Raises RequestError where there is none."""
        folder = cls(Path(path))
        if not folder.record_path.is_file():
            raise RequestError(f"run_dir={path}: holds no run (no run.json)")
        return folder

    @property
    def holds_run(self) -> bool:
        """Whether a run wrote here, finished or not."""
        return any(path.exists() for path in (self.record_path, self.metrics_path, self.model))

    @property
    def record_path(self) -> Path:
        """run.json."""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """samples.jsonl."""
        return self.path / "samples.jsonl"

    @property
    def summary_path(self) -> Path:
        """summary.json."""
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        """The final model with its tokenizer."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """The parent of step-N/."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """The figures."""
        return self.path / "plots"

    @property
    def report(self) -> Path:
        """report.html."""
        return self.path / "report.html"

    def start(
        self,
        *,
        command: str,
        name: str,
        argv: Sequence[str],
        seed: int,
        device: str,
        threads: int,
        processes: int = 1,
        rows_digest: str | None = None,
        upstream: Mapping[str, Mapping[str, str]] | None = None,
        resumed_from: int | None = None,
    ) -> RunRecord:
        """Write run.json with status `running`.

        upstream: stage -> {"path", "digest"} of what the run builds on. resumed_from: the step of the
        checkpoint that is continued; the id and the first start are then kept from the record that is there.
        """
        commit, dirty = git_state(Path.cwd())
        record = RunRecord(
            id=uuid.uuid4().hex[:12],
            status="running",
            command=command,
            name=name,
            argv=mask_secrets(argv),
            seed=seed,
            device=device,
            threads=threads,
            versions=versions(),
            git_commit=commit,
            git_dirty=dirty,
            upstream={stage: dict(artifact) for stage, artifact in (upstream or {}).items()},
            start=_now(),
            processes=processes,
            rows_digest=rows_digest,
        )
        if resumed_from is not None:
            before = self.record()
            steps = [*before.resumed_from, resumed_from]
            record = replace(record, id=before.id, start=before.start, resumed_from=steps)
        write_json_atomic(self.record_path, asdict(record))
        return record

    def finish(self, status: Status, error: str | None = None) -> RunRecord:
        """Write the end into run.json. error: why it failed, brought onto one line."""
        line = None if error is None else " ".join(error.split())
        record = replace(self.record(), status=status, end=_now(), error=line)
        write_json_atomic(self.record_path, asdict(record))
        return record

    def record(self) -> RunRecord:
        """run.json. Raises RequestError where it is missing or was written by another version's layout."""
        try:
            values = json.loads(self.record_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RequestError(f"run_dir={self.path}: holds no run (no run.json)") from None
        except ValueError as error:
            raise RequestError(f"{self.record_path}: not valid JSON ({error})") from None
        known = {item.name for item in fields(RunRecord)}
        try:
            return RunRecord(**{key: value for key, value in values.items() if key in known})
        except (TypeError, AttributeError):
            raise RequestError(f"{self.record_path}: not the record of a run") from None

    def append_metrics(self, row: Mapping[str, object]) -> None:
        """Append one step's row to metrics.jsonl and flush it.

        Values are None, Python numbers, or NumPy or torch scalars; nan and infinities become null. Keys come
        in the order step, time_s, then by name; floats have the digits that give them back exactly.
        """
        assert "step" in row, "a row of metrics has a step"
        order = sorted(row, key=lambda key: (key != "step", key != "time_s", key))
        _append_lines(self.metrics_path, [{key: finite(row[key]) for key in order}])

    def append_samples(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append samples to samples.jsonl: prompt, completion, reward, kl, length, step and, if there, gold.

        A prompt is a text or the turns of a chat, mappings or objects with `role` and `content`.
        """
        _append_lines(self.samples_path, [_sample(row) for row in rows])

    def write_summary(self, values: Mapping[str, object]) -> None:
        """Replace summary.json by `values`: flat, sorted by name, finite numbers or null."""
        write_json_atomic(self.summary_path, {key: finite(values[key]) for key in sorted(values)})

    def metrics(self) -> JsonLines:
        """The rows of metrics.jsonl, none where nothing was logged yet."""
        return read_jsonl(self.metrics_path) if self.metrics_path.exists() else JsonLines([], False)

    def sync(self) -> None:
        """Bring the appended rows to the disk."""
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                sync_file(path)

    def rewind(self, step: int) -> None:
        """Forget the rows after `step` (and a torn last line), so that a resumed run writes them once.

        The rows that stay, stay byte for byte.
        """
        for path in (self.metrics_path, self.samples_path):
            if path.exists():
                lines = path.read_bytes().split(b"\n")
                kept = [
                    line for line, row in zip(lines, read_jsonl(path).rows, strict=False) if row["step"] <= step
                ]
                write_bytes_atomic(path, b"".join(line + b"\n" for line in kept))


def read_jsonl(path: Path) -> JsonLines:
    """The objects of a file of JSON lines; a last line without its newline is dropped and reported as torn.

    Raises ValueError with the line's number where any other line is not a JSON object.
    """
    *lines, rest = path.read_bytes().split(b"\n")  # bytes: text splits at U+2028 and the like, too
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a JSON object")
        rows.append(row)
    return JsonLines(rows, torn=bool(rest))


def finite(value: object) -> Number:
    """A scalar of Python, NumPy or torch as a Python number; None for None, nan and the infinities.

    Raises TypeError for anything else, texts of digits included.
    """
    if value is None:
        return None
    if isinstance(value, (str, bytes)):
        raise TypeError(f"{value!r} is not a number")
    try:
        return operator.index(cast(Any, value))
    except TypeError:
        number = float(cast(SupportsFloat, value))
    return number if math.isfinite(number) else None


def _sample(row: Mapping[str, object]) -> dict[str, object]:
    unknown = set(row) - {*_SAMPLE_KEYS, *_OPTIONAL}
    assert not unknown, f"not keys of a sample: {sorted(unknown)}"
    convert: dict[str, Callable[[Any], object]] = {
        "prompt": plain_prompt,
        "completion": str,
        "terms": _finite_values,
    }
    keys = [*_SAMPLE_KEYS, *(key for key in _OPTIONAL if key in row)]
    return {key: convert.get(key, finite)(row[key]) for key in keys}


def _finite_values(terms: Mapping[str, object]) -> dict[str, object]:
    return {name: finite(value) for name, value in terms.items()}


def plain_prompt(prompt: object) -> str | list[dict[str, str]]:
    """A prompt as JSON has it: a text, or a list of {"role", "content"}."""
    if isinstance(prompt, str):
        return prompt
    turns = []
    for turn in cast(Iterable[Any], prompt):
        pick = turn.__getitem__ if isinstance(turn, Mapping) else turn.__getattribute__
        turns.append({"role": str(pick("role")), "content": str(pick("content"))})
    return turns


def _append_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Append whole lines; closing the file flushes them."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    with naming(path), path.open("ab") as file:
        file.write(text.encode("utf-8", errors="replace"))  # see write_json_atomic


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
