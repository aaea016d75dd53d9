"""Digests of reward models: each counts what decides it, and nothing that it does not use."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import make_job, run_config, tiny_settings

from rlhf_cli.config.schema import RunConfig
from rlhf_cli.rewards.settings import (
    DistributionalRm,
    EnsembleRm,
    MemberKind,
    MembersRm,
    RmConfig,
    RmInit,
    ScalarRm,
    Selection,
    Standardize,
    WarmRm,
)
from rlhf_cli.runs.job import Artifact
from rlhf_cli.settings import GradeLoss, ReadOut, TrainSettings
from rlhf_cli.stages.keys import StageKey, merged_rm_key, rm_key, rm_member_key, rm_start_key, sft_key
from rlhf_cli.train.seeding import derive_seed

SFT = Artifact("anywhere", "sft digest")
START = Artifact("anywhere", "start digest")
MEMBERS = [Artifact("anywhere", "one"), Artifact("anywhere", "other")]
SHARED = {
    "model": tiny_settings(),
    "train": TrainSettings(steps=2, batch_size=4, lr=1e-3),
    "standardize_samples": 8,
}

# key, value, whether a scalar one changes, whether one over grades does
SINGLE: list[tuple[str, Any, bool, bool]] = [
    ("label_swap_rate", 0.25, True, True),
    ("label_swap_seed", 1, False, False),  # nothing is swapped
    ("probe_steps", 3, True, True),
    ("probe_lr", 0.5, False, False),  # nothing is probed
    ("dropout", 0.0, True, True),
    ("calibrate", False, True, True),
    ("use_margin", True, True, False),
    ("loss", GradeLoss.strict, False, True),
    ("num_grades", 7, False, True),
    ("entropy_bonus", 0.5, False, True),
    ("read_out", ReadOut.mean_std, False, True),
    ("std_weight", 2.0, False, False),  # the mean is read out
    ("cvar_alpha", 0.5, False, False),
    ("noise", 1.0, False, False),  # of a policy's rewards, not of the model
    ("path", "/elsewhere", False, False),
]

# in a setting that makes them count
WHERE_USED: list[tuple[dict[str, Any], str, Any]] = [
    ({"label_swap_rate": 0.25}, "label_swap_seed", 1),
    ({"label_swap_rate": 0.25}, "label_swap_rate", 0.5),
    ({"probe_steps": 3}, "probe_lr", 0.5),
    ({"dropout": 0.1}, "dropout", 0.2),
    ({"read_out": ReadOut.mean_std}, "std_weight", 2.0),
    ({"read_out": ReadOut.cvar}, "cvar_alpha", 0.5),
]
WHERE_NOT: list[tuple[dict[str, Any], str, Any]] = [
    ({"read_out": ReadOut.cvar}, "std_weight", 2.0),
    ({"read_out": ReadOut.mean_std}, "cvar_alpha", 0.5),
    ({"read_out": ReadOut.win_rate}, "cvar_alpha", 0.5),
]


def with_rm(folder: Path, rm: RmConfig) -> RunConfig:
    config = run_config(folder)
    config.rm = rm
    return config


def single(folder: Path, kind: type[RmConfig], **changes: Any) -> str:
    """Digest of one reward model."""
    rm = kind(**SHARED, **changes)
    rm.check()
    return rm_key(make_job(with_rm(folder, rm)), SFT).digest


class TestSingle:
    @pytest.mark.parametrize(("key", "value", "scalar", "graded"), SINGLE, ids=[row[0] for row in SINGLE])
    def test_what_each_kind_counts(self, key: str, value: Any, scalar: bool, graded: bool, tmp_path: Path) -> None:
        for kind, expected in ((ScalarRm, scalar), (DistributionalRm, graded)):
            if key not in {field.name for field in fields(kind)}:
                assert not expected
                continue
            assert getattr(kind(**SHARED), key) != value, "it has this value already"
            changed = single(tmp_path, kind, **{key: value}) != single(tmp_path, kind)
            assert changed == expected, kind.__name__

    @pytest.mark.parametrize(("given", "key", "value"), WHERE_USED)
    def test_what_counts_where_it_is_used(
        self, given: dict[str, Any], key: str, value: Any, tmp_path: Path
    ) -> None:
        before = single(tmp_path, DistributionalRm, **given)
        assert single(tmp_path, DistributionalRm, **{**given, key: value}) != before

    @pytest.mark.parametrize(("given", "key", "value"), WHERE_NOT)
    def test_what_another_read_out_uses(self, given: dict[str, Any], key: str, value: Any, tmp_path: Path) -> None:
        before = single(tmp_path, DistributionalRm, **given)
        assert single(tmp_path, DistributionalRm, **{**given, key: value}) == before

    def test_every_setting_is_in_the_tables(self) -> None:
        elsewhere = {  # in test_stage_digests.py
            "name",
            "seed",
            "init",
            "append_eos",
            "standardize",
            "standardize_samples",
            "model",
            "peft",
            "train",
        }
        known = {row[0] for row in SINGLE} | elsewhere
        for kind in (ScalarRm, DistributionalRm):
            assert {field.name for field in fields(kind)} <= known

    def test_the_kinds_are_apart(self, tmp_path: Path) -> None:
        assert single(tmp_path, ScalarRm) != single(tmp_path, DistributionalRm)


def keys(folder: Path, rm: MembersRm, number: int = 0) -> tuple[str, str, str]:
    """Digests of the start, of a member, and of the whole."""
    job = make_job(with_rm(folder, rm))
    member = rm.of_member(number, derive_seed(rm.seed, "member", number))
    merged = merged_rm_key(job, SFT, MEMBERS)
    return rm_start_key(job, SFT).digest, rm_member_key(job, member, START, None, None).digest, merged.digest


def graded(kind: type[MembersRm], **changes: Any) -> MembersRm:
    return kind(**SHARED, kind=MemberKind.distributional, **changes)


# key, value, (the start changes, a member does, the whole does; its members' digests are held fixed here)
OF_MEMBERS: list[tuple[str, Any, tuple[bool, bool, bool]]] = [
    ("members", 9, (False, False, False)),
    ("member", 1, (False, False, False)),
    ("selection", Selection.greedy, (False, False, True)),
    ("disagreement_penalty", 0.5, (False, False, True)),
    ("calibrate", False, (False, False, True)),
    ("standardize", Standardize.none, (False, False, True)),
    ("standardize_samples", 7, (False, False, True)),
    ("read_out", ReadOut.cvar, (False, False, True)),
    ("cvar_alpha", 0.5, (False, False, False)),
    ("noise", 1.0, (False, False, False)),
    ("lr_factors", [0.5], (False, True, False)),
    ("dropouts", [0.5], (False, True, False)),
    ("dropout", 0.5, (False, True, False)),
    ("train", TrainSettings(steps=3, batch_size=4, lr=1e-3), (False, True, False)),
    ("label_swap_rate", 0.25, (False, True, False)),
    ("entropy_bonus", 0.5, (False, True, True)),
    ("loss", GradeLoss.strict, (False, True, True)),
    ("num_grades", 7, (True, True, True)),
    ("probe_steps", 3, (True, False, False)),
    ("probe_lr", 0.5, (False, False, False)),
    ("seed", 1, (True, True, True)),
    ("init", RmInit.backbone, (True, False, False)),
    ("append_eos", False, (True, True, False)),
]


class TestMembers:
    @pytest.mark.parametrize(("key", "value", "changes"), OF_MEMBERS, ids=[row[0] for row in OF_MEMBERS])
    def test_what_decides_start_member_and_whole(
        self, key: str, value: Any, changes: tuple[bool, bool, bool], tmp_path: Path
    ) -> None:
        before, after = graded(EnsembleRm), graded(EnsembleRm)
        assert getattr(after, key) != value, "it has this value already"
        setattr(after, key, value)
        after.check()
        found = zip(keys(tmp_path, before), keys(tmp_path, after), strict=True)
        assert tuple(one != other for one, other in found) == changes

    @pytest.mark.parametrize(
        ("key", "value", "start"),
        [
            ("probe_lr", 0.5, True),
            ("label_swap_rate", 0.25, True),
            ("loss", GradeLoss.strict, True),
            ("entropy_bonus", 0.5, True),
            ("train", TrainSettings(steps=2, batch_size=3, lr=1e-3), True),
            ("train", TrainSettings(steps=3, batch_size=4, lr=1e-2), False),
            ("dropouts", [0.5], False),
            ("selection", Selection.greedy, False),
        ],
    )
    def test_a_probed_start_counts_what_it_learnt_from(
        self, key: str, value: Any, start: bool, tmp_path: Path
    ) -> None:
        before, after = graded(WarmRm, probe_steps=3), graded(WarmRm, probe_steps=3)
        setattr(after, key, value)
        assert (keys(tmp_path, before)[0] != keys(tmp_path, after)[0]) == start

    def test_weights_and_predictions_are_made_of_the_same_members(self, tmp_path: Path) -> None:
        warm, ensemble = keys(tmp_path, graded(WarmRm)), keys(tmp_path, graded(EnsembleRm))
        assert warm[:2] == ensemble[:2] and warm[2] != ensemble[2]

    def test_members_are_apart_by_their_number(self, tmp_path: Path) -> None:
        assert len({keys(tmp_path, graded(WarmRm), number)[1] for number in range(4)}) == 4

    def test_scalar_members_know_nothing_of_grades(self, tmp_path: Path) -> None:
        before = keys(tmp_path, WarmRm(**SHARED))
        assert before != keys(tmp_path, graded(WarmRm))
        for key, value in (("num_grades", 7), ("loss", GradeLoss.strict), ("read_out", ReadOut.cvar)):
            assert keys(tmp_path, replace(WarmRm(**SHARED), **{key: value})) == before
        assert keys(tmp_path, WarmRm(**SHARED, use_margin=True))[1] != before[1]

    def test_the_whole_is_known_by_its_members_in_their_order(self, tmp_path: Path) -> None:
        job = make_job(with_rm(tmp_path, WarmRm(**SHARED)))
        found = {
            merged_rm_key(job, SFT, members).digest
            for members in (MEMBERS, MEMBERS[:1], MEMBERS[::-1], [*MEMBERS, START])
        }
        assert len(found) == 4

    def test_what_lies_upstream(self, tmp_path: Path) -> None:
        rm = graded(WarmRm)
        job = make_job(with_rm(tmp_path, rm))
        other = Artifact("anywhere", "another digest")
        member = rm.of_member(0, 1)
        assert rm_start_key(job, SFT).digest != rm_start_key(job, other).digest
        of_start = {rm_member_key(job, member, start, None, None).digest for start in (START, other)}
        of_snapshot = {rm_member_key(job, member, START, snapshot, None).digest for snapshot in (None, SFT, other)}
        assert len(of_start) == 2 and len(of_snapshot) == 3
        assert merged_rm_key(job, SFT, MEMBERS).digest != merged_rm_key(job, other, MEMBERS).digest
        unscaled = make_job(with_rm(tmp_path, graded(WarmRm, standardize=Standardize.none)))
        assert merged_rm_key(unscaled, SFT, MEMBERS).digest == merged_rm_key(unscaled, other, MEMBERS).digest

    def test_the_stages_have_names_of_their_own(self, tmp_path: Path) -> None:
        rm = WarmRm(**SHARED)
        job = make_job(with_rm(tmp_path, rm))
        found: list[StageKey] = [
            rm_start_key(job, SFT),
            rm_member_key(job, rm.of_member(0, 1), START, None, None),
            merged_rm_key(job, SFT, MEMBERS),
        ]
        assert [key.stage for key in found] == ["rm-start", "rm-member", "rm"]


def test_snapshots_of_the_sft_run_count_only_where_there_are_any(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    none = sft_key(make_job(config))
    assert config.sft.snapshots == 0 and "sft.snapshots" not in none.parts
    found = {none.digest}
    for number in (1, 2):
        config.sft.snapshots = number
        found.add(sft_key(make_job(config)).digest)
    assert len(found) == 3
