"""What a sweep's folder says of its jobs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_cli.commands import sweep as module
from rlhf_cli.commands.job import ERROR_FILE
from rlhf_cli.commands.launch import FAILED, OK
from rlhf_cli.commands.sweep import JobRow, collect, grouped, over_seeds, read_jobs, sweep, swept_keys


def job(number: int, status: str = "finished", summary: Any = None, **overrides: Any) -> JobRow:
    given = {key: str(value) for key, value in overrides.items()}
    return JobRow(number, given, overrides.get("seed"), status, None, summary or {})


def write_job(
    folder: Path, number: int, overrides: list[str], seed: int, summary: dict | None, record: dict | None
):
    place = folder / str(number)
    (place / ".hydra").mkdir(parents=True)
    (place / ".hydra" / "overrides.yaml").write_text("".join(f"- {line}\n" for line in overrides) or "[]\n")
    (place / ".hydra" / "config.yaml").write_text(f"seed: {seed}\n")
    for name, content in (("summary.json", summary), ("run.json", record)):
        if content is not None:
            (place / name).write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two settings with two seeds, of which one job failed and one was killed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    sweep = tmp_path / "sweep"
    done = {"status": "finished", "error": None}
    common = ["algo=rloo", "run_dir=sweep"]
    for number, (k, seed, reward) in enumerate([(2, 0, 1.0), (2, 1, 2.0), (10, 0, 5.0)]):
        summary = {"reward/mean": reward, "kl/full": reward / 10, "gold/mean": None}
        write_job(sweep, number, [*common, f"algo.k={k}", f"seed={seed}"], seed, summary, done)
    failed = {"status": "failed", "error": "TrainingDivergedError: step 1: loss is nan"}
    write_job(sweep, 3, [*common, "algo.k=10", "seed=1"], 1, None, failed)
    write_job(sweep, 10, [*common, "algo.k=2", "seed=2"], 2, None, {"status": "running"})
    write_job(sweep, 4, [*common, "algo.k=10", "seed=2"], 2, None, None)
    write_job(sweep, 6, [*common, "algo.k=2", "seed=3"], 3, None, None)
    (sweep / "6" / ERROR_FILE).write_text(
        '{"status": "failed", "error": "RequestError: rm.path=x: no such folder"}'
    )
    (sweep / "plots").mkdir()
    (sweep / "5").write_text("a file, no job")
    return sweep


def test_jobs_are_read_by_number(folder: Path):
    jobs = read_jobs(folder)
    assert [one.number for one in jobs] == [0, 1, 2, 3, 4, 6, 10]
    assert [one.status for one in jobs] == ["finished"] * 3 + ["failed", "missing", "failed", "running"]
    assert jobs[1].overrides == {"algo": "rloo", "run_dir": "sweep", "algo.k": "2", "seed": "1"}
    assert (jobs[1].seed, jobs[1].summary["reward/mean"], jobs[1].error) == (1, 2.0, None)
    assert jobs[3].error == "TrainingDivergedError: step 1: loss is nan"
    assert jobs[3].summary == {}


def test_a_folder_without_anything_is_a_missing_job(tmp_path: Path):
    (tmp_path / "0").mkdir()
    assert read_jobs(tmp_path) == [JobRow(0, {}, None, "missing", None, {})]
    assert read_jobs(tmp_path / "0") == []


def test_swept_keys_are_those_that_differ_in_the_order_they_were_given():
    jobs = [job(0, rm="a", b=1, **{"algo.k": 2}), job(1, rm="a", b=2, **{"algo.k": 2}), job(2, rm="a", b=1)]
    assert swept_keys(jobs) == ["b", "algo.k"]
    assert swept_keys([job(0, b=1)]) == []
    assert swept_keys([]) == []


def test_added_keys_are_named_without_their_plus(tmp_path: Path):
    for number in (0, 1):
        write_job(tmp_path, number, [f"++algo.k={number}", "+experiment=x=y"], 0, {}, {})
    jobs = read_jobs(tmp_path)
    assert swept_keys(jobs) == ["algo.k"]
    assert jobs[0].overrides["experiment"] == "x=y"


def test_groups_have_every_swept_key_but_the_seed():
    jobs = [
        job(0, k=2, seed=0, summary={"loss": 1.0}),
        job(1, k=2, seed=1, summary={"loss": 3.0}),
        job(2, k=4, seed=0, summary={"loss": 5.0}),
        job(3, status="failed", k=4, seed=1, summary={"loss": 99.0}),
        job(4, status="failed", k=8, seed=0),
    ]
    rows = grouped(jobs, ["k", "seed"], ["loss", "absent"])
    assert [(row["k"], row["seeds"]) for row in rows] == [("2", 2), ("4", 1)]
    two, one = rows[0]["loss"], rows[1]["loss"]
    # Student's t with one degree of freedom: 12.706 standard errors of 1
    assert (two.value, two.n) == (2.0, 2)
    assert math.isclose(two.hi, 2 + 12.7062, rel_tol=1e-6) and math.isclose(two.lo, 2 - 12.7062, rel_tol=1e-6)
    assert one.value == 5.0 and math.isnan(one.lo) and math.isnan(one.hi)
    assert rows[0]["absent"] is None


def test_jobs_that_differ_in_their_seed_alone_are_one_group():
    jobs = [job(number, seed=number, summary={"loss": number}) for number in range(3)]
    (row,) = grouped(jobs, ["seed"], ["loss"])
    assert (row["seeds"], row["loss"].value) == (3, 1.0)


def test_a_metric_is_averaged_over_the_jobs_that_have_it():
    jobs = [
        job(0, summary={"a": 1.0}),
        job(1, summary={"a": None}),
        job(2, summary={}),
        job(3, summary={"a": 0.0}),
    ]
    estimate = over_seeds(jobs, "a")
    assert (estimate.value, estimate.n) == (0.5, 2)
    assert over_seeds(jobs[1:3], "a") is None


def test_what_is_written_of_a_sweep_with_failures(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert collect(folder) == FAILED
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert list(rows[0])[:4] == ["job", "algo.k", "seed", "status"]
    assert list(rows[0])[-1] == "error"
    assert [row["job"] for row in rows] == ["0", "1", "2", "3", "4", "6", "10"]
    assert [row["status"] for row in rows] == ["finished"] * 3 + ["failed", "missing", "failed", "running"]
    assert [row["reward/mean"] for row in rows] == ["1.0", "2.0", "5.0", "", "", "", ""]
    assert [row["gold/mean"] for row in rows] == [""] * 7
    assert rows[3]["error"] == "TrainingDivergedError: step 1: loss is nan"
    summary = list(csv.DictReader((folder / "summary.csv").open()))
    assert [(row["algo.k"], row["seeds"], row["reward/mean"]) for row in summary] == [
        ("2", "2", "1.5"),
        ("10", "1", "5.0"),
    ]
    assert summary[0]["reward/mean_lo"] and not summary[1]["reward/mean_lo"]
    assert (folder / "plots" / "reward_kl.png").stat().st_size > 1000
    out = capsys.readouterr().out
    for line in (
        "job 3 failed: TrainingDivergedError: step 1: loss is nan",
        "job 4 missing: no reason recorded",
        "job 6 failed: RequestError: rm.path=x: no such folder",
        "job 10 running: no reason recorded",
        "sweep/sweep.csv",
        "sweep/summary.csv",
        "sweep/plots/reward_kl.png",
    ):
        assert line in out.splitlines()
    assert "Jobs" in out and "Mean over seeds" in out


def test_a_sweep_that_all_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in (0, 1):
        write_job(tmp_path, number, [f"algo.k={number}"], 0, {"loss": number}, {"status": "finished"})
    assert collect(tmp_path) == OK
    out = capsys.readouterr().out
    assert "Mean over seeds" not in out  # one seed each: the table of jobs says it all
    assert not (tmp_path / "plots").exists()  # no reward, no KL: nothing to plot


def test_a_sweep_without_jobs_writes_nothing(tmp_path: Path):
    assert collect(tmp_path) == OK
    assert list(tmp_path.iterdir()) == []


def test_a_seed_without_a_figure_is_left_out_of_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Null is not zero."""
    shown: list[Any] = []
    monkeypatch.setattr("rlhf_cli.commands.sweep.sweep_reward_vs_kl", lambda path, groups: shown.extend(groups))
    for number, kl in enumerate((2.0, None, 4.0)):
        summary = {"reward/mean": float(number), "kl/full": kl, "gold/mean": -1.0}
        write_job(tmp_path, number, [f"seed={number}"], number, summary, {"status": "finished"})
    assert collect(tmp_path) == OK
    (group,) = shown
    assert (group.label, group.kl.value, list(group.seed_kl)) == ("all", 3.0, [2.0, 4.0])
    assert (list(group.seed_reward), list(group.seed_gold)) == ([0.0, 2.0], [-1.0, -1.0])


