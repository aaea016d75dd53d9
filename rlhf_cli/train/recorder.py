"""A run from its first line to its last: run.json, metrics, samples, tracker, display and summary in one hand."""

from __future__ import annotations

import logging
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from rlhf_cli.errors import RequestError
from rlhf_cli.files import take_folder
from rlhf_cli.settings import CheckpointSettings
from rlhf_cli.train.checkpoint import Checkpoint, Checkpoints, Durable
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.progress import Progress
from rlhf_cli.train.run_folder import RunFolder, RunRecord, Status
from rlhf_cli.train.stopping import STOP
from rlhf_cli.train.tracking import NullTracker, Tracker

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What a run writes about itself."""

    folder: Path
    command: str
    name: str
    argv: Sequence[str]
    seed: int
    device: str
    threads: int
    upstream: Mapping[str, Mapping[str, str]]  # stage -> {"path", "digest"}
    data: str  # name of the rows' source
    rows_digest: Callable[[], str | None]  # of the rows it trains on; asked by the process that records
    title: str  # shown before the progress bar
    num_steps: int
    keys: Sequence[str]  # metrics shown while it runs
    make_tracker: Callable[[str, int | None], Tracker]  # run id, step it resumes after -> tracker
    checkpoint: CheckpointSettings
    resume: bool = False  # continue what the folder holds
    world: World = ALONE  # the processes that share the run; the main one writes
    steps_done: Callable[[], int] | None = None  # of a run that keeps checkpoints in folders of its parts


class RunRecorder:
    """Sends each figure of a run to the run folder, the tracker and the screen."""

    def __init__(self, run: RunFolder, tracker: Tracker, progress: Progress, durable: Durable) -> None:
        """`durable`: checkpoints to write and to continue."""
        self.run = run
        self.durable = durable
        self.tracker = tracker
        self.progress = progress

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """One row of metrics."""
        self.run.append_metrics({"step": step, **row})
        self.tracker.log(step, row)
        self.progress.update(step, row)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples."""
        self.run.append_samples(rows)
        self.tracker.samples(step, rows)

    def message(self, text: str) -> None:
        """A line for the person watching."""
        self.progress.message(text)

    def expect(self, num_steps: int) -> None:
        """How many steps there will be, where that is known only after the run has begun."""
        self.progress.expect(num_steps)

    def sync(self) -> None:
        """Brings the rows to the disk."""
        self.run.sync()

    def summary(self, values: Mapping[str, float]) -> None:
        """The final figures."""
        self.run.write_summary(values)
        self.tracker.summary(values)


