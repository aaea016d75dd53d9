"""Several reward models as stages: what is trained, from what, and what is found in the cache again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import make_job, run_config, tiny_settings

from rlhf_cli.errors import RequestError
from rlhf_cli.rewards.settings import EnsembleRm, MembersRm, RmInit, Selection, WarmRm
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.sft import SNAPSHOTS
from rlhf_cli.settings import TrainSettings
from rlhf_cli.stages import resolve as stages
from rlhf_cli.stages.resolve import resolve_members, resolve_rm
from rlhf_cli.train.seeding import derive_seed

SHARED = {
    "model": tiny_settings(),
    "train": TrainSettings(steps=2, batch_size=4, lr=1e-3),
    "standardize_samples": 8,
}


class Watcher:
    """Stands in for training."""

    def __init__(self, folder: Path) -> None:
        self.config = run_config(folder)
        self.cache = folder / "cache"
        self.folder = folder
        self.sft = Artifact(str(folder / "sft" / "model"), "sft digest")
        self.starts: list[int] = []
        self.members: list[tuple[int, float, str | None]] = []  # seed, learning rate, name of the snapshot
        self.merged: list[list[str]] = []

    def start(self, job: Job, seed: int, sft: Artifact) -> None:
        assert job.resume and not job.tracked and sft == self.sft
        self.starts.append(seed)
        self.write(job)

    def member(self, job: Job, seed: int, start: Artifact, snapshot: Artifact | None, base: str | None) -> None:
        assert base in (None, start.path)
        assert job.resume and not job.tracked and Path(start.path).is_dir()
        assert job.config.rm.name == "scalar", "its own settings"
        name = None if snapshot is None else Path(snapshot.path).name
        self.members.append((seed, job.config.rm.train.lr, name))
        self.write(job)

    def merge(self, job: Job, seed: int, sft: Artifact, members: list[Artifact]) -> None:
        assert job.resume and not job.tracked
        self.merged.append([member.digest for member in members])
        self.write(job)

    def write(self, job: Job) -> None:
        (job.folder / "model").mkdir(parents=True)
        (job.folder / "summary.json").write_text(json.dumps({"time_s": 1.0}))

    def keep_snapshots(self) -> None:
        for step in (2, 4):
            folder = self.folder / "sft" / SNAPSHOTS / f"step-{step:08d}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(str(step))

    def resolve(self, rm: MembersRm) -> list[Artifact]:
        self.config.rm = rm
        return resolve_members(make_job(self.config), self.sft, lambda _: None)


@pytest.fixture
def watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watcher]:
    result = Watcher(tmp_path)
    monkeypatch.setattr(stages, "train_start", result.start)
    monkeypatch.setattr(stages, "train_member", result.member)
    monkeypatch.setattr(stages, "merge_members", result.merge)
    yield result
    assert not list(tmp_path.glob("cache/.building-*"))


def rm(kind: type[MembersRm] = WarmRm, **changes: Any) -> MembersRm:
    return kind(**{**SHARED, **changes})


def seeds(*numbers: int) -> list[int]:
    return [derive_seed(0, "member", number) for number in numbers]


def test_one_start_and_each_member_by_its_own_seed(watcher: Watcher) -> None:
    found = watcher.resolve(rm(members=3, lr_factors=[1.0, 2.0]))
    assert watcher.starts == [0]
    assert watcher.members == [
        (seed, rate, None) for seed, rate in zip(seeds(0, 1, 2), (1e-3, 2e-3, 1e-3), strict=True)
    ]
    assert len({one.digest for one in found}) == 3
    assert [Path(one.path).parent.name for one in found] == [f"rm-member-{one.digest[:12]}" for one in found]


def test_more_members_train_only_the_new_ones(watcher: Watcher) -> None:
    first = watcher.resolve(rm(members=2))
    more = watcher.resolve(rm(members=4))
    assert more[:2] == first
    assert [seed for seed, _, _ in watcher.members] == seeds(0, 1, 2, 3) and watcher.starts == [0]


def test_a_member_that_is_asked_for_alone_is_found_by_all(watcher: Watcher) -> None:
    alone = watcher.resolve(rm(members=3, member=1))
    assert [seed for seed, _, _ in watcher.members] == seeds(1)
    everyone = watcher.resolve(rm(members=3))
    assert everyone[1:2] == alone
    assert [seed for seed, _, _ in watcher.members] == seeds(1, 0, 2) and watcher.starts == [0]


def test_weights_and_predictions_share_their_members(watcher: Watcher) -> None:
    assert watcher.resolve(rm(WarmRm, members=2)) == watcher.resolve(
        rm(EnsembleRm, members=2, disagreement_penalty=1.0, selection=Selection.greedy)
    )
    assert len(watcher.members) == 2


def test_members_begin_from_the_sft_runs_snapshots_in_turn(watcher: Watcher) -> None:
    watcher.keep_snapshots()
    watcher.config.sft.snapshots = 2
    found = watcher.resolve(rm(members=4))
    latest, earlier = "step-00000004", "step-00000002"
    assert [name for _, _, name in watcher.members] == [None, latest, earlier, None]
    assert len({one.digest for one in found}) == 4


def test_snapshots_that_no_member_can_start_from_are_refused(watcher: Watcher) -> None:
    watcher.config.sft.snapshots = 2
    with pytest.raises(RequestError, match=r"^sft\.snapshots=2: .* has no snapshots/ beside it"):
        watcher.resolve(rm(members=2))
    watcher.keep_snapshots()
    with pytest.raises(
        RequestError, match=r"^sft\.snapshots=2: expected 0, because no member starts from the SFT"
    ):
        watcher.resolve(rm(members=2, init=RmInit.backbone))
    assert not watcher.members


def test_snapshots_that_were_not_asked_for_are_left_alone(watcher: Watcher) -> None:
    watcher.keep_snapshots()
    watcher.config.sft.snapshots = 0
    watcher.resolve(rm(members=2))
    assert [name for _, _, name in watcher.members] == [None, None]


def test_the_whole_is_made_once_of_its_members(watcher: Watcher) -> None:
    digests = []
    for selection in (Selection.all, Selection.greedy, Selection.all):
        watcher.config.rm = rm(members=2, selection=selection)
        whole = resolve_rm(make_job(watcher.config), lambda: watcher.sft, lambda _: None)
        digests.append(whole.digest)
        assert Path(whole.path).parent.name == f"rm-{whole.digest[:12]}"
    assert digests[0] == digests[2] != digests[1]
    assert len(watcher.members) == 2 and len(watcher.merged) == 2
    assert watcher.merged[0] == [one.digest for one in watcher.resolve(rm(members=2))]
