"""A run of train-policy: what it builds from the config, and what it says at its start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures_models import byte_tokenizer, make_job, reward_model, run_config, tiny_lm

from rlhf_cli.algos.base import Algorithm, ValueHead
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.raft import Raft
from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.format import store_format
from rlhf_cli.runs import policy, scoring
from rlhf_cli.runs.job import Artifact
from rlhf_cli.settings import KlEstimator, KlPlacement, KlSettings


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    """An SFT model and a reward model whose raw scores have a standard deviation of 4."""
    folder = tmp_path_factory.mktemp("upstream")
    save_model(tiny_lm(), byte_tokenizer(), folder / "sft")
    reward_model(max_prompt_tokens=24).save(folder / "rm")
    store_format(folder / "rm", mean=1.0, std=4.0)
    return Artifact(str(folder / "sft"), "1"), Artifact(str(folder / "rm"), "2")


def _config(folder: Path, algo: Algorithm, kl: KlSettings | None = None, noise: float = 0.0) -> RunConfig:
    config = run_config(folder)
    config.algo = replace(algo, train=config.algo.train, eval_prompts=4)
    config.kl = kl or KlSettings()
    config.rm.noise = noise
    config.algo.check()
    return config


def _rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_wrong_place_of_the_kl_is_said_once_at_the_start(
    tmp_path: Path, upstream: tuple[Artifact, Artifact], capsys: pytest.CaptureFixture[str]
):
    wrong = KlSettings(KlPlacement.loss, KlEstimator.k3)
    policy.train_policy(make_job(_config(tmp_path, Reinforce(), wrong)), 0, *upstream)
    said = capsys.readouterr().err
    assert said.count("warning: ") == 1
    assert said.count(f"warning: {wrong.problem()}") == 1
    assert said.index("warning: ") < said.index("step 1/2")
    assert _rows(tmp_path)[0]["kl/loss"] == 0.0


def test_a_right_one_is_not_remarked_on(
    tmp_path: Path, upstream: tuple[Artifact, Artifact], capsys: pytest.CaptureFixture[str]
):
    right = KlSettings(KlPlacement.loss, KlEstimator.k2)
    policy.train_policy(make_job(_config(tmp_path / "a", Reinforce(), right)), 0, *upstream)
    # what RAFT ranks by has no gradient, so there is none to be wrong
    ranks = KlSettings(KlPlacement.reward, KlEstimator.k3)
    assert ranks.problem() is not None
    policy.train_policy(make_job(_config(tmp_path / "b", Raft(k=2), ranks)), 0, *upstream)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("algo", [VanillaPg(), Ppo(value_head=ValueHead.separate)], ids=["shared", "separate"])
def test_the_critic_is_counted_and_not_in_the_model(
    tmp_path: Path,
    upstream: tuple[Artifact, Artifact],
    capsys: pytest.CaptureFixture[str],
    algo: Algorithm,
):
    policy.train_policy(make_job(_config(tmp_path, algo)), 0, *upstream)
    sft = tiny_lm()
    head = 16 + 1
    backbone = (
        sum(p.numel() for p in sft.base_model.parameters()) if algo == Ppo(value_head=ValueHead.separate) else 0
    )
    total = sum(p.numel() for p in sft.parameters()) + head + backbone
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["parameters/trainable"] == summary["parameters/total"] == total
    assert f"{total:,} of {total:,} parameters are trained" in capsys.readouterr().err
    sizes = [
        (folder / "model.safetensors").stat().st_size
        for folder in (tmp_path / "run/model", Path(upstream[0].path))
    ]
    assert sizes[0] == sizes[1]
    assert {"value/loss", "value/mean", "value/explained_variance"} <= _rows(tmp_path)[0].keys()


def test_noise_is_in_units_of_the_raw_score(
    tmp_path: Path, upstream: tuple[Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
):
    made: list[tuple[float, int]] = []
    real = scoring.RewardNoise

    def record(std: float, seed: int) -> scoring.RewardNoise:
        made.append((std, seed))
        return real(std, seed)

    monkeypatch.setattr(scoring, "RewardNoise", record)
    policy.train_policy(make_job(_config(tmp_path / "a", Reinforce(), noise=2.0)), 7, *upstream)
    assert made == [(0.5, 7)]
    policy.train_policy(make_job(_config(tmp_path / "b", Reinforce())), 7, *upstream)
    assert len(made) == 1
    noisy, clean = (_rows(tmp_path / name) for name in ("a", "b"))
    assert noisy[0]["reward/mean"] != clean[0]["reward/mean"]
    assert noisy[0]["reward/std"] > clean[0]["reward/std"]
