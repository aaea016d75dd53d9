"""Hydra's and OmegaConf's errors as one line that names the key, the value and the choices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from rlhf_cli.errors import RequestError, bad_choice


def as_request_error(error: HydraException | OmegaConfBaseException, overrides: Sequence[str]) -> RequestError:
    """The same complaint, as a person would want to read it."""
    if isinstance(error, OverrideParseException):
        return RequestError(f"{error.override}: cannot be read as key=value ({_one_line(str(error))})")
    if isinstance(error, MissingConfigException):
        return _missing_choice(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        return _omegaconf(cause, overrides)
    return _hydra(str(error), overrides)


def _missing_choice(error: MissingConfigException) -> RequestError:
    missing = error.missing_cfg_file or ""
    group, _, choice = str(missing).rpartition("/")
    choices = [str(option) for option in error.options or [] if not str(option).startswith("schema")]
    if not group or not choices:
        return RequestError(_one_line(str(error)))
    return bad_choice(group, choice, choices)


def _omegaconf(error: OmegaConfBaseException, overrides: Sequence[str]) -> RequestError:
    key = str(error.full_key or "")
    given = _given_value(key, overrides)
    message = _one_line(str(error.msg or error).split("\n")[0])
    if isinstance(error, MissingMandatoryValue):
        return RequestError(f"{key}: has to be given")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(key, given, error)
    if isinstance(error, InterpolationKeyError | InterpolationToMissingValueError):
        return RequestError(f"{key}: {message}")
    if isinstance(error, ValidationError):
        expected = re.search(r"could not be converted to (\w+)", message)
        choices = re.search(r"expected one of \[(.*)\]", message)
        if choices:
            return bad_choice(key, given, [choice.strip() for choice in choices.group(1).split(",")])
        if expected:
            return RequestError(f"{key}={given}: expected {_TYPE_NAMES.get(expected.group(1), expected.group(1))}")
    return RequestError(f"{key}={given}: {message}" if key else message)


_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false", "String": "text"}


def _unknown_key(key: str, given: str, error: OmegaConfBaseException) -> RequestError:
    parent = error.parent_node
    where, _, last = key.rpartition(".")
    names = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    if not where:
        names = [name for name in names if name not in ("hydra",)]
    return _unknown(key, given, last, where, names)


def _unknown(key: str, given: str, last: str, where: str, names: Sequence[str]) -> RequestError:
    near = difflib.get_close_matches(last, names, n=1)
    hint = f" (did you mean {where + '.' if where else ''}{near[0]}?)" if near else ""
    known = f"; {where or 'the top level'} has {', '.join(names)}" if names else ""
    return RequestError(f"{key}={given}: unknown key{hint}{known}")


def _hydra(message: str, overrides: Sequence[str]) -> RequestError:
    line = _one_line(message)
    group = re.match(r"Could not override '([^']+)'\. No match in the defaults list", line)
    if group:
        return RequestError(f"{group.group(1)}: unknown config group")
    return RequestError(line)


def _given_value(key: str, overrides: Sequence[str]) -> str:
    """What the command line gave for a key."""
    for override in reversed(overrides):
        name, separator, value = override.lstrip("+~").partition("=")
        if separator and name == key:
            return value
    return "?"


def _one_line(text: str) -> str:
    return " ".join(text.split())
