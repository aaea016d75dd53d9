"""A policy's reward on its way from the terms to the loss: logged apart, scaled, and taken up again after a kill."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from fixtures_policy import constant_reward, policy_task, some_reward, train

from rlhf_cli.algos.reinforce import Reinforce
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.rewards.scaling import Moments, RewardScaling
from rlhf_cli.rewards.terms import RewardSum, length_penalty
from rlhf_cli.train.reward_noise import RewardNoise
from rlhf_cli.types import Rollout, Scores


def several(rollout: Rollout) -> Scores:
    """A sum of two terms, one of them an ensemble's."""
    base = some_reward(rollout)
    disagreement = torch.arange(len(rollout)).float()
    model = lambda _: Scores(base.reward, base.raw, disagreement=disagreement)  # noqa: E731
    return RewardSum({"rm": 1.0, "length": 2.0}, {"length": lambda r: length_penalty(r, 6)}, model)(rollout)


def running(clip: float | None = None) -> dict[str, Any]:
    return {"scaling": RewardScaling(Moments(), clip, is_running=True)}


def test_every_term_is_logged_apart(make_llama, word_tokenizer, tmp_path):
    task = policy_task(make_llama(), word_tokenizer, reward=several, eval_every=1)
    (row,) = train(task, tmp_path, 1)
    assert row["reward/mean"] == pytest.approx(row["reward/rm"] + 2 * row["reward/length"], abs=1e-6)
    assert row["reward/length"] == pytest.approx(-row["length/mean"] / 6)
    assert row["reward/disagreement"] == sum(range(8)) / 8
    assert row["eval/reward/mean"] == pytest.approx(
        row["eval/reward/rm"] + 2 * row["eval/reward/length"], abs=1e-6
    )
    assert row["eval/reward/disagreement"] == (0 + 1 + 2 + 3) / 4
    assert not {"reward/clipped", "reward/norm_mean"} & row.keys()


def test_the_samples_tell_their_terms(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer, reward=several)
    rows = task.batch(0).samples
    assert len(rows) == 8
    for row in rows:
        assert row["terms"].keys() == {"rm", "length"}
        assert row["reward"] == pytest.approx(row["terms"]["rm"] + 2 * row["terms"]["length"], abs=1e-6)
    plain = policy_task(make_llama(), word_tokenizer).batch(0)
    assert "terms" not in plain.samples[0] and not any("disagreement" in name for name in plain.metrics)


def test_a_plain_reward_is_logged_as_before(make_llama, word_tokenizer, tmp_path):
    (row,) = train(policy_task(make_llama(), word_tokenizer, eval_every=1), tmp_path, 1)
    names = {name for name in row if name.startswith(("reward/", "eval/reward/"))}
    assert names == {"reward/mean", "reward/std", "reward/shaped_mean", "eval/reward/mean"}


def test_a_running_scale_has_seen_the_rollout_that_it_scales(make_llama, word_tokenizer, tmp_path):
    task = policy_task(make_llama(), word_tokenizer, Reinforce(), eval_every=1, more=running())
    first, *_, last = train(task, tmp_path, 3)
    assert (first["reward/mean"], first["reward/std"]) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert first["reward/norm_std"] > 0.1 and last["reward/norm_mean"] != first["reward/norm_mean"]
    assert task.scaling is not None and task.scaling.moments is not None
    assert task.scaling.moments.count == 3 * 8, "the evaluations have not moved it"
    raw = policy_task(make_llama(), word_tokenizer, Reinforce(), eval_every=1)
    (unscaled,) = train(raw, tmp_path / "raw", 1)
    assert unscaled["reward/mean"] == pytest.approx(first["reward/norm_mean"], abs=1e-6)
    assert unscaled["reward/std"] == pytest.approx(first["reward/norm_std"], abs=1e-6)


def test_an_evaluation_is_on_the_scale_of_training(make_llama, word_tokenizer):
    moments = Moments.of(torch.tensor([-1.0, 0.0, 4.0]))
    plain = policy_task(make_llama(), word_tokenizer).evaluate(0)
    for is_running in (False, True):
        scaling = RewardScaling(moments, None, is_running)
        scaled = policy_task(make_llama(), word_tokenizer, more={"scaling": scaling}).evaluate(0)
        expected = (plain.metrics["reward/mean"] - moments.mean) / moments.std
        assert scaled.metrics["reward/mean"] == pytest.approx(expected, abs=1e-6)
        assert scaling.moments == moments


def test_a_checkpoint_has_the_running_scale(make_llama, word_tokenizer):
    task = policy_task(make_llama(), word_tokenizer, more=running())
    task.batch(0)
    state = json.loads(json.dumps(task.state()))
    other = policy_task(make_llama(), word_tokenizer, more=running())
    other.restore(state)
    rows = [one.batch(1).metrics for one in (task, other)]
    for name in ("reward/mean", "reward/std", "reward/norm_mean", "reward/norm_std"):
        assert rows[0][name] == rows[1][name], name
    assert task.scaling.moments == other.scaling.moments
    frozen = policy_task(make_llama(), word_tokenizer, more={"scaling": RewardScaling(Moments(), 1.0)})
    assert policy_task(make_llama(), word_tokenizer).state().keys() == frozen.state().keys() == {"baseline"}


def test_a_rollout_of_several_batches_is_scaled_as_one(make_llama, word_tokenizer):
    algorithm = Rloo(k=2, rollout_batch_size=16)
    task = policy_task(make_llama(), word_tokenizer, algorithm, more=running())
    metrics = [task.batch(step).metrics for step in (0, 1)]
    assert metrics[0]["reward/norm_mean"] == metrics[1]["reward/norm_mean"]
    means, stds = ([row[name] for row in metrics] for name in ("reward/mean", "reward/std"))
    assert sum(means) == pytest.approx(0, abs=1e-6)
    square = sum(std**2 + mean**2 for mean, std in zip(means, stds, strict=True)) / 2
    assert math.sqrt(square) == pytest.approx(1, abs=1e-6)


def test_noise_comes_before_scale_and_clip(make_llama, word_tokenizer):
    more = {"noise": RewardNoise(10.0, 0), "scaling": RewardScaling(None, 0.5)}
    metrics = policy_task(make_llama(), word_tokenizer, reward=constant_reward, more=more).batch(0).metrics
    assert metrics["reward/clipped"] > 0.5
    assert abs(metrics["reward/mean"]) <= 0.5 and metrics["reward/std"] > 0.1
