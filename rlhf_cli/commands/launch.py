"""From command line to Hydra and back: one line per error, an exit status, and nothing left behind in the process.

Exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli.commands import job
from rlhf_cli.commands.help import conf_path
from rlhf_cli.commands.request import Request, config_name, read_request
from rlhf_cli.config.explain import as_request_error
from rlhf_cli.config.store import register
from rlhf_cli.errors import RequestError
from rlhf_cli.train.stopping import STOP, StopRequested

OK, FAILED, WRONG_REQUEST = 0, 1, 2


def launch(command: str, arguments: Sequence[str], multirun: bool = False) -> int:
    """Runs a command with Hydra overrides and flags; returns the exit status."""
    status, _ = launch_into(command, arguments, multirun)
    return status


def launch_into(command: str, arguments: Sequence[str], multirun: bool = False) -> tuple[int, Path | None]:
    """As `launch`, with the folder of the run or sweep where it got that far."""
    register()
    request = Request(runs=False, multirun=False, folder=None, arguments=())
    try:
        with _surroundings():
            job.prepare_environment()
            request = read_request(command, arguments, multirun)
            job.outcome.clear()
            _hydra(command, request.arguments)
    except RequestError as error:
        return _report(str(error), WRONG_REQUEST), request.folder
    except (HydraException, OmegaConfBaseException) as error:
        return _report(str(as_request_error(error, arguments)), WRONG_REQUEST), request.folder
    except StopRequested as stop:
        again = "; the same command with resume=auto continues it" if request.runs else ""
        return _report(f"stopped by {stop}{again}", stop.exit_status), request.folder
    except Exception as error:
        if not request.multirun:
            raise
        return _report(f"a job of the sweep failed: {_line(error)}", FAILED), request.folder
    return _status(job.outcome), request.folder


def _status(outcome: job.Outcome) -> int:
    """How a single run ended; Hydra never sees its error."""
    if outcome.error is None:
        return OK
    try:
        raise outcome.error
    except RequestError as error:
        return _report(str(error), WRONG_REQUEST)
    except Exception as error:
        return _report(f"failed: {_line(error)} (traceback: {outcome.folder}/rlhf.log)", FAILED)


def _hydra(command: str, arguments: Sequence[str]) -> None:
    """hydra.main with our argv; its own error printing is switched off, because errors are explained here."""
    main = hydra.main(version_base="1.3", config_path=str(conf_path()), config_name=config_name(command))
    sys.argv = [f"rlhf {command}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    main(job.run)()


@contextmanager
def _surroundings() -> Iterator[None]:
    """SIGINT and SIGTERM stop a run with its state written. Afterwards their handlers, sys.argv, the environment
    and the root logger are the caller's again.
    """
    root = logging.getLogger()
    argv, environment, level, handlers = sys.argv, dict(os.environ), root.level, list(root.handlers)
    try:
        with STOP.installed():
            yield
    finally:
        sys.argv = argv
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update(environment)
        for added in [one for one in root.handlers if one not in handlers]:
            added.close()
        root.handlers[:] = handlers
        root.setLevel(level)


def _full_error() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report(text: str, status: int) -> int:
    if _full_error():
        traceback.print_exc()
    print(f"rlhf: {text}", file=sys.stderr)
    return status


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
