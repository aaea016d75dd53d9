"""train-rm with one model: what is fitted after training, and what it says of swapped labels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_models import CPU, byte_tokenizer, make_job, reward_model, run_config, tiny_lm
from fixtures_rewards import GRADES, any_model, ensemble_of

from rlhf_cli.evaluation.calibration import fit_temperature
from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import Scorer, load_reward_model
from rlhf_cli.rewards.settings import DistributionalRm, RmConfig, ScalarRm, Standardize
from rlhf_cli.runs import reward as module
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.reward import adjusted, sft_samples, train_rm, training_pairs
from rlhf_cli.settings import ReadOut, TrainSettings
from rlhf_cli.types import Rollout

CAPS = {"max_prompt_tokens": 24, "max_completion_tokens": 16}  # those of the data


def job_for(folder: Path, form: type[RmConfig] = ScalarRm, **changes: Any) -> Job:
    config = run_config(folder, "train-rm")
    shared = {"model": config.rm.model, "train": config.rm.train, "standardize_samples": 8}
    graded = {"num_grades": GRADES} if form is DistributionalRm else {}
    config.rm = form(**{**shared, **graded, **changes})
    config.rm.check()
    return make_job(config)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("sft")
    save_model(tiny_lm(), byte_tokenizer(), folder)
    return Artifact(str(folder), "sft digest")


@pytest.fixture(scope="module")
def samples(sft: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Rollout]:
    job = job_for(tmp_path_factory.mktemp("samples"))
    rollout = sft_samples(job, 0, sft)
    assert rollout is not None and len(rollout.completions) == 8
    return job, rollout


def of_samples(scorer: Scorer, rollout: Rollout) -> Any:
    return scorer.score_rollout(rollout)


def with_settings(job: Job, form: type[RmConfig], **changes: Any) -> Job:
    rm = job_for(Path("unused"), form, **changes).config.rm
    return replace(job, config=replace(job.config, rm=rm))


class TestAdjusted:
    def test_the_temperature_is_that_of_the_validation_pairs(self, samples: tuple[Job, Rollout]) -> None:
        job, _ = samples
        reward = any_model("llama", GRADES, **CAPS)
        log_odds = score_pairs(reward, job.data.pairs_validation, job.precision).log_odds
        changes, figures = adjusted(job, reward, None)
        assert changes == {"temperature": fit_temperature(log_odds)}
        assert figures == {"rm/temperature": changes["temperature"]}
        assert reward.format.temperature == changes["temperature"]

    def test_without_calibration_and_scale_nothing_is_found(self, samples: tuple[Job, Rollout]) -> None:
        job = with_settings(samples[0], ScalarRm, calibrate=False, standardize=Standardize.none)
        assert adjusted(job, reward_model(**CAPS), None) == ({}, {})

    @pytest.mark.parametrize("labels", [1, GRADES])
    def test_the_scale_is_that_of_the_samples(self, labels: int, samples: tuple[Job, Rollout]) -> None:
        job, rollout = samples
        reward = any_model("llama", labels, **CAPS)
        raw = of_samples(reward, rollout).raw.double()
        changes, figures = adjusted(job, reward, rollout)
        assert changes["mean"] == figures["rm/sft_mean"] == pytest.approx(float(raw.mean()), abs=1e-6)
        assert changes["std"] == figures["rm/sft_std"] == pytest.approx(float(raw.std()), abs=1e-6)
        after = of_samples(reward, rollout).reward
        assert float(after.mean()) == pytest.approx(0, abs=1e-5) and float(after.std()) == pytest.approx(
            1, abs=1e-5
        )

    def test_a_win_rate_is_against_the_samples_and_then_scaled(self, samples: tuple[Job, Rollout]) -> None:
        job = with_settings(samples[0], DistributionalRm, read_out=ReadOut.win_rate)
        reward = any_model("llama", GRADES, read_out="win_rate", **CAPS)
        expected = of_samples(reward, samples[1]).logits.double().softmax(-1).mean(0)
        changes, _ = adjusted(job, reward, samples[1])
        torch.testing.assert_close(torch.tensor(changes["opponent"]).double(), expected, atol=1e-6, rtol=0)
        assert sum(changes["opponent"]) == pytest.approx(1, abs=1e-6)
        found = of_samples(reward, samples[1])
        # what the model itself has written wins half of the time against it
        assert float(found.raw.mean()) == pytest.approx(0.5, abs=1e-5) == pytest.approx(changes["mean"], abs=1e-5)
        assert float(found.reward.std()) == pytest.approx(1, abs=1e-5)
        assert json.loads(json.dumps(changes)) == changes, "what config.json can hold"

    def test_another_read_out_needs_no_opponent(self, samples: tuple[Job, Rollout]) -> None:
        changes, _ = adjusted(samples[0], any_model("llama", GRADES, read_out="cvar", **CAPS), samples[1])
        assert "opponent" not in changes

    @pytest.mark.parametrize("labels", [1, GRADES])
    def test_of_several_each_is_centred_and_the_whole_is_scaled(
        self, labels: int, samples: tuple[Job, Rollout]
    ) -> None:
        job, rollout = samples
        read_out = {} if labels == 1 else {"read_out": "win_rate"}
        members = [any_model("llama", labels, seed, **CAPS) for seed in range(2)]
        whole = ensemble_of(members, 0.5, **read_out)
        adjusted(job, whole, rollout)
        for member, centre in zip(members, whole.centres, strict=True):
            own = of_samples(replace(member, format=whole.format), rollout).raw
            assert centre == pytest.approx(float(own.mean()), abs=1e-6)
        found = of_samples(whole, rollout)
        assert float(found.reward.mean()) == pytest.approx(0, abs=1e-5)
        assert float(found.reward.std()) == pytest.approx(1, abs=1e-5)
        assert bool(whole.format.opponent) == (labels > 1)


class TestTrained:
    def test_every_model_of_the_run_is_finished(self, sft: Artifact, tmp_path: Path) -> None:
        train = TrainSettings(steps=3, batch_size=4, lr=3e-2, eval_every=1)
        job = job_for(tmp_path, DistributionalRm, train=train, read_out=ReadOut.win_rate)
        with pytest.MonkeyPatch.context() as patch:  # the best is not the last
            scores = iter([3.0, 2.0, 1.0, 0.0, -1.0, -2.0])
            real = module.RewardTask.evaluate
            patch.setattr(
                module.RewardTask, "evaluate", lambda self, step: replace(real(self, step), score=next(scores))
            )
            train_rm(job, 0, sft)
        rollout = sft_samples(job, 0, sft)
        assert rollout is not None
        formats: list[RewardFormat] = []
        for name in ("model", "model_best"):
            found = load_reward_model("rm.path", str(job.folder / name), CPU)
            formats.append(found.format)
            rewards = of_samples(found, rollout).reward
            assert float(rewards.mean()) == pytest.approx(0, abs=1e-4)
            assert float(rewards.std()) == pytest.approx(1, abs=1e-4)
            assert len(found.format.opponent) == GRADES and found.format.temperature != 1.0
        assert formats[0] != formats[1]
        summary = json.loads((job.folder / "summary.json").read_text())
        assert (summary["rm/sft_mean"], summary["rm/temperature"]) == (formats[0].mean, formats[0].temperature)

    def test_what_is_memorised_of_swapped_labels(self, sft: Artifact, tmp_path: Path) -> None:
        train = TrainSettings(steps=30, batch_size=12, lr=3e-2)
        job = job_for(tmp_path, label_swap_rate=0.4, label_swap_seed=1, train=train)
        train_rm(job, 0, sft)
        pairs = list(training_pairs(job))
        found = load_reward_model("rm.path", str(job.folder / "model"), CPU)
        summary = json.loads((job.folder / "summary.json").read_text())
        shares = []
        for name, swapped in (("clean", False), ("corrupted", True)):
            rows = [pair for pair in pairs if pair.swapped is swapped]
            margins = [
                found.score([pair.prompt], [pair.chosen]).raw - found.score([pair.prompt], [pair.rejected]).raw
                for pair in rows
            ]
            right = [0.5 + 0.5 * float(margin.sign()) for margin in margins]  # a tie is half right
            assert 1 <= len(rows) < len(pairs)
            assert summary[f"rm/train_{name}/accuracy"] == pytest.approx(sum(right) / len(rows))
            shares.append(sum(right) / len(rows))
        assert max(shares) > 0.5, "something was learnt"
        given = list(job.data.pairs)
        assert all((pair in given) is not pair.swapped for pair in pairs), (
            "by the swapped labels, not the true ones"
        )

    def test_without_swaps_nothing_is_said_of_them(self, sft: Artifact, tmp_path: Path) -> None:
        job = job_for(tmp_path, standardize=Standardize.none)
        train_rm(job, 0, sft)
        summary = json.loads((job.folder / "summary.json").read_text())
        assert not [key for key in summary if "train_" in key or "sft_" in key] and "rm/temperature" in summary

    def test_dropout_and_probing_are_of_this_run(
        self, sft: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        weights = []
        for name, changes in (("a", {}), ("b", {"dropout": 0.5}), ("c", {"probe_steps": 4})):
            job = job_for(tmp_path / name, standardize=Standardize.none, **changes)
            train_rm(job, 0, sft)
            weights.append((job.folder / "model/model.safetensors").read_bytes())
        assert len(set(weights)) == 3
        assert (
            capsys.readouterr().err.count("linear probing: 4 steps of the head alone, validation accuracy ") == 1
        )
        config = json.loads((tmp_path / "b/run/model/config.json").read_text())
        assert config["attention_dropout"] == 0.0, "what is saved has no dropout of ours"
