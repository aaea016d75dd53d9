"""Where a run's numbers come from: versions, the commit, and the command as typed without its secrets."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import rlhf_cli

_DISTRIBUTIONS = {
    "torch": "torch",
    "transformers": "transformers",
    "datasets": "datasets",
    "peft": "peft",
    "hydra": "hydra-core",
    "numpy": "numpy",
}
_GIT_TIMEOUT_S = 5.0
_MASK = "***"
_NAME = r"(?:(?i:(?<![a-z])key|api[_-]?key|token|secrets?|password|passwd|credentials)|Key)"  # how a key ends
_SECRET_KEY = re.compile(_NAME + "$")
# A pair inside an override's value, e.g. logger={api_key: abc, project: demo}
_SECRET_PAIR = re.compile(rf"(?P<key>{_NAME}['\"]?\s*[:=]\s*)[^,}}\]]+")


def versions() -> dict[str, str | None]:
    """Versions of what decides the numbers, from the installed metadata; None for a package not there."""
    found: dict[str, str | None] = {"python": platform.python_version(), "rlhf_cli": rlhf_cli.__version__}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, dirty) of the repository around `folder`; (None, None) without git, repository or commit.

    Dirty means that tracked files differ: looking for untracked ones can take long in a folder full of runs.
    """
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},  # look, but take no lock from a user at work
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def mask_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with `***` for every value whose key looks like a key, token, secret or password.

    Understands `a.b=value`, `+a.b=value`, `--name value`, `--name=value` and pairs inside a value
    (`a={token: x}`). Masks `pad_token` as well: a name too many does less harm than one too few.
    """
    masked: list[str] = []
    hide_next = False
    for argument in argv:
        key, separator, value = argument.partition("=")
        secret = _SECRET_KEY.search(key) is not None
        if hide_next:
            masked.append(_MASK)
        elif separator and secret:
            masked.append(f"{key}={_MASK}")
        else:
            masked.append(key + separator + _SECRET_PAIR.sub(rf"\g<key>{_MASK}", value))
        hide_next = not hide_next and argument.startswith("-") and not separator and secret
    return masked
