"""The jobs of a sweep in parallel processes: the same figures, the same care for what is missing or fails."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from rlhf_cli.commands.sweep import sweep
from tests.e2e.fixtures_e2e import LOADED, content, figures, files, run, timeless, weights

JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
JOBS = ("0", "1")


def table(file: Path) -> list[dict[str, str]]:
    return [timeless(row) for row in csv.DictReader(file.open())]


@pytest.fixture(scope="module")
def line(place: Path) -> list[str]:
    """Two policies that differ in the seed."""
    few = ["device=cpu", "precision=fp32", "checkpoint.every=1", "algo.train.steps=4", "seed=0,1"]
    return ["train-policy", "experiment=smoke", *few, f"stages.cache_dir={place / 'cache'}"]


@pytest.fixture(scope="module")
def one_by_one(place: Path, line: list[str]) -> Path:
    """The sweep in this process, job after job."""
    assert sweep([*line, f"run_dir={place / 'basic'}"]) == 0
    return place / "basic"


@pytest.fixture(scope="module")
def parallel(place: Path, line: list[str], one_by_one: Path) -> Path:
    """The sweep in processes of its own."""
    done = run(["sweep", *line, *JOBLIB, f"run_dir={place / 'joblib'}"], place, program=LOADED)
    assert done.status == 0, done.err
    return place / "joblib"


def test_parallel_jobs_give_the_same_figures(one_by_one: Path, parallel: Path):
    for job in JOBS:
        assert figures(parallel / job) == figures(one_by_one / job)
        assert weights(parallel / job) == weights(one_by_one / job) and weights(parallel / job)
        summaries = [timeless(content(folder / job / "summary.json")) for folder in (parallel, one_by_one)]
        assert summaries[0] == summaries[1]
    for name in ("sweep.csv", "summary.csv"):
        assert table(parallel / name) == table(one_by_one / name)
    assert figures(parallel / "0") != figures(parallel / "1")


def test_only_the_job_that_was_cut_short_runs_again(
    place: Path, line: list[str], one_by_one: Path, parallel: Path, tmp_path: Path
):
    folder = tmp_path / "joblib"
    shutil.copytree(parallel, folder)
    cut = folder / "1"  # as a kill in the middle of its fourth row leaves it
    record = content(cut / "run.json") | {"status": "running", "end": None}
    (cut / "run.json").write_text(json.dumps(record))
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-20])
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "model")
    before = files(folder / "0")
    done = run(["sweep", *line, *JOBLIB, f"run_dir={folder}", "resume=auto"], place, program=LOADED)
    assert done.status == 0, done.err
    after = files(folder / "0")
    own = [name for name in before if not name.startswith((".hydra/", "rlhf.log"))]  # Hydra writes its files anew
    assert {name: after[name] for name in own} == {name: before[name] for name in own}
    assert content(cut / "run.json")["resumed_from"] == [3]
    assert figures(cut) == figures(one_by_one / "1")
    assert weights(cut) == weights(one_by_one / "1")
    assert table(folder / "sweep.csv") == table(one_by_one / "sweep.csv")


def test_a_parallel_job_that_fails_is_listed_beside_those_that_are_done(tmp_path: Path):
    arguments = ["sweep", "train-sft", "experiment=smoke", *JOBLIB, "sft.train.warmup_ratio=0", "run_dir=sweep"]
    done = run([*arguments, "sft.train.lr=1e30,1e-3"], tmp_path, program=LOADED)
    assert done.status == 1
    jobs = table(tmp_path / "sweep" / "sweep.csv")
    assert [(job["job"], job["sft.train.lr"], job["status"]) for job in jobs] == [
        ("0", "1e+30", "failed"),
        ("1", "0.001", "finished"),
    ]
    assert "TrainingDivergedError: step 2: " in jobs[0]["error"] and not jobs[1]["error"]
    assert float(jobs[1]["loss"]) > 0 and not jobs[0]["loss"]
    (listed,) = [one for one in done.out.splitlines() if one.startswith("job 0 failed: ")]
    assert "TrainingDivergedError: step 2: " in listed
    assert done.last_line.startswith("rlhf: a job of the sweep failed: step 2: ")
