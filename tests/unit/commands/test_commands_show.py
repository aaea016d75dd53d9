"""What a finished run prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_cli.commands.show import display_path, show_run


def test_figures_and_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "model").mkdir()
    for name in ("b.png", "a.png"):
        (run / "plots" / name).touch()
    summary = {
        "loss": 0.123456,
        "kl/k1": 0.0,
        "gold/mean": None,
        "parameters/total": 5,
        "samples": 9,
        "tokens": 9,
        "step": 12345,
    }
    (run / "summary.json").write_text(json.dumps(summary))
    show_run(run)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    figures = [["loss", "0.1235"], ["kl/k1", "0"], ["gold/mean", "-"], ["step", "12345"]]
    assert lines == [*figures, ["run/model"], ["run/plots/a.png"], ["run/plots/b.png"]]


def test_a_run_without_a_model_names_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "summary.json").write_text('{"loss": 1}')
    show_run(tmp_path)
    assert capsys.readouterr().out.split() == ["loss", "1"]


def test_paths_are_relative_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert display_path(tmp_path / "here" / "run") == Path("run")
    assert display_path(tmp_path / "run") == tmp_path / "run"
    assert display_path(Path("run")) == Path("run")


def test_a_front_is_a_table_in_the_order_of_its_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = {"reward/mean": 2.0, "warp/i1/angle": 80.0, "warp/mu_T": 0.25}
    for eta, reward in (("1", 3.0), ("0", 1.0), ("0.25", 1.5), ("0.5", 2.0)):
        for end, shift in (("", 0.0), ("_lo", -0.5), ("_hi", 0.5)):
            summary |= {f"front/eta-{eta}/{name}{end}": reward + shift for name in ("reward/mean", "kl/full")}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    show_run(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == [
        "reward/mean",
        "warp/mu_T",
        "point",
        "eta-0",
        "eta-0.25",
        "eta-0.5",
        "eta-1",
    ]
    assert lines[2] == ["point", "reward/mean", "kl/full"]
    assert lines[3] == ["eta-0", *["1.00", "[0.50,", "1.50]"] * 2]
