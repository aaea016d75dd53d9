"""What is wrong with a reward model's settings is found before anything is written, and said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_config import Ask, contents

from rlhf_cli.commands import job
from rlhf_cli.commands.launch import OK, WRONG_REQUEST
from rlhf_cli.config.schema import RunConfig

# arguments of train-rm, the line
WRONG: dict[str, tuple[list[str], str]] = {
    # of every one
    "negative seed": (["rm.seed=-1"], "rm.seed=-1: expected a whole number >= 0, below 2^63"),
    "negative seed of the swaps": (
        ["rm.label_swap_seed=-1"],
        "rm.label_swap_seed=-1: expected a whole number >= 0, below 2^63",
    ),
    "seed of the swaps of more than 63 bits": (
        ["rm.label_swap_seed=9223372036854775808"],
        "rm.label_swap_seed=9223372036854775808: expected a whole number >= 0, below 2^63",
    ),
    "all labels swapped": (
        ["rm.label_swap_rate=1"],
        "rm.label_swap_rate=1.0: expected a number from 0 to below 1",
    ),
    "fewer labels swapped than none": (
        ["rm.label_swap_rate=-0.1"],
        "rm.label_swap_rate=-0.1: expected a number from 0 to below 1",
    ),
    "a rate of swaps that is no number": (
        ["rm.label_swap_rate=nan"],
        "rm.label_swap_rate=nan: expected a number from 0 to below 1",
    ),
    "negative probing": (["rm.probe_steps=-1"], "rm.probe_steps=-1: expected a whole number >= 0"),
    "probing that stands still": (["rm.probe_lr=0"], "rm.probe_lr=0.0: expected a number > 0"),
    "endless steps of probing": (["rm.probe_lr=inf"], "rm.probe_lr=inf: expected a number > 0"),
    "everything dropped": (["rm.dropout=1"], "rm.dropout=1.0: expected a number from 0 to below 1, or null"),
    "negative dropout": (["rm.dropout=-0.1"], "rm.dropout=-0.1: expected a number from 0 to below 1, or null"),
    "a scale from one sample": (
        ["rm.standardize_samples=1"],
        "rm.standardize_samples=1: expected a whole number >= 2",
    ),
    "negative noise": (["rm.noise=-0.5"], "rm.noise=-0.5: expected a number >= 0"),
    "noise that is no number": (["rm.noise=nan"], "rm.noise=nan: expected a number >= 0"),
    "an adapter without rank": (["rm.peft.name=lora", "rm.peft.r=0"], "rm.peft.r=0: expected a whole number >= 1"),
    "training without a learning rate": (["rm.train.lr=0"], "rm.train.lr=0.0: expected a number > 0"),
    "a model without width": (["rm.model.hidden_size=0"], "rm.model.hidden_size=0: expected a whole number >= 1"),
    # over grades
    "one grade": (
        ["rm=distributional", "rm.num_grades=1"],
        "rm.num_grades=1: expected a whole number from 2 to 1000",
    ),
    "too many grades": (
        ["rm=distributional", "rm.num_grades=1001"],
        "rm.num_grades=1001: expected a whole number from 2 to 1000",
    ),
    "a malus for entropy": (
        ["rm=distributional", "rm.entropy_bonus=-1"],
        "rm.entropy_bonus=-1.0: expected a number >= 0",
    ),
    "a weight of the deviation that is no number": (
        ["rm=distributional", "rm.std_weight=nan"],
        "rm.std_weight=nan: expected a number",
    ),
    "the worst part of nothing": (
        ["rm=distributional", "rm.cvar_alpha=0"],
        "rm.cvar_alpha=0.0: expected a number above 0, at most 1",
    ),
    "the worst part of more than all": (
        ["rm=distributional", "rm.cvar_alpha=1.1"],
        "rm.cvar_alpha=1.1: expected a number above 0, at most 1",
    ),
    "a win rate against nobody": (
        ["rm=distributional", "rm.read_out=win_rate", "rm.standardize=none"],
        "rm.read_out=win_rate: expected another read-out where rm.standardize=none: "
        "it needs SFT samples to win against",
    ),
    "a loss that is none": (
        ["rm=distributional", "rm.loss=tie"],
        "rm.loss=tie: not one of half_tie, renorm, strict",
    ),
    # members
    "no members": (["rm=warm", "rm.members=0"], "rm.members=0: expected a whole number >= 1"),
    "a member beyond the last": (
        ["rm=warm", "rm.members=3", "rm.member=3"],
        "rm.member=3: expected a whole number from 0 to below rm.members=3, or null",
    ),
    "a member before the first": (
        ["rm=ensemble", "rm.member=-1"],
        "rm.member=-1: expected a whole number from 0 to below rm.members=6, or null",
    ),
    "no learning rate for members": (
        ["rm=warm", "rm.lr_factors=[]"],
        "rm.lr_factors=[]: expected numbers > 0, e.g. [0.25,1,2.5]",
    ),
    "a member that does not learn": (
        ["rm=warm", "rm.lr_factors=[1,0]"],
        "rm.lr_factors=[1.0, 0.0]: expected numbers > 0, e.g. [0.25,1,2.5]",
    ),
    "a member that learns without end": (
        ["rm=warm", "rm.lr_factors=[inf]"],
        "rm.lr_factors=[inf]: expected numbers > 0, e.g. [0.25,1,2.5]",
    ),
    "a member that drops everything": (
        ["rm=ensemble", "rm.dropouts=[0.1,1]"],
        "rm.dropouts=[0.1, 1.0]: expected numbers from 0 to below 1, e.g. [0.05,0.1], or []",
    ),
    "a bonus for disagreement": (
        ["rm=ensemble", "rm.disagreement_penalty=-1"],
        "rm.disagreement_penalty=-1.0: expected a number >= 0",
    ),
    "an endless penalty": (
        ["rm=ensemble", "rm.disagreement_penalty=inf"],
        "rm.disagreement_penalty=inf: expected a number >= 0",
    ),
    "impossible grades of members": (
        ["rm=warm", "rm.kind=distributional", "rm.num_grades=1"],
        "rm.num_grades=1: expected a whole number from 2 to 1000",
    ),
    "an impossible dropout of all members": (
        ["rm=warm", "rm.dropout=2"],
        "rm.dropout=2.0: expected a number from 0 to below 1, or null",
    ),
    "grades of scalar members": (
        ["rm=warm", "rm.read_out=cvar"],
        "rm.read_out=cvar: expected mean, because rm.kind=scalar does not read it",
    ),
    "margins of distributional members": (
        ["rm=ensemble", "rm.kind=distributional", "rm.use_margin=true"],
        "rm.use_margin=True: expected False, because rm.kind=distributional does not read it",
    ),
    "a dropout beside those of the members": (
        ["rm=warm", "rm.dropout=0.3"],
        "rm.dropout=0.3: expected null, or rm.dropouts=[] so that it is read",
    ),
    "a penalty without a scale": (
        ["rm=ensemble", "rm.disagreement_penalty=1", "rm.standardize=none"],
        "rm.disagreement_penalty=1.0: expected 0 where rm.standardize=none: members are compared on SFT samples",
    ),
    # SFT models that members may start from
    "fewer snapshots than none": (["sft.snapshots=-1"], "sft.snapshots=-1: expected a whole number >= 0"),
}

# What only one kind has.
ELSEWHERE = [
    ("scalar", "num_grades=5"),
    ("scalar", "read_out=mean"),
    ("scalar", "members=2"),
    ("distributional", "use_margin=true"),
    ("distributional", "lr_factors=[1]"),
    ("warm", "disagreement_penalty=1"),
]

POSSIBLE = {
    "every bound": [
        "rm=ensemble",
        "rm.label_swap_rate=0.999",
        "rm.probe_steps=0",
        "rm.dropout=0",
        "rm.standardize_samples=2",
        "rm.kind=distributional",
        "rm.num_grades=1000",
        "rm.cvar_alpha=1",
        "rm.std_weight=-1",
        "rm.members=1",
        "rm.member=0",
        "rm.dropouts=[]",
        "rm.disagreement_penalty=0",
    ],
    "two grades": ["rm=distributional", "rm.num_grades=2", "rm.entropy_bonus=0", "rm.read_out=win_rate"],
}


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The requests that got as far as their job."""
    found: list[RunConfig] = []
    monkeypatch.setattr(job, "run", found.append)
    return found


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_one_line_and_leaves_nothing(
    case: str, ask: Ask, workplace: Path, begun: list[RunConfig]
):
    arguments, line = WRONG[case]
    answer = ask("train-rm", *arguments)
    assert (answer.status, answer.line, answer.out) == (WRONG_REQUEST, line, "")
    assert contents(workplace) == {} and begun == []


