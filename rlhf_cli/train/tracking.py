"""Where metrics go beside metrics.jsonl: Weights & Biases, TensorBoard, or nowhere.

A tracker is a convenience and the run folder is the record: whatever goes wrong at W&B (no account, no
network, its service gone or hanging) is reported once and training goes on.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_cli.errors import RequestError
from rlhf_cli.train.run_folder import RunFolder, Status, finite, plain_prompt, read_jsonl

Mode = Literal["online", "offline", "disabled"]

# Waits; WANDB_INIT_TIMEOUT, WANDB_LOGIN_TIMEOUT and WANDB_FINISH_TIMEOUT change the first three.
_INIT_TIMEOUT_S = 25.0  # W&B tries a server that refuses again and again until then
_LOGIN_TIMEOUT_S = 30.0  # for the question wandb asks a person at a terminal who is not logged in
_FINISH_TIMEOUT_S = 120.0  # for uploading what is left; without one, a dead network holds the process for ever
_CALL_TIMEOUT_S = 60.0  # for handing rows to W&B's service process, milliseconds unless that hangs
_TEARDOWN_TIMEOUT_S = 10.0  # for the service process to end, with nothing left to upload

# The samples table is sent whole. W&B's tables that grow by increments remember the earlier ones on the server
# only, so an offline resume would start anew; and what a kill made us sample again would be in them twice.
_TABLE = "samples_table"  # `samples` is a metric: how many there were
_TABLE_GROWTH = 1.25  # sent when it has this many times the rows: all uploads together are five times the last
_TABLE_ROWS = 5000  # a few MB; W&B shows no more than 10,000

_EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "interrupted": 130, "running": 1}

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the loop tells about a run; `step` counts from 1 and never falls."""

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """A step's metrics; entries that are null or not finite are left out."""

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Some samples of the step, with the keys of samples.jsonl, which has them already."""

    def summary(self, values: Mapping[str, object]) -> None:
        """The final figures, as in summary.json."""

    def finish(self, status: Status) -> None:
        """The run is over; nothing may follow."""


class NullTracker:
    """Tracks nothing: metrics.jsonl is enough."""

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """Nothing."""

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, object]) -> None:
        """Nothing."""

    def finish(self, status: Status) -> None:
        """Nothing."""


class WandbTracker:
    """A Weights & Biases run, with our `step` as the axis of every chart.

    run_id: `RunRecord.id`, the same over resumes, so that a resumed run continues its page. Every row also
    gets our step as W&B's own, which never falls: W&B drops the rows of steps that a kill made us repeat, and
    an offline run and its resume number their rows alike in their two folders. The table
    `samples_table` has the whole samples.jsonl, thinned evenly where that is long.

    mode: None leaves it to the environment (WANDB_MODE) and W&B's settings. If W&B cannot be reached, the run
    is recorded offline, and if that fails too, not at all; each with one warning. Not sent: console output,
    code, git state, the command line (it could hold a secret).
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        run_id: str,
        config: Mapping[str, object],
        mode: Mode | None = None,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        self._run: Any = None
        self._warned = False
        self._samples_path = RunFolder(run_dir).samples_path
        self._rows_sent = 0  # samples there were when the table was last sent; 0 = not by this process
        self._rows_since = 0
        start = {
            "dir": str(run_dir),
            "id": run_id,
            "resume": "allow",
            "reinit": "finish_previous",  # the jobs of a sweep share a process; one may have died open
            "config": dict(config),
            "project": project,
            "entity": entity,
            "group": group,
            "name": name,
            "tags": list(tags) or None,
        }
        try:
            self._start(start, mode)
        except Exception as error:
            self._warn(error)

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """Send a step's metrics, and the table of samples where it has grown enough.

        The row is closed at once (commit): left open, it would be written when the run is finished, and its
        values would replace the final figures of the same names. The table goes with the metrics: a row of the
        table alone, left by a crash between the two, would be the one that W&B keeps of that step.
        """
        sent: dict[str, Any] = {"step": step, **_finite_only(row)}

        def add_table() -> None:
            sent[_TABLE], self._rows_sent = self._table()
            self._rows_since = 0

        if self._rows_since > self._rows_sent * (_TABLE_GROWTH - 1):
            self._guard(add_table)
        self._guard(lambda: self._run.log(sent, step=step, commit=True))

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Count the samples, which go out with a later `log`, as the table `samples_table`.

        They are read from samples.jsonl: so a resumed run has those from before the kill, and none twice.
        """
        self._rows_since += len(rows)

    def summary(self, values: Mapping[str, object]) -> None:
        """Set the final figures, which W&B shows and sorts runs by."""
        self._guard(lambda: self._run.summary.update(_finite_only(values)))

    def finish(self, status: Status) -> None:
        """Send all samples, upload what is left (for two minutes at most) and close the run with an exit code."""
        if self._samples_path.is_file() and self._samples_path.stat().st_size > 0:  # a resume may empty it
            # Into the summary, which is what the page shows: a row of a step that W&B has already (the last
            # ones before a kill) would be dropped.
            self._guard(lambda: self._run.summary.update({_TABLE: self._table()[0]}))
        if self._run is not None:
            upload_s = float(getattr(self._run.settings, "finish_timeout", _FINISH_TIMEOUT_S))
            limit = upload_s + _CALL_TIMEOUT_S if upload_s > 0 else threading.TIMEOUT_MAX
            if not self._guard(lambda: self._run.finish(exit_code=_EXIT_CODES[status]), limit):
                _discard_service()
        self._run = None

    def _table(self) -> tuple[Any, int]:
        """The samples so far as a table, and how many there are."""
        import wandb

        rows = read_jsonl(self._samples_path).rows
        columns: list[str | int] = list(rows[0])
        cells = [[_cell(str(key), row.get(str(key))) for key in columns] for row in _thinned(rows, _TABLE_ROWS)]
        return wandb.Table(columns=columns, data=cells), len(rows)

    def _start(self, start: Mapping[str, Any], mode: Mode | None) -> None:
        # W&B reports its own errors home, in every mode: where nobody answers, that alone holds the exit for 20 s.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        try:
            self._run = wandb.init(mode=mode, settings=_settings(), **start)
        except Exception as error:
            if mode == "offline":
                raise
            _log.warning("W&B is not reachable, recording offline (`wandb sync` uploads it): %s", _line(error))
            _discard_service()  # it still holds the id of the failed attempt
            self._run = wandb.init(mode="offline", settings=_settings(), **start)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline and self._run.url:  # none where W&B is disabled
            _log.info("W&B: %s", self._run.url)

    def _guard(self, action: Callable[[], object], timeout_s: float | None = None) -> bool:
        """Call W&B, if it could be started; whatever it raises is worth one warning, never the run.

        One that does not answer within `timeout_s` (_CALL_TIMEOUT_S, if not given) is given up. False where the
        call failed.
        """
        if self._run is None:
            return True
        try:
            _within(_CALL_TIMEOUT_S if timeout_s is None else timeout_s, action)
        except _HangsError as error:
            self._run = None
            self._warn(error)
            _discard_service()
            return False
        except Exception as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning("W&B failed, training goes on (metrics.jsonl has it all): %s", _line(error))
        self._warned = True


def require_tensorboard() -> None:
    """Raises RequestError where the package tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise RequestError(
            "logger=tensorboard: needs the package tensorboard; pip install 'rlhf-cli[tensorboard]'"
        )


