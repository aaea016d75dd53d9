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
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from rlhf_cli.errors import RequestError, bad_choice
from rlhf_cli.rewards.term_settings import RewardRule


def as_request_error(error: HydraException | OmegaConfBaseException, overrides: Sequence[str]) -> RequestError:
    """The same complaint, as a person would want to read it."""
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"\s*See https://\S+ for details", "", _one_line(str(error)))
        return RequestError(f"{error.override}: cannot be read as key=value ({reason})")
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
    key = _in_lists(str(error.full_key or ""), error)
    message = _one_line(str(error.msg or error).split("\n")[0])
    given = _given_value(key, overrides)
    if given is None and (quoted := re.match(r"(?:Invalid v|V)alue '(.*?)'", message)):
        given = quoted.group(1)  # from a YAML file
    if isinstance(error, MissingMandatoryValue):
        return RequestError(f"{key}: has to be given")
    if isinstance(error, InterpolationToMissingValueError):
        return RequestError(f"{message.rpartition(': ')[2]}: has to be given, because {key} refers to it")
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(key, given, error)
    if choices := re.search(r"expected one of \[(.*)\]", message):
        return bad_choice(key, given, [choice.strip() for choice in choices.group(1).split(",")])
    for words, expected in _EXPECTED.items():
        if words in message:
            return RequestError(f"{_pair(key, given)}: expected {expected}")
    return RequestError(f"{_pair(key, given)}: {message}" if key else message)


# Items of a list know their own keys alone.
_LISTS = {RewardRule: "reward.rules[]"}


def _in_lists(key: str, error: OmegaConfBaseException) -> str:
    where = _LISTS.get(error.object_type) if error.object_type is not None else None
    return key if where is None or "." in key else f"{where}.{key}"


_EXPECTED = {  # OmegaConf's words -> ours
    "could not be converted to Integer": "a whole number",
    "could not be converted to Float": "a number",
    "is not a valid bool": "true or false",
    "is not Optional": "a value, not null",
    "is not a ListConfig": "a list, [A,B]",
    "does not support deletion": "a value; keys cannot be removed",
}


def _unknown_key(key: str, given: str | None, error: OmegaConfBaseException) -> RequestError:
    parent = error.parent_node
    where, _, last = key.rpartition(".")
    names = sorted(str(name) for name in parent) if isinstance(parent, DictConfig) else []
    if not where:
        names = [name for name in names if name not in ("hydra",)]
    return _unknown(key, given, last, where, names)


def _unknown(key: str, given: str | None, last: str, where: str, names: Sequence[str]) -> RequestError:
    near = difflib.get_close_matches(last, names, n=1)
    hint = f" (did you mean {where + '.' if where else ''}{near[0]}?)" if near else ""
    known = f"; {where or 'the top level'} has {', '.join(names)}" if names else ""
    return RequestError(f"{_pair(key, given)}: unknown key{hint}{known}")


def _hydra(message: str, overrides: Sequence[str]) -> RequestError:
    line = _one_line(message)
    group = re.match(r"Could not override '([^']+)'\. No match in the defaults list", line)
    if group:
        return RequestError(f"{group.group(1)}: unknown config group")
    key = re.match(r"In '(?:.*/)?(\w+)/([^/']+)': .*Key '.*' not in .* full_key: ((\w+)\.\S+)", line)
    if key:
        file, choice, name, node = key.groups()
        chosen = _pair(node, _given_value(node, overrides))
        return RequestError(f"{file}={choice}: sets {name}, which {chosen} does not have; they cannot be combined")
    return RequestError(line)


def _given_value(key: str, overrides: Sequence[str]) -> str | None:
    """What the command line gave for a key, if it did."""
    for override in reversed(overrides):
        name, separator, value = override.lstrip("+~").partition("=")
        if separator and name == key:
            return value
    return None


def _pair(key: str, value: str | None) -> str:
    return key if value is None else f"{key}={value}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
