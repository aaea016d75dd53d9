"""Rows are streamed and memory-mapped; scripts/benchmarks/million_rows.py measures the same at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fixtures_data import attribute_row, write

from rlhf_cli.data.dataset import rows_digest
from rlhf_cli.data.helpsteer2 import load_helpsteer2
from rlhf_cli.data.jsonl import load_jsonl
from rlhf_cli.data.settings import HelpSteer2Settings, JsonlSettings

REPOSITORY = Path(__file__).parents[3]
SCRIPT = REPOSITORY / "scripts/benchmarks/million_rows.py"

MIB = 2**20
FILE = 48 * MIB
ALLOWED = 16 * MIB  # some batches of 2 Mi characters, on their way into Arrow and back


def peak(step: Callable[[], Any]) -> tuple[Any, int]:
    """What a step returns, and the most bytes that Python and Arrow held for it."""
    pa.array(["imports what Arrow imports on first use"])
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    try:
        result = step()
        return result, tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", ["pairs", "rated"])
def test_a_file_of_several_times_the_memory(form: str, tmp_path: Path) -> None:
    n, text = 4096, "x" * (FILE // 4096 // 2)
    if form == "pairs":
        rows = [{"prompt": f"{i}", "chosen": f"{i} {text}", "rejected": text} for i in range(n)]
    else:
        rows = [attribute_row(f"{i // 2}", f"{i} {text * 2}", i % 2) for i in range(n)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    del rows
    settings = {"path": path, "test_fraction": 0.2, "validation_fraction": 0.2}
    load: Callable[[], Any] = (
        (lambda: load_jsonl(JsonlSettings(**settings)))
        if form == "pairs"
        else (lambda: load_helpsteer2(HelpSteer2Settings(**settings)))
    )
    assert Path(path).stat().st_size >= FILE
    data, used = peak(load)
    assert used < ALLOWED, f"loading: {used / MIB:.0f} MiB"
    _, used = peak(lambda: rows_digest(data.sft, data.pairs, data.prompts))
    assert used < ALLOWED, f"digest: {used / MIB:.0f} MiB"
    lengths, used = peak(lambda: Counter(len(pair.rejected) for pair in data.pairs))
    assert used < ALLOWED, f"reading: {used / MIB:.0f} MiB"
    assert sum(lengths.values()) == len(data.pairs) > n // 4


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize("form", ["pairs", "rated"])
def test_the_benchmark_measures(form: str) -> None:
    done = run("--rows", "2000", "--form", form)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == 2000 and 500 < result["pairs"] <= 2000
    assert 0 < result["start_gib"] <= result["loaded_gib"] <= result["peak_gib"] < 1
    assert set(result) >= {"load_s", "digest_s", "load_again_s", "file_gib"}


def test_the_memory_of_the_process_that_starts_the_benchmark_is_not_counted() -> None:
    held = bytearray(os.urandom(MIB)) * 1024
    done = run("--rows", "200", "--form", "pairs")
    assert len(held) == 1024 * MIB and done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["start_gib"] < 0.9


def test_the_benchmark_fails_above_its_limit() -> None:
    assert run("--rows", "200", "--form", "pairs", "--max-gib", "0.001").returncode == 1
