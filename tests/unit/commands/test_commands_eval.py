"""The names of policies, and the models behind them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlhf_cli.commands.eval import _flat_summary, _named, _run_name, _Subject, _subject
from rlhf_cli.errors import RequestError
from rlhf_cli.evaluation.statistics import Estimate
from rlhf_cli.runs.job import Artifact


def subjects(*pairs: tuple[str, str]) -> list[_Subject]:
    return [_Subject(name, path, {}) for name, path in pairs]


def names(*pairs: tuple[str, str]) -> list[str]:
    return [subject.name for subject in _named(subjects(*pairs))]


def test_a_policy_keeps_its_runs_name():
    assert names(("rloo", "runs/a/model"), ("reinforce", "runs/b/model")) == ["rloo", "reinforce"]


def test_policies_of_one_name_get_their_folders_names():
    assert names(("rloo", "runs/a/model"), ("rloo", "runs/b/model"), ("ppo", "c/model")) == ["a", "b", "ppo"]
    assert names(("model", "x/a"), ("model", "x/b")) == ["a", "b"]  # folders of models, not of runs


def test_equal_names_even_then_get_a_number():
    assert names(("rloo", "one/0/model"), ("rloo", "two/0/model"), ("rloo", "three/0/model")) == [
        "0",
        "0-2",
        "0-3",
    ]
    assert names(("a", "x/model"), ("a", "y/a/model"), ("x", "z/model")) == ["x", "a", "x-2"]
    assert names(("rloo", "same/model"), ("rloo", "same/model")) == ["same", "same-2"]


@pytest.mark.parametrize("taken", ["sft", "reference", "rm"])
def test_names_that_an_evaluation_uses_itself_are_not_given(taken: str):
    """A summary has `<name>/<metric>`, and `rm/accuracy` is the reward model's."""
    assert names((taken, "runs/a/model")) == [f"{taken}-2"]


def test_naming_changes_nothing_else():
    before = [_Subject("a", "x/model", {"sft": "s"}), _Subject("a", "y/model", {"rm": "r"})]
    assert [(one.path, one.upstream) for one in _named(before)] == [(one.path, one.upstream) for one in before]


def run_folder(folder: Path, record: dict[str, object] | None) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    return folder


def test_a_run_folder_says_its_name_and_what_is_behind_it(tmp_path: Path):
    upstream = {"sft": {"path": "/models/sft", "digest": "1"}, "rm": {"path": "/models/rm", "digest": "2"}}
    folder = run_folder(tmp_path / "a", {"name": "rloo", "upstream": upstream})
    behind = {"sft": Artifact("/models/sft", "1"), "rm": Artifact("/models/rm", "2")}
    expected = _Subject("rloo", str(folder / "model"), behind)
    assert _subject(str(folder)) == expected


def test_a_model_folder_has_its_own_name_and_nothing_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = run_folder(tmp_path / "a", None)
    assert _subject(str(folder)) == _Subject("a", str(folder / "model"), {})
    assert _subject(f"{folder}/model/") == _Subject("model", str(folder / "model"), {})
    monkeypatch.chdir(folder)
    assert _subject(".").name == "a"


def test_a_path_that_is_none_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"policies=.*nope: no such folder"):
        _subject(str(tmp_path / "nope"))


def test_what_is_behind_a_policy_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run.json has paths as they were given, relative to where the run was started."""
    started, here = tmp_path / "started", tmp_path / "here"
    run_folder(started / "cache" / "sft", None)
    folder = run_folder(started / "run", {"upstream": {"sft": {"path": "cache/sft/model", "digest": "1"}}})
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "hydra.yaml").write_text(f"hydra: {{runtime: {{cwd: {started}}}}}\n")
    here.mkdir()
    monkeypatch.chdir(here)
    assert _subject("../started/run").upstream["sft"].path == str(started / "cache" / "sft" / "model")
    run_folder(here / "cache" / "sft", None)  # another model of the same relative path
    assert _subject("../started/run").upstream["sft"].path == str(started / "cache" / "sft" / "model")
    started.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert _subject("run").upstream == {"sft": Artifact("cache/sft/model", "1")}


def test_the_name_in_a_record_or_the_folders(tmp_path: Path):
    assert _run_name(tmp_path / "a", {"name": "rloo"}) == "rloo"
    assert _run_name(tmp_path / "a", {}) == "a"
    assert _run_name(tmp_path / "a", {"name": ""}) == "a"


def test_a_summary_is_flat():
    value, delta = Estimate(1.0, 0.5, 1.5, 8), Estimate(0.25, -0.5, 1.0, 8)
    flat = _flat_summary(
        {"sft": {"gold/mean": (value, None)}, "rloo": {"gold/mean": (value, delta)}}, {"rm/ece": delta}
    )
    assert flat == {
        "sft/gold/mean": 1.0,
        "sft/gold/mean_lo": 0.5,
        "sft/gold/mean_hi": 1.5,
        "rloo/gold/mean": 1.0,
        "rloo/gold/mean_lo": 0.5,
        "rloo/gold/mean_hi": 1.5,
        "rloo/gold/mean_delta": 0.25,
        "rloo/gold/mean_delta_lo": -0.5,
        "rloo/gold/mean_delta_hi": 1.0,
        "rm/ece": 0.25,
        "rm/ece_lo": -0.5,
        "rm/ece_hi": 1.0,
    }
    assert all(math.isfinite(number) for number in flat.values())


@pytest.mark.parametrize("place", ["front/eta-0.5", "members/i1-m2", "iterations/1/merged"])
def test_a_model_inside_a_run_is_known_by_the_run(tmp_path: Path, place: str):
    upstream = {"sft": {"path": "/models/sft", "digest": "1"}}
    run = run_folder(tmp_path / "a", {"name": "warp", "upstream": upstream})
    inner = run / place
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    found = _subject(str(inner))
    assert found == _Subject(f"warp-{inner.name}", str(inner), {"sft": Artifact("/models/sft", "1")})


def test_a_run_beside_others_is_not_taken_for_a_part_of_one(tmp_path: Path):
    run_folder(tmp_path, {"name": "sweep", "upstream": {}})
    inner = run_folder(tmp_path / "other" / "b", None)
    assert _subject(str(inner)).name == "b"
