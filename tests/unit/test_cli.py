"""How the command's process ends."""

from __future__ import annotations

import os
import subprocess
import sys

# Aborts when the interpreter is taken down, as a thread of a transport sometimes does; atexit still has its turn.
LEFT_BEHIND = """
import atexit, os, sys, threading

class Left:
    def __del__(self, abort=os.abort):
        abort()

left = Left()
left.itself = left
atexit.register(print, "atexit ran")
sys.argv = ["rlhf", "no-such-command"]

from rlhf_cli.cli import main
main()
"""


def ended(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND],
        env={**{k: v for k, v in os.environ.items() if k != "RANK"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_exit_status_of_one_of_several_processes_outlives_what_is_left_at_the_interpreters_end():
    alone, one_of_two = ended(), ended(RANK="0")
    assert alone.returncode < 0, "else what is left behind aborts nothing"
    assert one_of_two.returncode == 2
    assert one_of_two.stdout == "atexit ran\n" and "no-such-command" in one_of_two.stderr
