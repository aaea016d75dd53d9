"""Runs `rlhf`, or a script, in processes that have everything loaded when they begin: a script, and its handle.

The script imports what the commands need once and forks for each of them. From there on a process is as one that a
user starts: its own arguments, folder, environment and streams, the command's own entry point, the interpreter's own
end. What it does not show is the start itself, and anything that differs between two interpreters, such as the order
of a set; where that matters a test starts the program.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    out: str
    err: str
    wall_s: float
    cpu_s: float  # of its children too, but not of the loading


class Loaded:
    """The script in a process of its own. One command at a time."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __call__(
        self, arguments: Sequence[str], cwd: Path, environment: dict[str, str], timeout_s: float
    ) -> Ended:
        """Runs a command to its end, or a script where the first argument is one; what takes longer is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._turn, tempfile.TemporaryDirectory() as folder:
            files = [str(Path(folder) / name) for name in ("out", "err")]
            began = time.perf_counter()
            request = [[*arguments], str(cwd), environment, *files, timeout_s]
            self._process.stdin.write(json.dumps(request) + "\n")
            status, cpu_s = json.loads(self._process.stdout.readline())
            wall_s = time.perf_counter() - began
            out, err = (Path(file).read_text() for file in files)
        return Ended(status, out, err, wall_s, cpu_s)

    def end(self) -> None:
        """Ends the script."""
        self._process.communicate(timeout=60)


def _serve() -> None:
    from rlhf_cli import stages  # noqa: F401 - what the commands need
    from rlhf_cli.cli import main
    from rlhf_cli.commands import eval, info, launch, sweep, train  # noqa: F401

    for line in sys.stdin:
        arguments, cwd, environment, out, err, timeout_s = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, file, flags in (
                (0, os.devnull, os.O_RDONLY),
                (1, out, os.O_WRONLY),
                (2, err, os.O_WRONLY),
            ):
                opened = os.open(file, flags | os.O_CREAT, 0o644)
                os.dup2(opened, number)
                os.close(opened)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(environment)
            if arguments[0].endswith(".py"):
                sys.argv = arguments
                sys.path[0] = str(Path(arguments[0]).parent)
                runpy.run_path(arguments[0], run_name="__main__")
            sys.argv = ["rlhf", *arguments]
            main()
        timer = threading.Timer(timeout_s, os.kill, (child, 9))
        timer.start()
        _, status, usage = os.wait4(child, 0)
        timer.cancel()
        print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime]), flush=True)


if __name__ == "__main__":
    _serve()
