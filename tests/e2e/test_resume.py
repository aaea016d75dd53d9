"""A run that was cut short goes on to the bit; nothing else is taken for a continuation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.commands.launch import launch
from rlhf_cli.commands.sweep import sweep
from tests.e2e.fixtures_e2e import ROOT, crash, environment, fail_at, figures, weights

STEPS = 10
LENGTHS = [f"{stage}.train.steps={STEPS}" for stage in ("sft", "rm", "algo")]
SMALL = ["experiment=smoke", "device=cpu", "precision=fp32", "checkpoint.every=3", *LENGTHS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(cache: Path) -> Callable[..., int]:
    """Runs a command in this process; its exit status."""

    def run(command: str, folder: Path, *extra: str) -> int:
        return launch(command, [*SMALL, f"stages.cache_dir={cache}", f"run_dir={folder}", *extra])

    return run


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("train-sft", ["sft.train.eval_every=2", "sft.train.lr=1e-2"]),
        ("train-rm", ["rm.train.eval_every=2"]),
        ("train-policy", ["algo=reinforce", "algo.train.eval_every=4"]),
        ("train-policy", ["peft=lora", "algo.train.gradient_checkpointing=true", "algo.train.lr=1e-2"]),
        ("train-policy", ["peft=adapter", "algo.train.gradient_checkpointing=true", "algo.train.lr=1e-2"]),
        ("train-policy", ["algo=rloo", "algo.rollout_batch_size=16", "algo.num_epochs=2", "algo.train.steps=12"]),
        ("train-policy", ["algo=ppo", "algo.value_head=separate", "rm.noise=1", "algo.train.eval_every=4"]),
    ],
)
def test_a_crashed_run_goes_on_to_the_bit(
    command: str, extra: list[str], start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert start(command, tmp_path / "undisturbed", *extra) == 0
    for step in (2, 8, 9):
        with monkeypatch.context() as patch:
            fail_at(patch, tmp_path, step, crash)
            assert start(command, tmp_path / "crashed", *extra, "resume=auto") == 1
    assert start(command, tmp_path / "crashed", *extra, "resume=auto") == 0
    assert figures(tmp_path / "crashed") == figures(tmp_path / "undisturbed")
    assert weights(tmp_path / "crashed") == weights(tmp_path / "undisturbed")
    record = json.loads((tmp_path / "crashed" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["resumed_from"][0] == 0 and record["resumed_from"][-1] in (6, 8, 9)


def test_rows_before_the_checkpoint_stay_byte_for_byte(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 8, crash)
        assert start("train-policy", tmp_path, "resume=auto") == 1
    before = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    # Hydra writes its own copy of the config at every start, and a kill may come in between
    (tmp_path / ".hydra" / "config.yaml").write_text("")
    assert start("train-policy", tmp_path, "resume=auto") == 0
    after = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    assert before[:6] == after[:6]
    assert len(after) == STEPS + 1


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_end_and_writes_a_checkpoint(
    number: int, status: int, start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 4, lambda: os.kill(os.getpid(), number))
        assert start("train-sft", tmp_path) == status
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "checkpoints" / "step-4").is_dir()
    assert start("train-sft", tmp_path, "resume=auto") == 0
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from"] == [4]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.fixture(scope="module")
def undisturbed(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the damaged ones below have to end as."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert launch("train-sft", [*SMALL, f"run_dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("harmed", "harm", "resumed_from"),
    [
        (["step-6/tensors.safetensors"], flip, 3),
        (["step-6/tensors.safetensors"], truncate, 3),
        (["step-6/state.json"], truncate, 3),
        (["step-6/digests.json"], Path.unlink, 3),
        (["step-3/tensors.safetensors", "step-6/state.json"], truncate, 0),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    harmed: list[str],
    harm: Callable[[Path], None],
    resumed_from: int,
    start: Callable[..., int],
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 8, crash)
        assert start("train-sft", tmp_path, "resume=auto") == 1
    checkpoints = tmp_path / "checkpoints"
    for name in harmed:
        harm(checkpoints / name)
    capsys.readouterr()
    assert start("train-sft", tmp_path, "resume=auto") == 0
    said = capsys.readouterr().err
    assert said.count(" is damaged (") == len(harmed)
    assert all(f"{Path(name).parent} is damaged (" in said for name in harmed)
    assert f"resuming after step {resumed_from}\n" in said
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from"] == [resumed_from]
    assert figures(tmp_path) == figures(undisturbed)
    assert weights(tmp_path) == weights(undisturbed)


def test_what_a_kill_left_half_written_is_ignored_and_removed(
    start: Callable[..., int], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 8, crash)
        assert start("train-sft", tmp_path, "resume=auto") == 1
    left = tmp_path / "checkpoints" / ".step-7.building"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert start("train-sft", tmp_path, "resume=auto") == 0
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from"] == [6]
    assert sorted(path.name for path in left.parent.iterdir()) == ["step-6", "step-9"]
    assert weights(tmp_path) == weights(undisturbed)


def test_another_config_is_refused_with_the_difference(
    start: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 5, crash)
        assert start("train-policy", tmp_path, "resume=auto") == 1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert start("train-policy", tmp_path, "resume=auto", "algo.beta=0.7") == 2
    assert "algo.beta was 0.1, is 0.7" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # where figures go and how often state is kept may change
    assert start("train-policy", tmp_path, "resume=auto", "checkpoint.every=5") == 0


def test_a_finished_run_stays_as_it_is(start: Callable[..., int], tmp_path: Path):
    assert start("train-sft", tmp_path) == 0
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    assert start("train-sft", tmp_path, "resume=auto") == 0
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_sweep_reruns_only_what_is_missing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    line = ["train-sft", "experiment=smoke", "seed=0,1", f"stages.cache_dir={cache}", f"run_dir={tmp_path}"]
    with monkeypatch.context() as patch:
        fail_at(patch, tmp_path, 2, crash)
        assert sweep(line) == 1
    assert sweep([*line, "resume=auto"]) == 0
    done = {n: (tmp_path / n / "model" / "model.safetensors").stat().st_mtime_ns for n in ("0", "1")}
    (tmp_path / "1" / "run.json").unlink()
    (tmp_path / "1" / "metrics.jsonl").unlink()
    for file in (tmp_path / "1" / "model").iterdir():
        file.unlink()
    (tmp_path / "1" / "model").rmdir()
    assert sweep([*line, "resume=auto"]) == 0
    again = {n: (tmp_path / n / "model" / "model.safetensors").stat().st_mtime_ns for n in ("0", "1")}
    assert again["0"] == done["0"]
    assert again["1"] > done["1"]


def test_killed_at_random_moments(tmp_path: Path):
    """The short form of scripts/kill_and_resume.py."""
    script = ROOT / "scripts" / "kill_and_resume.py"
    line = [
        sys.executable,
        str(script),
        "--kills",
        "3",
        "--stages",
        "train-policy",
        "--work",
        str(tmp_path / "work"),
    ]
    done = subprocess.run(line, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 stages equal to the bit after 3 kills" in done.stdout
