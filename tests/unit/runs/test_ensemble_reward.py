"""An ensemble stands wherever a reward model does: `rm.path` names its run, and a policy learns from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_models import byte_tokenizer, make_job, reward_model, run_config, tiny_lm
from fixtures_rewards import ensemble_of, save_all

from rlhf_cli.commands.context import Context
from rlhf_cli.commands.eval import run_eval
from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.ensemble import EnsembleRewardModel, save_ensemble
from rlhf_cli.runs.job import Artifact
from rlhf_cli.runs.policy import train_policy
from rlhf_cli.stages.keys import file_digest
from rlhf_cli.stages.resolve import resolve_rm

CAPS = {"max_prompt_tokens": 24, "max_completion_tokens": 16}  # those of the data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EnsembleRewardModel]:
    """The run folder of an ensemble of two."""
    folder = tmp_path_factory.mktemp("ensemble")
    members = [reward_model(seed=seed, **CAPS) for seed in range(2)]
    whole = replace(ensemble_of(members, 0.5, mean=0.25, std=0.5, temperature=2.0), centres=[0.1, -0.1])
    save_ensemble(folder / "run" / "model", save_all(members, folder), whole)
    save_model(tiny_lm(), byte_tokenizer(), folder / "sft")
    return folder, whole


def test_eval_measures_it(run: tuple[Path, EnsembleRewardModel], tmp_path: Path) -> None:
    folder, whole = run
    config = run_config(tmp_path, "eval")
    config.rm.path, config.sft.path = str(folder / "run"), str(folder / "sft")
    config.policies = []
    run_eval(config, Context(tmp_path / "run", ("rlhf", "eval"), None, {}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    job = make_job(config)
    expected = score_pairs(whole, job.data.pairs_test["test"], job.precision).accuracy
    found = summary["rm/accuracy"]
    assert (found["mean"] if isinstance(found, dict) else found) == pytest.approx(expected)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    model = str(folder / "run" / "model")
    assert record["upstream"]["rm"] == {"path": model, "digest": file_digest(model)}


def test_a_policy_learns_from_it(run: tuple[Path, EnsembleRewardModel], tmp_path: Path) -> None:
    folder, _ = run
    rewards = []
    for penalty in (0.0, 50.0):
        place = tmp_path / str(penalty)
        config = run_config(place)
        config.algo = replace(config.algo, eval_prompts=4)
        config.rm.path = str(folder / "run")
        index = folder / "run" / "model" / "ensemble.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "disagreement_penalty": penalty}))
        job = make_job(config)
        said: list[str] = []
        rm = resolve_rm(job, lambda: pytest.fail("the SFT model is not asked for"), said.append)
        assert said == [f"rm: using {folder / 'run' / 'model'} (rm.path is set; read out as stored with it)"]
        train_policy(job, 0, Artifact(str(folder / "sft"), "x"), rm)
        rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        rewards.append(rows[0]["reward/mean"])
    assert rewards[1] < rewards[0] - 1.0, "the same samples, and their disagreement taken off"
