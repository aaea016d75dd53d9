"""A command line run in this process, in an empty working folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_config import Answer, Ask

from rlhf_cli.commands.launch import launch
from rlhf_cli.commands.sweep import sweep


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; the errors are shown as to a user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return tmp_path


@pytest.fixture
def ask(workplace: Path, capfd: pytest.CaptureFixture[str]) -> Ask:
    """`ask("train-policy", "algo=rlo")`: `rlhf train-policy algo=rlo`."""

    def run(command: str, *arguments: str) -> Answer:
        capfd.readouterr()
        status = sweep(arguments) if command == "sweep" else launch(command, arguments)
        out, err = capfd.readouterr()
        return Answer(status, out, err)

    return run
