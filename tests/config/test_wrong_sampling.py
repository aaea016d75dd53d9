"""Where fewer tokens may be drawn from, and the one line that refuses it elsewhere, before anything has been done."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_config import Ask, as_object, choices, composed, contents

from rlhf_cli.commands import job
from rlhf_cli.commands.launch import WRONG_REQUEST

P = "train-policy"
PAIRS = ["algo=dpo", "algo.pairs=on_policy"]
FROM_SAMPLES = [name for name in choices("algo") if name != "dpo"]

# (command, arguments, what the line has to say)
WRONG: dict[str, tuple[str, list[str], list[str]]] = {
    "no token": (P, [*PAIRS, "rollout.top_k=0"], ["rollout.top_k=0", "a whole number >= 1, or null"]),
    "a negative number of tokens": (P, [*PAIRS, "rollout.top_k=-1"], ["rollout.top_k=-1", ">= 1"]),
    "a fraction of tokens": (P, [*PAIRS, "rollout.top_k=1.5"], ["rollout.top_k=1.5", "a whole number"]),
    "no probability": (P, [*PAIRS, "rollout.top_p=0"], ["rollout.top_p=0", "above 0 and up to 1, or null"]),
    "too much probability": (P, [*PAIRS, "rollout.top_p=1.1"], ["rollout.top_p=1.1", "up to 1, or null"]),
    "a probability that is none": (P, [*PAIRS, "rollout.top_p=nan"], ["rollout.top_p=nan", "up to 1"]),
    **{
        f"the KL of {name}": (
            P,
            [f"algo={name}", "rollout.top_p=0.9"],
            ["rollout.top_p=0.9: expected null or 1, because", f"algo={name}", "infinite KL", PAIRS[1]],
        )
        for name in FROM_SAMPLES
    },
    "top-k and the KL": (P, ["rollout.top_k=5"], ["rollout.top_k=5: expected null, because algo=rloo"]),
    "samples whose KL has no weight": (
        P,
        ["algo=raft", "algo.beta=0", "rollout.top_k=5"],
        ["rollout.top_k=5", "algo=raft measures the KL"],
    ),
    "pairs of the data": (
        P,
        ["algo=dpo", "rollout.top_k=5"],
        ["rollout.top_k=5", "expected null", "algo=dpo samples nothing here", PAIRS[1]],
    ),
    "a reward model's scale": (
        "train-rm",
        ["rollout.top_p=0.5"],
        ["rollout.top_p=0.5: expected null or 1", "train-rm samples no pairs"],
    ),
    "an evaluation": (
        "eval",
        [*PAIRS, "rollout.top_k=5"],
        ["rollout.top_k=5: expected null", "eval samples no pairs"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_way_of_sampling_is_one_line_and_leaves_nothing(
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


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (P, [*PAIRS, "rollout.top_k=5", "rollout.top_p=0.9"]),
        (P, ["algo=dpo", "data=imdb", "rollout.top_p=0.9"]),  # whose pairs have no prompt in common
        (P, ["rollout.top_p=1"]),  # cuts nothing
        ("eval", ["rollout.top_p=1.0"]),
    ],
)
def test_what_nothing_is_measured_on_can_be_drawn_from_fewer_tokens(command: str, arguments: list[str]):
    as_object(composed(command, [*arguments, "run_dir=x"])).check()
