"""Runs commands that die by SIGKILL at a chosen change of a file or call of a function: a script, and its handle.

The script imports everything once and forks for each command, so that a command costs no start-up. What a command does
to files is seen through Python's audit events, whichever function does it.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

_CHANGES = (
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
    "shutil.copytree",
    "shutil.copyfile",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
KILLED = -signal.SIGKILL
_LIMIT_S = 120  # one that waits for ever ends with -SIGALRM


class Killing:
    """The script in a process of its own."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        """`log` takes what the commands print."""
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def __call__(self, command: str, arguments: Sequence[str], *moments: str, call: str | None = None) -> int:
        """Runs a command; its status, KILLED where it came to the last of the moments.

        Args:
            command: e.g. train-sft.
            arguments: what follows it.
            moments: patterns of events, such as r"os.rename \\S+ \\S+/model$", that come one after the other; the
                command is killed just before what the last one describes. None: it is left alone.
            call: a function, "module:Class.method", whose calls are events, too: "call module:Class.method".
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        request = [command, [*arguments], [*moments], call, str(self.log)]
        self.process.stdin.write(json.dumps(request) + "\n")
        return int(self.process.stdout.readline())

    def said(self) -> str:
        """What the last command printed."""
        return self.log.read_text()

    def end(self) -> None:
        """Ends the script."""
        self.process.communicate(timeout=60)


def _plant(moments: list[str]) -> Callable[[str], None]:
    """Dies at the last of the moments."""
    left = [re.compile(moment) for moment in moments]

    def event(text: str) -> None:
        if left and left[0].search(text):
            del left[0]
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(name: str, values: tuple[Any, ...]) -> None:
        if name in _CHANGES or (name == "open" and isinstance(values[2], int) and values[2] & _WRITING):
            event(" ".join([name, *map(str, values[:2] if name != "open" else values[:1])]))

    if moments:
        sys.addaudithook(audit)
    return event


def _watch(function: str, event: Callable[[str], None]) -> None:
    """Makes the calls of a function events."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    original = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        event(f"call {function}")
        return original(*arguments, **options)

    setattr(owner, name, watched)


def _serve() -> None:
    from rlhf_cli import stages  # noqa: F401 - what every command needs
    from rlhf_cli.commands import train  # noqa: F401
    from rlhf_cli.commands.launch import launch

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests import quick

    quick.compose_quickly()
    with redirect_stdout(io.StringIO()):
        launch("train-policy", ["--cfg", "job"])  # what Hydra reads, those that are forked have read

    for line in sys.stdin:
        command, arguments, moments, call, log = json.loads(line)
        child = os.fork()
        if child == 0:
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(to, 1)
            os.dup2(to, 2)
            signal.alarm(_LIMIT_S)
            event = _plant(moments)
            if call is not None:
                _watch(call, event)
            status = launch(command, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