def test_a_table_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "sweep.csv")

    monkeypatch.setattr(module, "launch_into", lambda *_, **__: (0, tmp_path))
    monkeypatch.setattr(module, "collect", full)
    assert sweep(["train-sft"]) == FAILED
    assert capsys.readouterr().err == "rlhf: failed: [Errno 28] No space left on device: 'sweep.csv'\n"


def front(reward: float) -> dict[str, float]:
    found = {}
    for eta in ("0", "0.5", "1"):
        for figure in ("reward/mean", "kl/full"):
            value = reward * float(eta)
            found |= {
                f"front/eta-{eta}/{figure}": value,
                f"front/eta-{eta}/{figure}_lo": value - 1,
                f"front/eta-{eta}/{figure}_hi": value + 1,
            }
    return found


def test_fronts_are_lines_over_eta_and_means_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    points: list[Any] = []
    monkeypatch.setattr(module, "reward_vs_kl", lambda path, found, title: points.extend(found))
    for number, (mu, seed, reward) in enumerate([("0.1", 0, 2.0), ("0.1", 1, 4.0), ("0.5", 0, 8.0)]):
        write_job(tmp_path, number, [f"algo.mu={mu}", f"seed={seed}"], seed, front(reward), {"status": "finished"})
    assert collect(tmp_path) == OK
    assert [(point.series, point.label) for point in points] == [
        (series, eta) for series in ("mu=0.1", "mu=0.5") for eta in ("0", "0.5", "1")
    ]
    assert [point.reward.value for point in points] == [0.0, 1.5, 3.0, 0.0, 4.0, 8.0]
    assert (points[2].reward.n, points[5].reward.n) == (2, 1)
    # the one run of mu=0.5 has the interval over its prompts
    assert (points[5].kl.lo, points[5].kl.hi) == (7.0, 9.0) and points[2].reward.lo < 0 < points[2].reward.hi
    assert all(point.gold is None for point in points)
    with (tmp_path / "summary.csv").open() as stream:
        first = next(iter(csv.DictReader(stream)))
    # the ends are of the mean over seeds, and not a mean of the ends over prompts, which would be 2 and 4
    assert float(first["front/eta-1/kl/full"]) == 3.0 and float(first["front/eta-1/kl/full_lo"]) < 0
    assert not any(name.endswith(("_lo_lo", "_hi_hi")) for name in first)


def test_a_sweep_without_fronts_draws_none(folder: Path):
    collect(folder)
    assert not (folder / "plots" / "front.png").exists()


@pytest.mark.parametrize(("second", "is_shown"), [(6400, False), (0, True)])
def test_a_budget_is_shown_where_jobs_differ_in_it(
    tmp_path: Path, second: int, is_shown: bool, capsys: pytest.CaptureFixture[str]
):
    for number, samples in enumerate((6400, second)):
        summary = {"reward/mean": 1.0, "samples_generated": samples}
        write_job(tmp_path, number, [f"algo.beta={number}"], 0, summary, {"status": "finished"})
    collect(tmp_path)
    assert ("samples_generated" in capsys.readouterr().out.replace("\n", "")) == is_shown
