"""Rewards that cannot be are refused before anything has been done, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_config import Ask, contents

from rlhf_cli.commands import job
from rlhf_cli.commands.launch import WRONG_REQUEST

P = "train-policy"

# (command, arguments, what the line has to say)
WRONG: dict[str, tuple[str, list[str], list[str]]] = {
    "noise on a reward model without weight": (
        P,
        ["reward.rm=0", "reward.gold=1", "rm.noise=1"],
        ["rm.noise=1", "0", "reward.rm=0"],
    ),
    "a reward of nothing": (P, ["reward.rm=0"], ["reward.rm=0", "not 0"]),
    "a gold reward that the data lacks": (
        P,
        ["data=imdb", "reward.gold=1"],
        ["reward.gold=1", "expected 0", "data=imdb"],
    ),
    "a term that there is not": (P, ["reward.lenght=1"], ["reward.lenght=1", "mean reward.length?"]),
    "an endless weight": (P, ["reward.coherence.weight=inf"], ["reward.coherence.weight=inf", "finite"]),
    "a judge that is not there": (
        P,
        ["reward.coherence.path=./nope"],
        ["reward.coherence.path=./nope", "no such"],
    ),
    "a rule with a key it does not have": (
        P,
        ["reward.rules=[{name: a, wieght: 1}]"],
        ["reward.rules[].wieght", "mean reward.rules[].weight?"],
    ),
    "a rule whose weight is a word": (
        P,
        ["reward.rules=[{name: a, weight: much}]"],
        ["reward.rules[].weight=much", "a number"],
    ),
    "a rule with a count that is none": (
        P,
        ["reward.rules=[{name: a, count: all}]"],
        ["reward.rules[].count=all", "any, each"],
    ),
    "a rule that is no regular expression": (
        P,
        ["reward.rules=[{name: a, weight: 1, pattern: '[a'}]"],
        ["reward.rules[0].pattern=[a", "unterminated character set at position 0"],
    ),
    "a rule of a word": (P, ["reward.rules=[good]"], ["reward.rules"]),
    "a normalisation that is none": (P, ["reward.normalize=batch"], ["reward.normalize=batch", "running"]),
    "a clip of rewards to nothing": (P, ["reward.clip=0"], ["reward.clip=0", "> 0, or null"]),
    "a running scale and the best of several evaluations": (
        P,
        ["reward.normalize=running", "algo.train.select=best"],
        ["reward.normalize=running", "sft_samples", "select=best"],
    ),
    "a running scale and patience": (
        P,
        ["reward.normalize=running", "algo.train.eval_every=5", "algo.train.patience=2"],
        ["reward.normalize=running", "patience"],
    ),
    "a running scale and the best of WARP's members": (
        P,
        ["algo=warp", "algo.merge=none", "reward.normalize=running"],
        ["reward.normalize=running", "algo.merge=none"],
    ),
    "a running scale of pairs": (
        P,
        ["algo=dpo", "algo.pairs=on_policy", "reward.normalize=running"],
        ["reward.normalize=running", "algo=dpo"],
    ),
    "a reward that nothing reads": (
        P,
        ["algo=dpo", "reward.length=1"],
        ["reward.length=1", "expected 0.0", "algo=dpo asks no reward"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_reward_is_one_line_and_leaves_nothing(
    case: str, ask: Ask, workplace: Path, monkeypatch: pytest.MonkeyPatch
):
    def begin(cfg: object) -> None:
        raise AssertionError("the job began")

    monkeypatch.setattr(job, "run", begin)
    command, arguments, words = WRONG[case]
    answer = ask(command, *arguments)
    assert answer.status == WRONG_REQUEST
    assert [word for word in words if word not in answer.line] == [], answer.line
    assert "Traceback" not in answer.err and answer.out == ""
    assert contents(workplace) == {}
