"""How a run that does not reach its end says so."""

from __future__ import annotations

import csv
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cli.commands.help import group_choices
from tests.e2e.fixtures_e2e import LOADED, Started, content, pace, rows, run


@pytest.fixture(scope="module")
def first_step_cpu_s() -> list[float]:
    """CPU time until the first training step of the real tiny model, one entry per run."""
    return []


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "rlhf: stopped by SIGINT; "),
        (signal.SIGTERM, 143, "rlhf: stopped by SIGTERM; "),
    ],
)
def test_a_run_that_is_stopped(
    number: signal.Signals,
    status: int,
    line: str,
    tmp_path: Path,
    start: Callable[..., Started],
    first_step_cpu_s: list[float],
):
    """The default SFT stage, stopped after its first step."""
    running = start(["train-sft", "run_dir=run"], tmp_path)
    first_step_cpu_s.append(running.wait_for(tmp_path / "run" / "metrics.jsonl"))
    assert content(tmp_path / "run" / "run.json")["status"] == "running"
    ended, err = running.stop(number)
    assert ended == status
    assert err.splitlines()[-1].startswith(line) and "Traceback" not in err
    record = content(tmp_path / "run" / "run.json")
    assert (record["status"], record["error"]) == ("interrupted", None)
    assert record["start"] < record["end"]
    assert rows(tmp_path / "run" / "metrics.jsonl")[0]["step"] == 1


def test_the_first_step_comes_within_eight_seconds(first_step_cpu_s: list[float]):
    """From the command to the first line of metrics, best of the runs above; the time of the process itself."""
    print(
        f"first step after {', '.join(f'{one:.1f}' for one in first_step_cpu_s)} s of CPU time, pace {pace():.2f}"
    )
    assert min(first_step_cpu_s) < 8 * pace()


def test_a_run_that_fails(tmp_path: Path, smoke: list[str]):
    arguments = ["train-policy", *smoke, "run_dir=run", "algo.train.lr=1e30", "algo.train.warmup_ratio=0"]
    done = run(arguments, tmp_path, program=LOADED)
    assert done.status == 1
    assert done.last_line.startswith("rlhf: failed: step 2: ") and done.last_line.endswith("run/rlhf.log)")
    assert "Traceback" not in done.err and done.out == ""
    record = content(tmp_path / "run" / "run.json")
    assert record["status"] == "failed"
    assert record["error"].startswith("rlhf_cli.train.loop.TrainingDivergedError: step 2: ")
    log = (tmp_path / "run" / "rlhf.log").read_text()
    assert "Traceback (most recent call last)" in log and "TrainingDivergedError" in log
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1


def test_a_job_that_fails_does_not_hide_the_others(tmp_path: Path, smoke: list[str]):
    arguments = ["sweep", "train-policy", *smoke, "run_dir=sweep", "algo.train.warmup_ratio=0"]
    done = run([*arguments, "algo.train.lr=5e-4,1e30,1e-4"], tmp_path, program=LOADED)
    assert done.status == 1
    table = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["job"], row["algo.train.lr"], row["status"]) for row in table] == [
        ("0", "0.0005", "finished"),
        ("1", "1e+30", "failed"),
        ("2", "0.0001", "finished"),
    ]
    assert "step 2: " in table[1]["error"] and not table[0]["error"]
    groups = list(csv.DictReader((tmp_path / "sweep" / "summary.csv").open()))
    assert [row["algo.train.lr"] for row in groups] == ["0.0005", "0.0001"]
    (listed,) = [line for line in done.out.splitlines() if line.startswith("job 1 failed: ")]
    assert "TrainingDivergedError: step 2: " in listed
    assert done.last_line.startswith("rlhf: a job of the sweep failed: step 2: ")


def test_a_request_that_is_wrong(tmp_path: Path):
    done = run(["train-policy", "algo=rlo"], tmp_path)
    assert (done.status, done.out) == (2, "")
    assert done.err == f"rlhf: algo=rlo: not one of {', '.join(group_choices('algo'))} (did you mean rloo?)\n"
    done = run(["train-policy", "algo=rlo"], tmp_path, HYDRA_FULL_ERROR="1")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err and done.last_line.startswith("rlhf: algo=rlo")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_none(tmp_path: Path):
    done = run(["train-policies"], tmp_path)
    assert done.status == 2 and "train-policies" in done.err and "Traceback" not in done.err
