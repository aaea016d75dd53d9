"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.fixtures_e2e import RLHF, Started, environment


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Starts a command; whatever still runs at the end of the test is killed."""
    started: list[Started] = []

    def begin(arguments: Sequence[str], cwd: Path) -> Started:
        process = subprocess.Popen(
            [*RLHF, *arguments],
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(Started(process, time.perf_counter()))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Stages are built once for all tests, whichever worker runs them: the cache has its own locks."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "e2e-stages"


@pytest.fixture(scope="session")
def smoke(cache: Path) -> list[str]:
    """Arguments of a tiny run."""
    return ["experiment=smoke", f"stages.cache_dir={cache}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of a module's tests."""
    return tmp_path_factory.mktemp("work")
