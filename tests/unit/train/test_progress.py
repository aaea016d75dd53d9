import io
import logging
import math
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.file_proxy import FileProxy

from rlhf_cli.train.progress import Progress, format_number

_KEYS = ("loss", "reward/mean", "kl/k1", "gold/mean")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def _plain(text: str) -> str:
    """A terminal's output without its escape sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def _steps(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"step +(\d+)/", text)]


def test_a_log_gets_aligned_lines():
    stream, clock = io.StringIO(), Clock()
    with Progress(100, "rloo", _KEYS, stream, clock=clock) as progress:
        for step in range(1, 11):
            clock.now += 1.9
            row = {"loss": -0.012345, "reward/mean": step / 10, "kl/k1": np.float32(1.93), "other": 1.0}
            progress.update(step, row if step < 10 else {**row, "gold/mean": 0.42})
    assert stream.getvalue().splitlines() == [
        "rloo  step   1/100  loss -0.0123   reward/mean 0.1       kl/k1 1.93      1.9 s/step",
        "rloo  step  10/100  loss -0.0123   reward/mean 1         kl/k1 1.93      gold/mean 0.42      1.9 s/step",
    ]


@pytest.mark.parametrize(
    ("total", "start", "expected"),
    [
        (40, 0, [1, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40]),
        (3, 0, [1, 2, 3]),
        (1, 0, [1]),
        (25, 0, [1, 3, 6, 9, 12, 15, 18, 21, 24, 25]),
        (40, 30, [31, 32, 36, 40]),
    ],
)
def test_how_often_a_log_gets_a_line(total: int, start: int, expected: list[int]):
    stream = io.StringIO()
    with Progress(total, "dpo", [], stream, start_step=start) as progress:
        for step in range(start + 1, total + 1):
            progress.update(step, {})
    assert _steps(stream.getvalue()) == expected


def test_pace_is_that_of_recent_steps_of_this_process():
    stream, clock = io.StringIO(), Clock()
    with Progress(1000, "x", [], stream, start_step=900, clock=clock) as progress:
        for step in range(901, 1001):
            clock.now += 60.0 if step <= 950 else 0.25
            progress.update(step, {})
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("60.0 s/step")
    assert lines[-1].endswith("250 ms/step")


def test_a_metric_keeps_its_last_value_until_it_is_measured_again():
    stream = io.StringIO()
    with Progress(2, "x", ["gold/mean", "never"], stream) as progress:
        progress.update(1, {"gold/mean": 0.5})
        progress.update(2, {})
    last = stream.getvalue().splitlines()[-1]
    assert "gold/mean 0.5" in last
    assert "never" not in last


def test_default_stream_is_stderr(capsys: pytest.CaptureFixture[str]):
    with Progress(1, "x", []) as progress:
        progress.update(1, {})
        progress.message("note")
    out, err = capsys.readouterr()
    assert out == ""
    assert "step 1/1" in err
    assert "note" in err


@pytest.mark.parametrize("stream_type", [io.StringIO, Terminal])
def test_names_and_texts_are_no_markup_and_no_control_codes(stream_type: type[io.StringIO]):
    stream = stream_type()
    with Progress(1, "[bold]t", ["[red]m"], stream) as progress:
        progress.message("[blue]a[/nonsense] :smile: \x1b]0;title\x07 \r\x9b31m")
        progress.update(1, {"[red]m": 1.0})
    text = _plain(stream.getvalue())
    assert "[bold]t" in text
    assert "[red]m" in text
    assert "[blue]a[/nonsense] :smile: \ufffd]0;title\ufffd \ufffd\ufffd31m" in text


def test_a_terminal_shows_bar_counts_times_and_metrics():
    stream, clock = Terminal(), Clock()
    with Progress(100, "rloo", _KEYS, stream, clock=clock) as progress:
        for step in range(1, 41):
            clock.now += 2.0
            progress.update(step, {"loss": -0.0123, "reward/mean": 0.812, "kl/k1": 1.93})
    bar, names, values = (line.rstrip() for line in _plain(stream.getvalue()).splitlines()[-3:])
    assert re.fullmatch(r"rloo ━+[╸╺]?━+ +40/100 0:01:20 ETA 0:02:00 2\.0 s/step", bar)
    assert names == "    loss   reward/mean      kl/k1   gold/mean"
    assert values == " -0.0123         0.812       1.93           -"
    assert len(bar) == 80


def test_eta_survives_slow_steps():
    stream, clock = Terminal(), Clock()
    with Progress(100, "x", [], stream, start_step=50, clock=clock) as progress:
        progress.message("draws the display")
        assert "50/100" in _plain(stream.getvalue())
        for step in range(51, 61):
            clock.now += 90.0
            progress.update(step, {})
    assert "60/100 0:15:00 ETA 1:00:00" in _plain(stream.getvalue())


@pytest.mark.parametrize("width", [30, 60, 120])
def test_metrics_wrap_with_the_width(width: int):
    progress = Progress(10, "rloo", _KEYS, Terminal())
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    with progress:
        console.print(progress._render())
    lines = console.file.getvalue().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert all(any(key in line for line in lines) for key in _KEYS)


def test_no_color(monkeypatch: pytest.MonkeyPatch):
    colour = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|38|9\d)[;m]")

    def shown() -> str:
        stream = Terminal()
        with Progress(4, "x", ["loss"], stream) as progress:
            progress.update(2, {"loss": 1.0})
        return stream.getvalue()

    assert colour.search(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(shown())


@pytest.mark.parametrize("kind", ["dumb", "forced colour in a log"])
def test_what_cannot_animate_gets_lines(monkeypatch: pytest.MonkeyPatch, kind: str):
    if kind == "dumb":
        monkeypatch.setenv("TERM", "dumb")
        stream: io.StringIO = Terminal()
    else:
        monkeypatch.setenv("FORCE_COLOR", "1")
        stream = io.StringIO()
    with Progress(1, "x", [], stream) as progress:
        progress.update(1, {})
    assert "\x1b" not in stream.getvalue()
    assert "x  step 1/1" in stream.getvalue()


def test_an_exception_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    stream, out = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    threads = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="boom"), Progress(10, "x", ["loss"]) as progress:
        assert set(threading.enumerate()) - threads, "the display is live"
        assert isinstance(handler.stream, FileProxy)
        progress.update(1, {"loss": 1.0})
        raise RuntimeError("boom")
    deadline = time.monotonic() + 5.0
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= threads
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is back
    assert (sys.stdout, sys.stderr, handler.stream) == (out, stream, stream)


def test_logs_and_prints_go_above_the_bar(monkeypatch: pytest.MonkeyPatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.StreamHandler(stream)])
    with Progress(10, "x", ["loss"]) as progress:
        progress.update(1, {"loss": 1.0})
        progress.message("first")  # draws the display
        logging.getLogger("rlhf_cli.test").warning("a [bold]log line")
        print("a print")
    text = stream.getvalue()
    for line in ("a [bold]log line", "a print"):
        before, after = text.split(line)
        assert "\x1b[2K" in before[-60:], "the display was cleared first"
        assert "loss" in after, "and drawn again below"


def test_results_in_a_pipe_stay_there(monkeypatch: pytest.MonkeyPatch):
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    with Progress(10, "x", [], Terminal()) as progress:
        print("result")
        progress.message("note")
    assert pipe.getvalue() == "result\n"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (0.81234, "0.812"),
        (12.345, "12.3"),
        (-999.4, "-999"),
        (999.7, "1000"),
        (12345.6, "12346"),
        (3e9, "3.0e+09"),
        (2e-5, "2.0e-05"),
        (-0.0012345, "-0.00123"),
        (7, "7"),
        (123456, "123456"),
        (None, "-"),
        (math.nan, "-"),
        (-math.inf, "-"),
        (np.float32(0.5), "0.5"),
    ],
)
def test_format_number(value: object, expected: str):
    assert format_number(value) == expected
    assert len(expected) <= 8


def test_a_closed_log_file_among_the_handlers_is_no_trouble(tmp_path: Path):
    closed = logging.FileHandler(tmp_path / "log")
    closed.close()
    logging.getLogger().addHandler(closed)
    try:
        with Progress(1, "x", [], Terminal()) as progress:
            progress.update(1, {})
    finally:
        logging.getLogger().removeHandler(closed)
