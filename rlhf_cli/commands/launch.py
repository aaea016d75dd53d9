"""From command line to Hydra and back: a check before anything is written, one line per error, an exit status.

Exit status: 0 done, 1 the run failed, 2 the request is wrong, 130 and 143 stopped by a signal.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli.commands import job
from rlhf_cli.commands.help import conf_path
from rlhf_cli.config.explain import as_request_error
from rlhf_cli.config.schema import Device, RunConfig, check_no_extra_keys
from rlhf_cli.config.store import register
from rlhf_cli.errors import RequestError

OK, FAILED, WRONG_REQUEST, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

_MAX_JOBS_CHECKED = 256  # composing one takes about 50 ms


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does, with another exit status."""


@dataclass(frozen=True)
class _Plan:
    """What a command line asks Hydra for."""

    runs: bool  # False for --cfg, --info and the like
    multirun: bool
    folder: Path | None  # of the run or the sweep


def launch(command: str, arguments: Sequence[str], multirun: bool = False) -> int:
    """Runs a command with Hydra overrides and flags; returns the exit status."""
    status, _ = launch_into(command, arguments, multirun)
    return status


def launch_into(command: str, arguments: Sequence[str], multirun: bool = False) -> tuple[int, Path | None]:
    """As `launch`, with the folder of the run or sweep where it got that far."""
    register()
    job.prepare_environment()
    plan = _Plan(runs=False, multirun=False, folder=None)
    try:
        with _signals():
            plan, args = _checked(command, list(arguments), multirun)
            job.outcome.clear()
            _hydra(command, args)
    except RequestError as error:
        return _report(str(error), WRONG_REQUEST), None
    except (HydraException, OmegaConfBaseException) as error:
        return _report(str(as_request_error(error, arguments)), WRONG_REQUEST), None
    except _Terminated:
        return _report("stopped by SIGTERM", TERMINATED), plan.folder
    except KeyboardInterrupt:
        return _report("stopped by SIGINT", INTERRUPTED), plan.folder
    except Exception as error:
        if _full_error() or not plan.multirun:
            raise
        return _report(f"a job of the sweep failed: {_line(error)}", FAILED), plan.folder
    if job.outcome.error is not None:
        return _job_status(job.outcome), plan.folder
    return OK, plan.folder


def _job_status(outcome: job.Outcome) -> int:
    assert outcome.error is not None
    if _full_error():
        raise outcome.error
    if isinstance(outcome.error, RequestError):
        return _report(str(outcome.error), WRONG_REQUEST)
    return _report(f"failed: {_line(outcome.error)} (traceback: {outcome.folder}/rlhf.log)", FAILED)


def _checked(command: str, arguments: list[str], multirun: bool) -> tuple[_Plan, list[str]]:
    """Parses Hydra's flags, composes every job once and checks it, before anything is written."""
    args = _parsed(arguments)
    if args.experimental_rerun is not None:
        raise RequestError("--experimental-rerun: not supported, because it loads a pickle")
    for override in args.overrides:
        if "_target_" in override:
            raise RequestError(f"{override}: config cannot name a Python object to import")
    multirun = multirun or args.multirun
    shows = args.cfg or args.info or args.hydra_help or args.help or args.shell_completion
    if shows:
        return _Plan(False, False, None), arguments
    config_dir = args.config_path or str(conf_path())
    config_name = args.config_name or _config_name(command)
    extra = [f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
    with initialize_config_dir(str(Path(config_dir).absolute()), version_base="1.3", job_name="rlhf"):
        if not multirun:
            config = compose(config_name, [*args.overrides, *extra], return_hydra_config=True)
            if config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN":
                multirun = True
        if not multirun:
            _check_job(config)
            folder = Path(config.hydra.run.dir)
            _check_unused(folder)
            return _Plan(True, False, folder), arguments
        folder = _check_sweep(config_name, args.overrides, extra)
    pinned = [] if _sets(args.overrides, "hydra.sweep.dir") else [f"run_dir={folder}"]
    kept = [a for a in arguments if not a.startswith("run_dir=")] if pinned else arguments
    flags = [] if args.multirun else ["--multirun"]
    return _Plan(True, True, folder), [*flags, *kept, *pinned]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise RequestError(message)

    parser.error = error  # type: ignore[method-assign]
    return parser.parse_args(arguments)


def _check_sweep(config_name: str, overrides: Sequence[str], extra: Sequence[str]) -> Path:
    """Composes and checks every job of a sweep; returns the sweep's folder."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
    base = compose(config_name, [*fixed, *extra], return_hydra_config=True)
    folder = Path(base.hydra.sweep.dir)
    _check_unused(folder)
    if base.hydra.runtime.choices["hydra/sweeper"] == "basic":
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        for one in jobs[:_MAX_JOBS_CHECKED]:
            _check_job(compose(config_name, [*one, *extra], return_hydra_config=True))
    return folder


def _check_job(composed: DictConfig) -> None:
    """Types are checked by the composition; this checks what types cannot say."""
    plain = copy.deepcopy(composed)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    config = OmegaConf.to_object(plain)
    assert isinstance(config, RunConfig), type(config)
    check_no_extra_keys(config)
    config.check()
    if config.device not in (Device.auto, Device.cpu):
        from rlhf_cli.train.precision import resolve_device

        resolve_device(config.device.value)


def _check_unused(folder: Path) -> None:
    """A folder that can be written to and holds no run: Hydra would overwrite its .hydra/ before we see it."""
    used = [name for name in ("run.json", "metrics.jsonl", "model", "multirun.yaml") if (folder / name).exists()]
    if used:
        raise RequestError(f"run_dir={folder}: already holds a run ({used[0]}); choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"run_dir={folder}: cannot be created ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise RequestError(f"run_dir={folder}: cannot be written to")


def _hydra(command: str, arguments: Sequence[str]) -> None:
    """hydra.main with our argv; its own error printing is switched off, because errors are explained here."""
    main = hydra.main(version_base="1.3", config_path=str(conf_path()), config_name=_config_name(command))
    argv, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"rlhf {command}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        main(job.run)()
    finally:
        sys.argv = argv
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends a run in the way Ctrl-C does, so that its status is written."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _config_name(command: str) -> str:
    return command.replace("-", "_")


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(override.lstrip("+").partition("=")[0] == key for override in overrides)


def _full_error() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _report(text: str, status: int) -> int:
    if _full_error():
        traceback.print_exc()
    print(f"rlhf: {text}", file=sys.stderr)
    return status


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
