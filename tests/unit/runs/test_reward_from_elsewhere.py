"""A classifier with one label that this project has not saved stands where a reward model does."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, byte_tokenizer, make_job, reward_model, run_config, tiny_lm

from rlhf_cli import build
from rlhf_cli.commands.context import Context
from rlhf_cli.commands.eval import run_eval
from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rewards.term_settings import Normalize
from rlhf_cli.runs.job import Artifact
from rlhf_cli.runs.policy import train_policy
from rlhf_cli.stages.resolve import resolve_rm

CAPS = {"max_prompt_tokens": 24, "max_completion_tokens": 16}  # those of the data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("elsewhere")
    ours = reward_model(**CAPS)
    save_model(ours.model, ours.tokenizer, place / "rm")
    assert "rlhf_reward" not in json.loads((place / "rm" / "config.json").read_text())
    save_model(tiny_lm(), byte_tokenizer(), place / "sft")
    return place


def test_it_reads_text_as_ours_do_and_says_what_it_is(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_config(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = load_scorer("rm.path", str(folder / "rm"), CPU, build.scalar_format(config))
    assert "from elsewhere (no rlhf_reward in config.json)" in caplog.text
    prompts, completions = ["the film ", "a "], ["was good .", "x"]
    found, ours = loaded.score(prompts, completions), reward_model(**CAPS).score(prompts, completions)
    torch.testing.assert_close(found.raw, ours.raw, atol=1e-5, rtol=0)
    assert torch.equal(found.reward, found.raw), "on its own scale"


def test_one_with_other_outputs_is_refused(folder: Path, tmp_path: Path) -> None:
    several = reward_model(**CAPS)
    several.model.score.weight = torch.nn.Parameter(several.model.score.weight.detach().expand(2, 16).clone())
    several.model.config.num_labels = 2
    save_model(several.model, several.tokenizer, tmp_path / "two")
    with pytest.raises(RequestError, match=r"two: has 2 labels and no rlhf_reward in config\.json$"):
        load_scorer("rm.path", str(tmp_path / "two"), CPU, build.scalar_format(run_config(tmp_path)))


def test_a_damaged_config_is_told_of_by_the_loading(folder: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.rm.path = str(tmp_path / "damaged")
    shutil.copytree(folder / "rm", tmp_path / "damaged")
    (tmp_path / "damaged" / "config.json").write_text("{")
    said: list[str] = []
    rm = resolve_rm(make_job(config), lambda: pytest.fail("the SFT model is not asked for"), said.append)
    assert said == [f"rm: using {config.rm.path} (rm.path is set)"]
    with pytest.raises(RequestError, match=r"^rm\.path="):
        load_scorer("rm.path", rm.path, CPU, build.scalar_format(config))


def test_eval_measures_it_and_a_policy_learns_from_it(folder: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "eval", "eval")
    config.rm.path, config.sft.path, config.policies = str(folder / "rm"), str(folder / "sft"), []
    run_eval(config, Context(tmp_path / "eval" / "run", ("rlhf", "eval"), None, {}))
    assert "rm/accuracy" in json.loads((tmp_path / "eval" / "run" / "summary.json").read_text())

    config = run_config(tmp_path / "policy")
    config.algo = replace(config.algo, eval_prompts=4)
    config.reward = replace(config.reward, normalize=Normalize.sft_samples, normalize_samples=8)
    config.rm.path = str(folder / "rm")
    job = make_job(config)
    said: list[str] = []
    rm = resolve_rm(job, lambda: pytest.fail("the SFT model is not asked for"), said.append)
    assert said == [f"rm: using {folder / 'rm'} (rm.path is set)"]
    train_policy(job, 0, Artifact(str(folder / "sft"), "x"), rm)
    rows = [json.loads(line) for line in (tmp_path / "policy" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["reward/norm_std"] > 0
