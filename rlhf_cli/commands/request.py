"""What a command line asks for: parsed, every job composed once and checked, before anything is written."""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from rlhf_cli.commands.help import conf_path, group_choices, is_group
from rlhf_cli.commands.resume import check_same_config
from rlhf_cli.config.explain import as_request_error
from rlhf_cli.config.schema import Device, PrecisionName, Resume, RunConfig, check_no_extra_keys
from rlhf_cli.data.settings import SourceSettings
from rlhf_cli.errors import RequestError, bad_choice, bad_value

_MAX_JOBS_CHECKED = 256  # composing one takes about 50 ms

# What a request leaves that was found wrong after Hydra had begun; beside it a folder counts as empty.
_LEFTOVERS = frozenset({".hydra", "rlhf.log", ".lock", "run_config.json"})


@dataclass(frozen=True)
class Request:
    """A command line that can be run."""

    runs: bool  # False for --cfg, --info and the like
    multirun: bool
    folder: Path | None  # of the run or the sweep
    arguments: Sequence[str]  # for Hydra

    def as_json(self) -> dict[str, Any]:
        """For another process."""
        return {**asdict(self), "folder": None if self.folder is None else str(self.folder)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Request:
        """The inverse of `as_json`."""
        return cls(**{**values, "folder": None if values["folder"] is None else Path(values["folder"])})


def read_request(
    command: str, arguments: Sequence[str], multirun: bool = False, num_processes: int = 1
) -> Request:
    """Parses Hydra's flags and overrides, checks every job, and settles on the folder.

    Args:
        command: e.g. train-policy.
        arguments: what follows it.
        multirun: True for `rlhf sweep`.
        num_processes: that torchrun started.

    Raises:
        RequestError: naming key, value and choices; nothing has been written.
    """
    args = _parsed(arguments)
    multirun = multirun or args.multirun or "hydra.mode=MULTIRUN" in args.overrides
    if multirun and num_processes > 1:
        raise RequestError("a sweep starts its jobs itself: run it without torchrun, or one job at a time with it")
    try:
        return _checked(command, _flags_first(arguments, args.overrides), args, multirun, num_processes)
    except (HydraException, OmegaConfBaseException) as error:
        raise as_request_error(error, args.overrides) from error


def _flags_first(arguments: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The order that Hydra can read."""
    left = list(overrides)
    flags = [argument for argument in arguments if not (left and argument == left[0] and left.pop(0))]
    return [*flags, *overrides]


def config_name(command: str) -> str:
    """The YAML behind a command."""
    return command.replace("-", "_")


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides; refuses what would import or unpickle."""
    parser = get_args_parser()

    def error(message: str) -> NoReturn:
        raise RequestError(message)

    parser.error = error  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(arguments)  # flags may stand between overrides
    if args.experimental_rerun is not None:
        raise RequestError("--experimental-rerun: not supported, because it loads a pickle")
    shown = [flag for flag in ("cfg", "info", "shell_completion") if getattr(args, flag)]
    if args.multirun and shown:
        raise RequestError(f"--multirun --{shown[0]}: expected one of the two")
    if args.config_dir is not None and not Path(args.config_dir).is_dir():
        raise RequestError(f"--config-dir {args.config_dir}: no such folder")
    for override in args.overrides:
        if "_target_" in override:
            raise RequestError(f"{override}: config cannot name a Python object to import")
        if override.lstrip("+~").startswith("="):
            raise RequestError(f"{override}: cannot be read as key=value (no key)")
    return args


def for_another_process(request: Request) -> Request:
    """The same request for a process that is not the main one: Hydra then writes nothing and logs nothing."""
    quiet = ["hydra.output_subdir=null", "hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    keys = tuple(f"{line.partition('=')[0]}=" for line in quiet)
    kept = [argument for argument in request.arguments if not argument.startswith(keys)]
    return replace(request, arguments=[*kept, *quiet])


def _checked(
    command: str, arguments: list[str], args: argparse.Namespace, multirun: bool, num_processes: int
) -> Request:
    if args.cfg or args.info or args.hydra_help or args.help or args.shell_completion:
        return Request(False, False, None, arguments)
    config_dir = args.config_path or str(conf_path())
    name = args.config_name or config_name(command)
    _check_choices(args.overrides)
    is_named = any(_sets(args.overrides, key) for key in ("run_dir", "hydra.run.dir", "hydra.sweep.dir"))
    extra = [f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
    with initialize_config_dir(str(Path(config_dir).absolute()), version_base="1.3", job_name="rlhf"):
        if not multirun:
            config = compose(name, [*args.overrides, *extra], return_hydra_config=True)
            if config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN":
                folder = Path(config.hydra.run.dir)
                _check_job(command, config, folder, num_processes)
                if not _resumes(config):
                    _check_unused(folder)
                folder = _usable(folder, is_named)
                # Hydra composes run_dir anew: its time would differ
                kept = [argument for argument in arguments if not argument.startswith("hydra.run.dir=")]
                return Request(True, False, folder, [*kept, f"hydra.run.dir={_quoted(folder)}"])
        folder = _usable(_check_sweep(command, name, args.overrides, extra), is_named)
    pinned: list[str] = []
    if not _sets(args.overrides, "hydra.sweep.dir"):  # as above, for every job
        pinned = [f"run_dir={_quoted(folder)}"]
        arguments = [argument for argument in arguments if not argument.startswith("run_dir=")]
    flags = [] if args.multirun else ["--multirun"]
    return Request(True, True, folder, [*flags, *arguments, *pinned])


def _check_choices(overrides: Sequence[str]) -> None:
    """A choice is a file's name; Hydra has no message for null or a number."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group = override.key_or_group
        if override.value_type is ValueType.ELEMENT and not override.is_delete() and is_group(group):
            value = override.value()
            if not isinstance(value, str | list | dict):
                raise bad_choice(group, override.get_value_element_as_str(), group_choices(group))


def _check_sweep(command: str, name: str, overrides: Sequence[str], extra: Sequence[str]) -> Path:
    """Composes and checks every job of a sweep; returns the sweep's folder."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    for override in parsed:
        if override.is_sweep_override() and override.key_or_group == "run_dir":
            raise RequestError(f"{override.input_line}: expected one folder; its jobs get 0, 1, ... inside")
    fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
    base = compose(name, [*fixed, *extra], return_hydra_config=True)
    folder = Path(base.hydra.sweep.dir)
    if base.hydra.runtime.choices["hydra/sweeper"] == "basic":
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
        for number, one in enumerate(jobs[:_MAX_JOBS_CHECKED]):
            try:
                composed = compose(name, [*one, *extra], return_hydra_config=True)
                _check_job(command, composed, folder / str(number))
            except (HydraException, OmegaConfBaseException) as error:
                raise as_request_error(error, one) from error
    if not _resumes(base):
        _check_unused(folder)
    return folder


def _resumes(composed: DictConfig) -> bool:
    return bool(composed.resume is Resume.auto)


def _check_job(command: str, composed: DictConfig, folder: Path, num_processes: int = 1) -> None:
    """Types are checked by the composition; this checks what types cannot say, and what is continued."""
    plain = copy.deepcopy(composed)
    with read_write(plain), open_dict(plain):
        del plain["hydra"]
    config = OmegaConf.to_object(plain)
    assert isinstance(config, RunConfig), type(config)
    check_no_extra_keys(config)
    if config.command != command:
        raise bad_value("command", config.command, f"{command}, as the command line says")
    config.check()
    config.check_processes(num_processes)
    if config.device not in (Device.auto, Device.cpu) or config.precision.name is PrecisionName.fp16:
        from rlhf_cli.train.precision import resolve_device, resolve_precision

        resolve_precision(config.precision.name.value, resolve_device(config.device.value))
    if config.logger.name == "tensorboard":
        from rlhf_cli.train.tracking import require_tensorboard

        require_tensorboard()
    _check_given_paths(config)
    if config.resume is Resume.auto:
        check_same_config(folder, plain)


def _check_given_paths(config: RunConfig) -> None:
    """What is given is there, before a stage is trained on the way to it."""
    given = [
        ("model.path", config.model.path),
        ("rm.model.path", config.rm.model.path),
        ("sft.path", config.sft.path),
        ("rm.path", config.rm.path),
        ("reference.path", config.reference.path),
        ("reward.coherence.path", config.reward.coherence.path),
        *(("policies", path) for path in config.policies),
    ]
    paths = [(key, path) for key, path in given if path is not None]
    if paths:
        from rlhf_cli.models.loading import resolve_path

        for key, path in paths:
            resolve_path(key, path)
    if isinstance(config.data, SourceSettings):
        from rlhf_cli.data.inputs import check_paths

        check_paths(config.data)


def _check_unused(folder: Path) -> None:
    """An empty folder that can be written to: Hydra would overwrite its .hydra/ before we see it."""
    if folder.is_dir():
        names = sorted({entry.name for entry in folder.iterdir()} - _LEFTOVERS)
        names = [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]
        if "run.json" in names or "multirun.yaml" in names:
            kind = "run" if "run.json" in names else "sweep"
            raise RequestError(
                f"run_dir={folder}: already holds a {kind}; resume=auto continues it, or choose another folder"
            )
        if names:
            raise RequestError(f"run_dir={folder}: is not empty ({names[0]}); choose another folder")


def _usable(folder: Path, is_named: bool) -> Path:
    """The folder, made; a default name that another run of the same second has taken gets a number."""
    number = 1
    place = folder
    while not is_named:
        _check_writable(folder.parent)
        try:
            place.mkdir()
            break
        except FileExistsError:
            number += 1
            place = folder.with_name(f"{folder.name}-{number}")
        except OSError:
            break  # explained below
    _check_writable(place)
    return place


def _quoted(folder: Path) -> str:
    return str(QuotedString(str(folder), Quote.single).with_quotes())


def _check_writable(folder: Path) -> None:
    """Writes a byte into a file without a name: permissions tell root nothing, and nobody that the disk is full."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"run_dir={folder}: cannot be created ({error.strerror})") from None
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise RequestError(f"run_dir={folder}: cannot be written to ({error.strerror})") from None


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(override.lstrip("+").partition("=")[0] == key for override in overrides)
