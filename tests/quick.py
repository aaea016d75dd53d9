"""What tests do hundreds of times in one process, made cheap there: composing a config.

What comes out is the same. Commands in processes of their own, as those of test_pipeline.py, have none of this.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import yaml


def compose_quickly() -> None:
    """Hydra reads a YAML file's text once per process, and does not copy every schema for each config it composes."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.config_store import ConfigStore
    from omegaconf import base, omegaconf

    @functools.cache
    def parsed(text: str, loader: type) -> Any:
        return yaml.load(text, loader)

    loaders: dict[None, type] = {}

    def load(stream: Any, Loader: type) -> Any:  # noqa: N803 - as yaml.load has it
        # OmegaConf makes an equal class for every file
        loader = loaders.setdefault(None, Loader)
        return copy.deepcopy(parsed(stream if isinstance(stream, str) else stream.read(), loader))

    omegaconf.yaml = SimpleNamespace(**{**vars(yaml), "load": load})
    # A tree of syntax, which is only read
    base.parse = functools.cache(base.parse)
    # There is one in a process, and what it gives away are copies
    ConfigStore.__deepcopy__ = lambda self, memo: self
    ConfigLoaderImpl.load_configuration = unmeasured(ConfigLoaderImpl.load_configuration)


def unmeasured(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without coverage's look at each of its calls, none of which is ours: that is a third of the time."""

    @functools.wraps(function)
    def paused(*arguments: Any, **options: Any) -> Any:
        coverage = sys.modules.get("coverage")
        measuring = coverage.Coverage.current() if coverage is not None else None
        if measuring is None:
            return function(*arguments, **options)
        measuring._collector.pause()
        try:
            return function(*arguments, **options)
        finally:
            measuring._collector.resume()

    return paused
