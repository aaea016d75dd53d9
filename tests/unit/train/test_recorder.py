"""A run is closed with the status it earned, and what goes wrong while it is closed hides nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rlhf_cli.settings import CheckpointSettings
from rlhf_cli.train import run_folder
from rlhf_cli.train.recorder import RunRequest, recorded_run
from rlhf_cli.train.run_folder import RunFolder


class Broken:
    """A tracker that cannot be closed."""

    def __init__(self) -> None:
        self.closed: list[str] = []

    def finish(self, status: str) -> None:
        self.closed.append(status)
        raise OSError(errno.ENOSPC, "No space left on device", "the tracker's file")


@pytest.fixture
def tracker() -> Broken:
    return Broken()


@pytest.fixture
def request_of_run(tmp_path: Path, tracker: Broken) -> RunRequest:
    return RunRequest(
        folder=tmp_path / "run",
        command="train-sft",
        name="sft",
        argv=(),
        seed=0,
        device="cpu",
        threads=1,
        upstream={},
        data="reviews",
        rows_digest=lambda: None,
        title="sft",
        num_steps=1,
        keys=("loss",),
        make_tracker=lambda *_: tracker,  # type: ignore[arg-type, return-value]
        checkpoint=CheckpointSettings(),
    )


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "run.json")


@pytest.mark.parametrize(
    ("failure", "status"), [(ValueError("diverged"), "failed"), (KeyboardInterrupt("SIGINT"), "interrupted")]
)
def test_why_a_run_failed_is_not_hidden_by_a_full_disk(
    request_of_run: RunRequest,
    tracker: Broken,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    status: str,
):
    with pytest.raises(type(failure)) as caught, recorded_run(request_of_run):
        monkeypatch.setattr(run_folder, "write_json_atomic", full)
        raise failure
    assert caught.value is failure
    assert tracker.closed == [status]
    assert RunFolder(request_of_run.folder).record().status == "running"


def test_a_good_run_whose_end_cannot_be_written_has_failed(
    request_of_run: RunRequest, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(OSError, match=r"No space left on device: 'run.json'"), recorded_run(request_of_run):
        monkeypatch.setattr(run_folder, "write_json_atomic", full)
