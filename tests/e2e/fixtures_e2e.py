"""The command line as a user has it: a process of its own, in a working folder of its own, without a network."""

from __future__ import annotations

import atexit
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.train.run_folder import RunFolder
from tests.e2e.loaded import Loaded

ROOT = Path(__file__).parents[2]
RLHF = (str(Path(sys.executable).with_name("rlhf")),)
LOADED = ("rlhf, loaded",)  # a process of its own that need not import everything first: see loaded.py

# Differ between two equal runs
CLOCK = ("time_s", "time/", "throughput/", "memory/")


@dataclass(frozen=True)
class Done:
    """A process that ended."""

    status: int
    out: str
    err: str
    wall_s: float
    cpu_s: float  # user and system time, of its children too

    @property
    def last_line(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1]


def environment(**extra: str) -> dict[str, str]:
    """No network, one thread, nothing of the test run itself."""
    mine = ("COVERAGE", "PYTEST", "HYDRA", "WANDB")
    base = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return base | nowhere | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"} | extra


# CPU seconds of importing torch and transformers on the machine that limits on time are set for
_IMPORTS_S = 1.5


@functools.cache
def pace() -> float:
    """How many times as long this machine takes for what is not ours: importing torch and transformers. At least 1.

    Limits on time are those of one machine; on a slower one they are as much longer.
    """
    taken = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import torch, transformers"], env=environment(), check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return max(1.0, min(taken) / _IMPORTS_S)


def run(
    arguments: Sequence[str], cwd: Path, program: Sequence[str] = RLHF, timeout_s: float = 300, **extra: str
) -> Done:
    """Runs to its end."""
    if program is LOADED:
        ended = _loaded()(arguments, cwd, environment(**extra), timeout_s)
        return Done(ended.status, ended.out, ended.err, ended.wall_s, ended.cpu_s)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*program, *arguments],
        cwd=cwd,
        env=environment(**extra),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(done.returncode, done.stdout, done.stderr, wall, cpu)


@functools.cache
def _loaded() -> Loaded:
    """One for all tests of this process."""
    loaded = Loaded(environment())
    atexit.register(loaded.end)
    return loaded


def ok(arguments: Sequence[str], cwd: Path, **options: Any) -> Done:
    """Runs to its end, which is a good one."""
    done = run(arguments, cwd, **options)
    assert done.status == 0, done.err
    assert "Traceback" not in done.err and "Warning" not in done.err, done.err
    return done


@dataclass
class Started:
    """A process that runs."""

    process: subprocess.Popen[str]
    started: float  # time.perf_counter()

    def wait_for(self, file: Path, timeout_s: float = 120) -> float:
        """Seconds of CPU time until the file has a line (of wall time, where the system does not tell)."""
        while not (file.is_file() and b"\n" in file.read_bytes()):
            assert self.process.poll() is None, self.process.communicate()
            assert time.perf_counter() - self.started < timeout_s, f"no line in {file}"
            time.sleep(0.01)
        return self.cpu_s()

    def cpu_s(self) -> float:
        """User and system time so far."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        if not stat.is_file():
            return time.perf_counter() - self.started
        fields = stat.read_text().rpartition(") ")[2].split()  # from the third field on
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: signal.Signals) -> tuple[int, str]:
        """Sends a signal; the status and stderr."""
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err


def rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; NaN and the infinities are no JSON."""
    return [json.loads(line, parse_constant=_refuse) for line in file.read_text().splitlines()]


def content(file: Path) -> Any:
    """A JSON file."""
    return json.loads(file.read_text(), parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics without what the clock says."""
    return {key: value for key, value in row.items() if not key.startswith(CLOCK)}


def figures(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what the clock says."""
    return [timeless(row) for row in rows(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, bytes]:
    """Every file of a run's models."""
    files = (file for file in folder.glob("model*/**/*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fail_at(monkeypatch: pytest.MonkeyPatch, folder: Path, step: int, action: Callable[[], None]) -> None:
    """Lets something happen when the row of a step is written below a folder, not in the cache of stages."""
    write = RunFolder.append_metrics

    def interrupted(self: RunFolder, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == step and self.path.is_relative_to(folder):
            action()

    monkeypatch.setattr(RunFolder, "append_metrics", interrupted)


def crash() -> None:
    """An end that nobody sees coming."""
    raise RuntimeError("power cut")
