"""Where metrics go beside metrics.jsonl: Weights & Biases, TensorBoard, or nowhere.

A tracker is a convenience and the run folder is the record: whatever goes wrong at W&B (no account, no
network, its service gone) is reported once and training goes on.
"""

from __future__ import annotations

import html
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf_cli.errors import RequestError
from rlhf_cli.train.run_folder import Status, finite, plain_prompt

Mode = Literal["online", "offline", "disabled"]

_INIT_TIMEOUT_S = 30.0
_LOGIN_TIMEOUT_S = 60.0  # for the question wandb asks a person at a terminal who is not logged in
_FINISH_TIMEOUT_S = 120.0  # for uploading what is left; without one, a dead network holds the process for ever
_EXIT_CODES: dict[Status, int] = {"finished": 0, "failed": 1, "interrupted": 130, "running": 1}

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the loop tells about a run; `step` counts from 1 and never falls."""

    def log(self, step: int, row: Mapping[str, object]) -> None:
        """A step's metrics; entries that are null or not finite are left out."""

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Some samples of the step, with the keys of samples.jsonl."""

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
    an offline run and its resume number their rows alike in their two folders.

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
        """Send a step's metrics."""
        self._guard(lambda: self._run.log({"step": step, **_finite_only(row)}, step=step))

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Send the samples as a table named `samples`; on W&B's page each step's table replaces the last."""

        def send() -> None:
            import wandb

            columns: list[str | int] = list(rows[0])
            cells = [[_cell(str(key), row.get(str(key))) for key in columns] for row in rows]
            self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=cells)}, step=step)

        if rows:
            self._guard(send)

    def summary(self, values: Mapping[str, object]) -> None:
        """Set the final figures, which W&B shows and sorts runs by."""
        self._guard(lambda: self._run.summary.update(_finite_only(values)))

    def finish(self, status: Status) -> None:
        """Upload what is left (for two minutes at most) and close the run with an exit code."""
        self._guard(lambda: self._run.finish(exit_code=_EXIT_CODES[status]))
        self._run = None

    def _start(self, start: Mapping[str, Any], mode: Mode | None) -> None:
        import wandb

        try:
            self._run = wandb.init(mode=mode, settings=_settings(), **start)
        except Exception as error:
            if mode == "offline":
                raise
            _log.warning("W&B is not reachable, recording offline (`wandb sync` uploads it): %s", _line(error))
            wandb.teardown()  # its service still holds the id of the failed attempt
            self._run = wandb.init(mode="offline", settings=_settings(), **start)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if not self._run.offline and self._run.url:  # none where W&B is disabled
            _log.info("W&B: %s", self._run.url)

    def _guard(self, action: Callable[[], object]) -> None:
        """Call W&B, if it could be started; whatever it raises is worth one warning, never the run."""
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            _log.warning("W&B failed, training goes on (metrics.jsonl has it all): %s", _line(error))
        self._warned = True


class TensorBoardTracker:
    """Event files under run_dir/tensorboard, the summary under the tag prefix `final/`.

    resumed_from: the step a resumed run continues after; TensorBoard then hides what was logged later than
    that. Raises RequestError where the package tensorboard is missing.
    """

    def __init__(self, run_dir: Path, *, config: Mapping[str, object], resumed_from: int | None = None) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise RequestError(
                "logger=tensorboard: needs the package tensorboard; pip install 'rlhf-cli[tensorboard]'"
            )
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


def _settings() -> Any:
    """W&B's settings: quiet, sending no more than we log, and no wait without an end.

    A setting that an older wandb does not know yet is left out.
    """
    import wandb

    wanted: dict[str, Any] = {
        "console": "off",
        "silent": True,
        "save_code": False,
        "disable_code": True,
        "disable_git": True,
        "x_disable_meta": True,  # the record of host and command line
        "init_timeout": _INIT_TIMEOUT_S,
        "login_timeout": _LOGIN_TIMEOUT_S,
        "finish_timeout": _FINISH_TIMEOUT_S,
    }
    known = wandb.Settings.model_fields
    return wandb.Settings(**{key: value for key, value in wanted.items() if key in known})


def _finite_only(row: Mapping[str, object]) -> dict[str, float]:
    numbers = {key: finite(value) for key, value in row.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def _cell(key: str, value: object) -> str | float | None:
    """A sample's value for a table or a text; the turns of a chat on a line each."""
    if key == "completion":
        return str(value)
    if key != "prompt":
        return finite(value)
    prompt = plain_prompt(value)
    return (
        prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )


def _verbatim(text: str) -> str:
    """Text that TensorBoard, which renders Markdown to HTML, shows as it is."""
    return f"<pre>{html.escape(text)}</pre>"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
