"""Reward models that are made of several: what is trained, what is reused, and what a kill in between costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_cli.commands.launch import launch
from tests.e2e.fixtures_e2e import LOADED, content, environment, files, run
from tests.e2e.killing import KILLED, Killing

STEPS = 4
SMALL = [
    "experiment=smoke",
    "device=cpu",
    "precision=fp32",
    "threads=1",
    "checkpoint.every=2",
    "rm.probe_steps=2",
    "rm.train.lr=1e-2",
    f"rm.train.steps={STEPS}",
]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
Start = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def start(cache: Path, tmp_path: Path) -> Start:
    """Trains a reward model; its folder."""

    def begin(name: str, *extra: str) -> Path:
        folder = tmp_path / name
        assert launch("train-rm", [*SMALL, f"stages.cache_dir={cache}", f"run_dir={folder}", *extra]) == 0
        return folder

    return begin


def members(cache: Path) -> dict[str, int]:
    """Those in the cache, each with the time it was written."""
    return {
        one.name: (one / "model" / "model.safetensors").stat().st_mtime_ns for one in cache.glob("rm-member-*")
    }


def model(folder: Path) -> dict[str, bytes]:
    """Weights and settings; a card names the folders that the models before it lie in."""
    found = {name: data for name, data in files(folder / "model").items() if not name.endswith("README.md")}
    assert any(name.endswith(".safetensors") for name in found)
    return found


def test_more_members_train_no_old_one_again_and_an_ensemble_trains_none(
    start: Start, cache: Path, capsys: pytest.CaptureFixture[str]
):
    start("three", "rm=warm", "rm.members=3")
    three = members(cache)
    assert len(three) == 3
    six_at_once = start("six", "rm=warm", "rm.members=6")
    six = members(cache)
    assert len(six) == 6 and three.items() <= six.items()
    capsys.readouterr()
    ensemble = start("ensemble", "rm=ensemble", "rm.members=6")
    assert "training once" not in capsys.readouterr().err
    assert members(cache) == six
    stored = {(cache / name / "model" / "model.safetensors").read_bytes() for name in six}
    copied = {file.read_bytes() for file in (ensemble / "model").glob("member-*/model.safetensors")}
    assert copied == stored and len(stored) == 6
    summaries = [content(folder / "summary.json") for folder in (six_at_once, ensemble)]
    assert [one["rm/members_trained"] for one in summaries] == [6, 6]


def test_members_begin_at_the_models_that_the_sft_run_kept(start: Start, cache: Path):
    # a rate that no weight can feel: what a member began with is what it ends with
    start("warm", "rm=warm", "rm.members=4", "sft.train.steps=6", "sft.snapshots=2", "rm.train.lr=1e-30")
    (sft,) = cache.glob("sft-*")
    (head,) = cache.glob("rm-start-*")
    places = {"": sft / "model"} | {name: sft / "snapshots" / name for name in ("step-00000004", "step-00000002")}
    begins = {name: load_file(place / "model.safetensors") for name, place in places.items()}
    score = load_file(head / "model" / "model.safetensors")["score.weight"]
    counts = dict.fromkeys(begins, 0)
    for folder in cache.glob("rm-member-*"):
        upstream = content(folder / "run.json")["upstream"]
        name = Path(upstream["sft"]["path"]).name if "sft" in upstream else ""
        counts[name] += 1
        ends = load_file(folder / "model" / "model.safetensors")
        assert torch.equal(ends["score.weight"], score)
        backbone = {name for name in ends if name != "score.weight"}
        assert len(backbone) > 10 and all(torch.equal(ends[one], begins[name][one]) for one in backbone)
        others = [begins[other] for other in begins if other != name]
        assert all(any(not torch.equal(ends[one], other[one]) for one in backbone) for other in others)
    assert counts == {"": 2, "step-00000004": 1, "step-00000002": 1}  # in turn: member 3 is at the first again


def test_members_that_a_sweep_trained_side_by_side_are_those_of_one_command(
    start: Start, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = ["train-rm", "rm=warm", "rm.members=3", "rm.member=0,1,2", *SMALL, f"stages.cache_dir={cache}"]
    done = run(["sweep", *line, *JOBLIB, f"run_dir={tmp_path / 'sweep'}"], tmp_path, program=LOADED)
    assert done.status == 0, done.err
    side_by_side = members(cache)
    assert len(side_by_side) == 3 and len(list(cache.glob("rm-start-*"))) == len(list(cache.glob("sft-*"))) == 1
    stored = {(cache / name / "model" / "model.safetensors").read_bytes() for name in side_by_side}
    published = {(tmp_path / f"sweep/{i}/model/model.safetensors").read_bytes() for i in range(3)}
    assert published == stored and len(stored) == 3
    capsys.readouterr()
    warm = start("warm", "rm=warm", "rm.members=3")
    assert "training once" not in capsys.readouterr().err and members(cache) == side_by_side
    alone = start("alone", "rm=warm", "rm.members=3", f"stages.cache_dir={tmp_path / 'another'}")
    assert model(warm) == model(alone)


@pytest.fixture
def killing(tmp_path: Path) -> Iterator[Killing]:
    one = Killing(environment(), tmp_path / "log")
    yield one
    one.end()


def test_killed_inside_a_member_the_same_command_goes_on_there(
    start: Start, cache: Path, tmp_path: Path, killing: Killing
):
    undisturbed = start("undisturbed", "rm=warm", "rm.members=3", f"stages.cache_dir={tmp_path / 'another'}")
    line = ["rm=warm", "rm.members=3", f"stages.cache_dir={cache}", f"run_dir={tmp_path / 'run'}", "resume=auto"]
    row = r"open \S+/\.building-rm-member-\w+/metrics\.jsonl$"
    assert killing("train-rm", [*SMALL, *line], *[row] * (STEPS + 4)) == KILLED  # the second member's last row
    assert len(members(cache)) == 1
    (half,) = cache.glob(".building-rm-member-*")
    assert [one.name for one in (half / "checkpoints").glob("step-*")] == ["step-2"]
    first = members(cache)
    assert killing("train-rm", [*SMALL, *line]) == 0, killing.said()
    assert first.items() <= members(cache).items() and len(members(cache)) == 3
    resumed = [content(one / "run.json")["resumed_from"] for one in cache.glob("rm-member-*")]
    assert sorted(resumed) == [[], [], [2]]
    assert model(tmp_path / "run") == model(undisturbed)
