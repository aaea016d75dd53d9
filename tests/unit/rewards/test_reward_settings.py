"""What a member of several reward models is trained with; what is refused is in tests/config."""

from __future__ import annotations

from dataclasses import asdict, fields

import pytest

from rlhf_cli.rewards.settings import (
    DistributionalRm,
    EnsembleRm,
    MemberKind,
    RmInit,
    ScalarRm,
    Standardize,
    WarmRm,
)
from rlhf_cli.settings import GradeLoss, ReadOut, TrainSettings


def test_outputs_of_each_kind() -> None:
    assert ScalarRm().num_labels == 1
    assert DistributionalRm(num_grades=7).num_labels == 7
    assert WarmRm(num_grades=7).num_labels == 1
    assert EnsembleRm(kind=MemberKind.distributional, num_grades=7).num_labels == 7


def test_what_has_members() -> None:
    assert [kind.has_members for kind in (ScalarRm, DistributionalRm, WarmRm, EnsembleRm)] == [
        False,
        False,
        True,
        True,
    ]


def test_learning_rates_and_dropouts_go_round() -> None:
    rm = WarmRm(train=TrainSettings(lr=1e-3), lr_factors=[0.5, 1.0, 3.0], dropouts=[0.1, 0.2])
    members = [rm.of_member(number, seed=number) for number in range(4)]
    assert [one.train.lr for one in members] == [0.5e-3, 1e-3, pytest.approx(3e-3), 0.5e-3]
    assert [one.dropout for one in members] == [0.1, 0.2, 0.1, 0.2]
    assert [one.seed for one in members] == [0, 1, 2, 3]
    assert rm.train.lr == 1e-3, "its own settings stay"


def test_without_dropouts_members_have_that_of_all() -> None:
    assert WarmRm(dropout=0.3).of_member(5, 0).dropout == 0.3
    assert WarmRm().of_member(5, 0).dropout is None


def test_a_member_is_neither_scaled_nor_read_out_nor_noisy() -> None:
    rm = EnsembleRm(
        kind=MemberKind.distributional,
        path="x",
        noise=1.0,
        calibrate=True,
        standardize=Standardize.sft_samples,
        read_out=ReadOut.win_rate,
    )
    member = rm.of_member(0, 1)
    assert isinstance(member, DistributionalRm)
    assert (member.path, member.noise, member.calibrate) == (None, 0.0, False)
    assert (member.standardize, member.read_out) == (Standardize.none, ReadOut.mean)
    member.check()


@pytest.mark.parametrize("kind", list(MemberKind))
def test_everything_else_is_that_of_the_whole(kind: MemberKind) -> None:
    rm = WarmRm(
        kind=kind,
        init=RmInit.backbone,
        append_eos=False,
        label_swap_rate=0.25,
        label_swap_seed=3,
        standardize_samples=9,
        num_grades=4,
        loss=GradeLoss.strict,
        entropy_bonus=0.5,
        use_margin=True,
        train=TrainSettings(steps=3, batch_size=5),
    )
    member = rm.of_member(0, 1)
    assert type(member) is (ScalarRm if kind is MemberKind.scalar else DistributionalRm)
    assert member.name == kind.value
    own = {"name", "path", "seed", "standardize", "read_out", "calibrate", "noise", "dropout"}
    for one in fields(member):
        if one.name not in own:
            assert getattr(member, one.name) == getattr(rm, one.name), one.name


def test_a_member_does_not_know_how_many_there_are() -> None:
    few, many = WarmRm(members=2), WarmRm(members=9, member=1)
    assert asdict(few.of_member(1, 5)) == asdict(many.of_member(1, 5))
    assert asdict(EnsembleRm(disagreement_penalty=1.0).of_member(1, 5)) == asdict(few.of_member(1, 5))
