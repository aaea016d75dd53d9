"""For torchrun: each of several processes loads everything once and forks for one command after the other.

    torchrun --nproc-per-node 3 ranks.py '[[29501, ["train-policy", "algo=rloo"]], ...]'

Each command has a port of its own, where its processes meet as those of other launchers do: the main one opens it.
The first command that fails ends the script with its status.
"""

from __future__ import annotations

import json
import os
import sys


def run_all() -> None:
    from rlhf_cli import stages  # noqa: F401 - what the commands need
    from rlhf_cli.cli import main
    from rlhf_cli.commands import launch, train  # noqa: F401

    for port, arguments in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
            sys.argv = ["rlhf", *arguments]
            main()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status:
            sys.exit(status if status > 0 else 128 - status)


if __name__ == "__main__":
    run_all()
