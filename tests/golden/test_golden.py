"""Golden runs: a few CPU steps of every stage and algorithm give the recorded losses and gradient norms.

A change of these numbers is a change of what is trained. Where it is meant, record them anew:

    RLHF_RECORD_GOLDEN=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path

import pytest

from rlhf_cli.commands.help import group_choices
from rlhf_cli.commands.launch import launch

RECORDS = Path(__file__).parent / "golden.json"
# Other builds of torch sum in another order; a wrong sign or factor is off by far more.
TOLERANCE = 2e-3
STEPS = 4
NUM_ROWS = {"policy-warp": 2 * 2 * 3}
KEYS = (
    "loss",
    "grad_norm",
    "reward/mean",
    "kl/k1",
    "rm/accuracy",
    "rm/margin",
    "value/loss",
    "eval/loss",
    "eval/reward/mean",
)

RUNS = {
    "sft": ("train-sft", []),
    "rm-scalar": ("train-rm", [f"rm.train.steps={STEPS}"]),
    "rm-distributional": ("train-rm", [f"rm.train.steps={STEPS}", "rm=distributional", "rm.entropy_bonus=0.1"]),
    "rm-strict": ("train-rm", [f"rm.train.steps={STEPS}", "rm=distributional", "rm.loss=strict"]),
    **{f"policy-{algo}": ("train-policy", [f"algo={algo}"]) for algo in group_choices("algo")},
    # 2 iterations of 2 members; from the second step of one on its KL is to an anchor that has moved
    "policy-warp": ("train-policy", ["algo=warp", "algo.train.steps=3", "algo.mu=0.3"]),
    "policy-rloo-two-epochs": ("train-policy", ["algo=rloo", "algo.num_epochs=2", "algo.clip=0.2"]),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", RUNS)
def test_a_golden_run_gives_the_recorded_numbers(name: str, cache: Path, tmp_path: Path):
    command, extra = RUNS[name]
    arguments = [
        "experiment=smoke",
        "device=cpu",
        "precision=fp32",
        f"sft.train.steps={STEPS}",
        f"algo.train.steps={STEPS}",
        f"stages.cache_dir={cache}",
        f"run_dir={tmp_path / 'run'}",
        *extra,
    ]
    assert launch(command, arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [{key: row[key] for key in KEYS if key in row} for row in rows]
    assert len(found) == NUM_ROWS.get(name, STEPS)
    if os.environ.get("RLHF_RECORD_GOLDEN") == "1":
        _record(name, found)
    recorded = json.loads(RECORDS.read_text())["runs"][name]
    for step, (now, then) in enumerate(zip(found, recorded, strict=True), start=1):
        assert now == pytest.approx(then, rel=TOLERANCE, abs=TOLERANCE), f"step {step}"


def _record(name: str, rows: list[dict[str, float]]) -> None:
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {"runs": {}}
    records["versions"] = {package: metadata.version(package) for package in ("torch", "transformers", "numpy")}
    records["runs"][name] = rows
    RECORDS.write_text(json.dumps(records, indent=1, sort_keys=True) + "\n")
