"""The examples in the docstrings say what the functions do."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rlhf_cli.ops

MODULES = [info.name for info in pkgutil.iter_modules(rlhf_cli.ops.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str):
    module = importlib.import_module(f"rlhf_cli.ops.{name}")
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    modules = [importlib.import_module(f"rlhf_cli.ops.{name}") for name in MODULES]
    assert sum(doctest.testmod(module).attempted for module in modules) > 40
