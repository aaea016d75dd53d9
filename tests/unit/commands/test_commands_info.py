"""What `rlhf info` says of a run, whatever state it was left in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.commands.help import group_choices
from rlhf_cli.commands.info import info
from rlhf_cli.commands.job import ERROR_FILE

RECORD = {
    "status": "finished",
    "error": None,
    "command": "eval",
    "name": "mine",
    "argv": ["rlhf", "eval", "policies=[a,b]", "name=:smile:"],
    "seed": 3,
    "upstream": {"rm": {"path": "cache/rm", "digest": "0123456789abcdef"}},
}


def lines(out: str) -> list[list[str]]:
    return [line.split() for line in out.splitlines()]


def test_a_run_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.png").touch()
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    (tmp_path / "summary.json").write_text(
        json.dumps({"rm/accuracy": 0.71234567, "step": 100, "kl/k1": 0.0, "gold/mean": None})
    )
    assert info(tmp_path) == 0
    said = lines(capsys.readouterr().out)
    for line in (
        ["status", "finished"],
        ["command", "eval"],
        ["name", "mine"],
        ["argv", "rlhf", "eval", "policies=[a,b]", "name=:smile:"],  # neither a style nor an emoji
        ["rm", "cache/rm", "(0123456789ab)"],
        ["rm/accuracy", "0.7123"],
        ["step", "100"],
        ["kl/k1", "0"],
        ["gold/mean", "-"],
        ["plots/a.png"],
    ):
        assert line in said
    assert not [line for line in said if line[0] in ("error", "device")]


def test_a_job_that_failed_before_it_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A job of a sweep leaves its status and its error alone."""
    (tmp_path / ERROR_FILE).write_text(json.dumps({"status": "failed", "error": "RequestError: no such folder"}))
    assert info(tmp_path) == 0
    assert lines(capsys.readouterr().out) == [
        ["status", "failed"],
        ["error", "RequestError:", "no", "such", "folder"],
    ]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "holds no run (no run.json)"),
        ({"run.json": "{"}, "run.json is not JSON"),
        ({"run.json": json.dumps(RECORD), "summary.json": "nan?"}, "summary.json is not JSON"),
    ],
)
def test_what_is_no_run_is_a_wrong_request(
    files: dict[str, str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert info(tmp_path) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"rlhf: info {tmp_path}: ") and reason in said.err


def test_the_installation_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for stage in ("sft-1", "rm-2", ".building-rm-3"):
        (tmp_path / "outputs" / "cache" / stage).mkdir(parents=True)
    for stage in ("sft-1", "rm-2"):
        (tmp_path / "outputs" / "cache" / stage / "stage.json").touch()
    assert info(None) == 0
    said = lines(capsys.readouterr().out)
    assert ["cached", "stages", "rm-2,", "sft-1"] in said
    assert ["algo=", *", ".join(group_choices("algo")).split()] in said
    assert [line[0] for line in said][:3] == ["python", "rlhf_cli", "torch"]
    assert [line for line in said if line[0] == "devices" and "cpu" in line]