class TensorBoardTracker:
    """Event files under run_dir/tensorboard, the summary under the tag prefix `final/`.

    resumed_from: the step a resumed run continues after; TensorBoard then hides what was logged later than
    that. Raises RequestError where the package tensorboard is missing.
    """

    def __init__(self, run_dir: Path, *, config: Mapping[str, object], resumed_from: int | None = None) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._last_step = resumed_from or 0
        purge = None if resumed_from is None else resumed_from + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge)
        if resumed_from is None:
            self._writer.add_text("config", _verbatim(json.dumps(config, indent=2, default=str)), 0)

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """Write a step's metrics as scalars."""
        self._last_step = step
        for key, value in _finite_only(row).items():
            if key != "step":
                self._writer.add_scalar(key, value, step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Write the samples as one text."""
        blocks = [
            "\n".join(f"{key}: {_cell(key, value)}" for key, value in row.items() if key != "step") for row in rows
        ]
        self._writer.add_text("samples", _verbatim("\n\n".join(blocks)), step)

    def summary(self, values: Mapping[str, object]) -> None:
        """Write the final figures at the last step."""
        for key, value in _finite_only(values).items():
            self._writer.add_scalar(f"final/{key}", value, self._last_step)

    def finish(self, status: Status) -> None:
        """Flush and close the files."""
        self._writer.close()


class _HangsError(Exception):
    """A call did not return in time."""


def _within(timeout_s: float, action: Callable[[], object]) -> None:
    """Do something in a thread of its own and wait for it; raises what it raises, _HangsError past the time.

    W&B waits without an end for a service process that takes no more (stopped, or on a disk that hangs).
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:  # wandb.teardown() ends in SystemExit where its service failed
            raised.append(error)

    thread = threading.Thread(target=run, name="wandb-call", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise _HangsError(f"no answer in {timeout_s:g} s")
    if raised:
        raise raised[0] if isinstance(raised[0], Exception) else RuntimeError(repr(raised[0]))


def _discard_service() -> None:
    """End W&B's service process; kill it where it hangs.

    Left alone, it would be ended when this process exits: without a time limit, and with a traceback where it
    is gone already.
    """
    with contextlib.suppress(Exception):
        import wandb

        # Not public; a wandb that names it otherwise keeps the process, which ends with this one
        connection = getattr(wandb.setup(), "_connection", None)
        process = getattr(getattr(connection, "_proc", None), "_process", None)
        try:
            _within(_TEARDOWN_TIMEOUT_S, wandb.teardown)
        except _HangsError:
            if process is not None:
                process.kill()


def _settings() -> Any:
    """W&B's settings: quiet, sending no more than we log, and no wait without an end.

    A setting that an older wandb does not know yet is left out, and so is a wait that the environment sets.
    """
    import wandb

    waits = {
        "init_timeout": _INIT_TIMEOUT_S,
        "login_timeout": _LOGIN_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
    }
    wanted: dict[str, Any] = {
        "console": "off",
        "silent": True,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "x_disable_meta": True,  # the record of host and command line
        **{key: value for key, value in waits.items() if f"WANDB_{key.upper()}" not in os.environ},
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _thinned(rows: Sequence[Mapping[str, Any]], limit: int) -> list[Mapping[str, Any]]:
    """At most `limit` rows over the whole run: those of every 2nd (4th, 8th, ...) step with samples, and the last."""
    steps = list(dict.fromkeys(row["step"] for row in rows))
    stride, kept = 1, list(rows)
    while len(kept) > limit and stride < len(steps):
        stride *= 2
        wanted = {*steps[::stride], steps[-1]}
        kept = [row for row in rows if row["step"] in wanted]
    return kept[-limit:]


def _finite_only(row: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: finite(value) for key, value in row.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _cell(key: str, value: object) -> str | float | None:
    """A sample's value for a table or a text; the turns of a chat on a line each."""
    if key == "completion":
        return str(value)
    if key == "terms":
        assert isinstance(value, Mapping)
        return ", ".join(f"{name} {_figure(number)}" for name, number in value.items())
    if key != "prompt":
        return finite(value)
    prompt = plain_prompt(value)
    return (
        prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )


def _figure(value: object) -> str:
    number = finite(value)
    return "null" if number is None else f"{number:.4g}"


def _verbatim(text: str) -> str:
    """Text that TensorBoard, which renders Markdown to HTML, shows as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