@pytest.mark.parametrize(("kind", "argument"), ELSEWHERE)
def test_a_setting_of_another_kind_is_unknown(kind: str, argument: str, ask: Ask, begun: list[RunConfig]):
    answer = ask("train-rm", f"rm={kind}", f"rm.{argument}")
    assert answer.status == WRONG_REQUEST and begun == []
    assert answer.line.startswith(f"rm.{argument.partition('=')[0]}=") and "unknown key" in answer.line


@pytest.mark.parametrize("command", ["train-policy", "eval"])
@pytest.mark.parametrize("kind", ["warm", "ensemble"])
def test_one_member_alone_is_trained_and_not_used(
    command: str, kind: str, ask: Ask, workplace: Path, begun: list[RunConfig]
):
    answer = ask(command, f"rm={kind}", "rm.member=1")
    assert answer.status == WRONG_REQUEST and begun == []
    assert answer.line == f"rm.member=1: expected null, because {command} needs all members"
    assert contents(workplace) == {}


@pytest.mark.parametrize("case", POSSIBLE)
def test_the_bounds_themselves_are_allowed(case: str, ask: Ask, begun: list[RunConfig]):
    answer = ask("train-rm", *POSSIBLE[case])
    assert answer.status == OK, answer.err
    assert len(begun) == 1
