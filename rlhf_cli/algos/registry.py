"""The choices of `algo`: one file of this package each."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

import rlhf_cli.algos
from rlhf_cli.algos.base import Algorithm


@cache
def algorithms() -> dict[str, type[Algorithm]]:
    """The algorithm in each file, by the file's name. Files without one hold what several share."""
    found: dict[str, type[Algorithm]] = {}
    for info in pkgutil.iter_modules(rlhf_cli.algos.__path__):
        module = importlib.import_module(f"rlhf_cli.algos.{info.name}")
        here = [
            one
            for one in vars(module).values()
            if inspect.isclass(one)
            and issubclass(one, Algorithm)
            and one.__module__ == module.__name__
            and one.name  # the bases have none
        ]
        assert len(here) <= 1, f"{module.__name__} has {len(here)} algorithms"
        if here:
            found[info.name] = here[0]
    return found
