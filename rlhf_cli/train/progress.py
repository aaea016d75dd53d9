"""What a person sees of a run: a live bar on a terminal, a few plain lines in a log.

Progress and messages go to stderr, so that stdout holds results alone. On a terminal rich draws a bar with
the numbers that matter below it; elsewhere (a file, a pipe, CI, TERM=dumb) about ten lines of text are
written per run. NO_COLOR is honoured. Names and texts are printed as they are, never read as markup, and
control characters in them (a model can emit any) are shown as a replacement character.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TextIO, cast

from rich.columns import Columns
from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from rlhf_cli.train.run_folder import finite

_LINES_PER_RUN = 10
_PACE_STEPS = 50  # the pace is the mean over this many steps
_ETA_PERIOD_S = 3600.0  # rich forgets steps older than this; its default of 30 s has no ETA for slow steps
_REFRESH_HZ = 4.0
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Progress:
    """The display of one run, a context manager.

    total_steps: the last step's number (steps count from 1). title: the algorithm or stage. keys: the metrics
    to show, a handful, in order. stream: where to, stderr by default. start_step: the step a resumed run
    continues after. clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        keys: Sequence[str],
        stream: TextIO | None = None,
        *,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._title = _printable(title)
        self._values: dict[str, object] = dict.fromkeys(keys)  # last seen; not every step has every metric
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._start_step = start_step
        self._last_line: int | None = None
        self._times: deque[tuple[int, float]] = deque(maxlen=_PACE_STEPS + 1)
        self._console = Console(file=self._stream, highlight=False)
        self._live_wanted = self._stream.isatty() and not self._console.is_dumb_terminal
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
            console=self._console,
            speed_estimate_period=_ETA_PERIOD_S,
            get_time=clock,
            expand=True,
        )
        self._exit = ExitStack()

    def __enter__(self) -> Progress:
        """Start the clock, and on a terminal the live display."""
        self._times.append((self._start_step, self._clock()))
        self._task = self._bar.add_task(self._title, total=self._total, completed=self._start_step, pace="")
        if self._live_wanted:
            live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=_REFRESH_HZ,
                redirect_stdout=sys.stdout.isatty(),  # results in a pipe must stay there
            )
            self._exit.enter_context(live)
            self._exit.enter_context(_log_above(self._console))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the last state on the screen; stop the drawing thread and give the terminal back."""
        self._exit.close()

    def expect(self, total_steps: int) -> None:
        """Another number of the last step."""
        self._total = total_steps
        self._bar.update(self._task, total=total_steps)

    def update(self, step: int, row: Mapping[str, object]) -> None:
        """Show step `step` (1-based) with its metrics; keys that the row lacks keep their last value."""
        assert self._times, "update() belongs inside `with Progress(...)`"
        self._times.append((step, self._clock()))
        self._values.update({key: row[key] for key in self._values if key in row})
        if self._live_wanted:
            self._bar.update(self._task, completed=step, pace=self._pace())
        elif self._is_due(step):
            self._last_line = step
            print(self._line(step), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """Print a text, above the bar where there is one."""
        if self._live_wanted:
            self._console.print(Text(_printable(text)), soft_wrap=True)
        else:
            print(_printable(text), file=self._stream, flush=True)

    def _render(self) -> Group:
        """The bar, and below it one block per metric, its name over its value; blocks wrap with the width."""
        blocks = []
        for key, value in self._values.items():
            name, number = _printable(key), format_number(value)
            width = max(len(name), 8)  # values change their length, columns do not move
            blocks.append(Text.assemble((f"{name:>{width}}", "dim"), "\n", f"{number:>{width}}", no_wrap=True))
        return Group(self._bar, Columns(blocks, padding=(0, 3, 0, 0)))

    def _is_due(self, step: int) -> bool:
        """Whether a log gets a line: the first step seen, every tenth of the run, the last."""
        if self._last_line is None or step >= self._total:
            return True
        every = math.ceil(self._total / _LINES_PER_RUN)
        return step // every > self._last_line // every

    def _line(self, step: int) -> str:
        seen = {key: value for key, value in self._values.items() if value is not None}
        cells = [f"{_printable(key)} {format_number(value):<8}" for key, value in seen.items()]
        count = f"step {step:>{len(str(self._total))}}/{self._total}"
        return "  ".join([self._title, count, *cells, self._pace()])

    def _pace(self) -> str:
        (first, then), (last, now) = self._times[0], self._times[-1]
        if last <= first:
            return ""
        seconds = (now - then) / (last - first)
        return f"{seconds:.1f} s/step" if seconds >= 0.95 else f"{1000 * seconds:.0f} ms/step"


def format_number(value: object) -> str:
    """A metric in at most eight characters; "-" for what is missing or not finite."""
    number = finite(value)
    if number is None:
        return "-"
    size = abs(number)
    if isinstance(number, int) or size >= 999.5:
        return f"{number:.0f}" if size < 1e7 else f"{number:.1e}"
    return f"{number:.3g}" if size >= 1e-3 else f"{number:.1e}" if size > 0 else "0"


def _printable(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


@contextmanager
def _log_above(console: Console) -> Iterator[None]:
    """Let log handlers that write to the terminal print above the live display instead of through it.

    rich replaces sys.stdout and sys.stderr for the same reason, but a handler keeps the stream it was made
    with.
    """
    handlers = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler)
        and handler.stream is not None  # a file's handler that was closed
        and handler.stream.isatty()
    ]
    try:
        for handler, stream in handlers:
            handler.setStream(cast(TextIO, FileProxy(console, stream)))
        yield
    finally:
        for handler, stream in handlers:
            handler.setStream(stream)
