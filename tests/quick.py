"""What tests do hundreds of times in one process, made cheap there: composing a config, drawing a figure.

What comes out is the same. Commands in processes of their own, as those of test_pipeline.py, have none of this.
"""

from __future__ import annotations

import copy
import functools
import struct
import sys
import zlib
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


def no_search_for_the_mode(self: Any, **options: Any) -> None:
    """In place of Hydra.get_mode, which composes a config of its own to see whether it asks for a sweep.

    `launch` has seen to that: it gives Hydra the flag for one.
    """


def blank(width: int, height: int) -> bytes:
    """A white PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\xff" * width) * height
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def save_blank(figure: Any, file: Any, **options: Any) -> None:
    """In place of matplotlib's Figure.savefig: layout and text of a figure take longer than the tiny runs it is of."""
    size = figure.get_size_inches()
    file.write(blank(*(round(float(inches) * 10) for inches in size)))