class SilentRecorder:
    """Takes the figures of a process that is not the main one: the main one has the same."""

    def __init__(self, durable: Durable) -> None:
        """`durable`: the checkpoint to continue."""
        self.durable = durable

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def expect(self, num_steps: int) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Nothing."""


@contextmanager
def shared_run(request: RunRequest) -> Iterator[RunRecorder | SilentRecorder]:
    """A run that several processes share: the main one records it, and says which checkpoint all continue."""
    if request.world.is_main:
        with recorded_run(request) as recorder:
            yield recorder
    else:
        step = request.world.from_main(lambda: None)
        checkpoint = None if step is None else _checkpoints(request, []).load(step)
        yield SilentRecorder(Durable(_checkpoints(request, []), request.checkpoint.every, STOP, checkpoint))


def _checkpoints(request: RunRequest, notes: list[str]) -> Checkpoints:
    return Checkpoints(RunFolder(request.folder).checkpoints, request.checkpoint.keep, notes.append)


@dataclass(frozen=True)
class _Opened:
    """A folder that is ours to write to."""

    run: RunFolder
    lock: FileLock
    checkpoints: Checkpoints
    checkpoint: Checkpoint | None  # to continue
    resumed_from: int | None  # its step, 0 where a resumed run begins anew; None for a new run
    rows_digest: str | None  # of the rows it trains on
    notes: list[str]  # for the person watching


def _open(request: RunRequest) -> _Opened:
    """Takes the folder and finds the checkpoint to continue.

    Raises:
        RequestError: another process is writing there, as one that was taken for dead may do.
    """
    request.folder.mkdir(parents=True, exist_ok=True)
    lock = take_folder(request.folder)
    try:
        return _find(request, lock)
    except BaseException:
        lock.release()
        raise


def _find(request: RunRequest, lock: FileLock) -> _Opened:
    """What there is in a folder that is ours."""
    run = RunFolder(request.folder)
    for left in request.folder.glob(".*.tmp"):  # of a file that a kill kept from getting its name
        left.unlink(missing_ok=True)
    notes: list[str] = []
    checkpoints = _checkpoints(request, notes)
    rows_digest = request.rows_digest()
    if not (request.resume and run.record_path.is_file()):
        return _Opened(RunFolder.create(request.folder), lock, checkpoints, None, None, rows_digest, notes)
    _check_same_origin(request, rows_digest, run.record())
    checkpoint = checkpoints.latest()
    resumed_from = 0 if checkpoint is None else checkpoint.step
    if request.steps_done is not None:
        resumed_from = request.steps_done()
    run.rewind(resumed_from)
    notes.append(f"resuming after step {resumed_from}")
    return _Opened(run, lock, checkpoints, checkpoint, resumed_from, rows_digest, notes)


def _check_same_origin(request: RunRequest, rows_digest: str | None, before: RunRecord) -> None:
    """Raises RequestError where a run would go on from other models or rows than it began with."""
    where = f"run_dir={request.folder}: resume=auto needs"
    for stage in sorted({*before.upstream, *request.upstream}):
        old, new = (one.get(stage, {}).get("digest") for one in (before.upstream, request.upstream))
        if old != new:
            raise RequestError(f"{where} the same upstream models; {stage} has changed ({old} before, {new} now)")
    if before.rows_digest is not None and before.rows_digest != rows_digest:
        raise RequestError(f"{where} the same rows; those of data={request.data} have changed")


@contextmanager
def recorded_run(request: RunRequest) -> Iterator[RunRecorder]:
    """Opens a run and closes it with the status it earned: finished, failed or interrupted."""
    opened: _Opened | None = None

    def open_folder() -> int | None:
        nonlocal opened
        opened = _open(request)
        return None if opened.checkpoint is None else opened.checkpoint.step

    request.world.from_main(open_folder)
    assert opened is not None, "only the main process records"
    try:
        yield from _recorded(request, opened)
        for best in opened.checkpoints.folder.glob("best-*"):  # nothing can go back to it any more
            shutil.rmtree(best, ignore_errors=True)
    finally:
        opened.lock.release()


def _recorded(request: RunRequest, opened: _Opened) -> Iterator[RunRecorder]:
    run, resumed_from = opened.run, opened.resumed_from
    record = run.start(
        command=request.command,
        name=request.name,
        argv=request.argv,
        seed=request.seed,
        device=request.device,
        threads=request.threads,
        processes=request.world.size,
        upstream=request.upstream,
        rows_digest=opened.rows_digest,
        resumed_from=resumed_from,
    )
    tracker: Tracker = NullTracker()
    durable = Durable(opened.checkpoints, request.checkpoint.every, STOP, opened.checkpoint)
    status: Status = "failed"
    error: str | None = None
    try:
        tracker = request.make_tracker(record.id, resumed_from)
        with Progress(request.num_steps, request.title, request.keys, start_step=resumed_from or 0) as progress:
            for note in opened.notes:
                progress.message(note)
            yield RunRecorder(run, tracker, progress, durable)
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except BaseException as failure:
        error = traceback.format_exception_only(failure)[-1]
        raise
    finally:
        _close(run, tracker, status, error)


def _close(run: RunFolder, tracker: Tracker, status: Status, error: str | None) -> None:
    """Writes the end. What goes wrong here is raised only after a run that went well: it would hide why it did not.

    A run is finished after its tracker is: killed before, it is taken up again.
    """
    if status == "finished":
        _finish(tracker, status)
        run.finish(status, error)
        return
    with suppress(Exception):
        run.finish(status, error)
    _finish(tracker, status)


def _finish(tracker: Tracker, status: Status) -> None:
    """A tracker is a convenience: the run does not fail with it."""
    try:
        tracker.finish(status)
    except Exception:
        _log.warning("the tracker could not be closed", exc_info=True)
