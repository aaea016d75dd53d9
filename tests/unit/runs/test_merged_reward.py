"""Members made into one: which, in what order, and what comes out; the members are built, not trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_models import CPU, byte_tokenizer, make_job, reward_model, run_config, tiny_lm
from fixtures_rewards import any_model, ensemble_of, with_lora
from safetensors.torch import load_file

from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.ensemble import EnsembleRewardModel, load_scorer
from rlhf_cli.rewards.model import RewardModel, Scorer
from rlhf_cli.rewards.settings import EnsembleRm, MemberKind, MembersRm, Selection, Standardize, WarmRm
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.merged_reward import averaged, merge_members

CAPS = {"max_prompt_tokens": 24, "max_completion_tokens": 16}  # those of the data
GRADES = 4


def job_for(folder: Path, form: type[MembersRm], **changes: Any) -> Job:
    config = run_config(folder, "train-rm")
    shared = {"model": config.rm.model, "train": config.rm.train, "standardize_samples": 8}
    graded = {"num_grades": GRADES} if changes.get("kind") is MemberKind.distributional else {}
    config.rm = form(**{**shared, **graded, **changes})
    config.rm.check()
    config.data.num_validation = 12
    return make_job(config)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("sft")
    save_model(tiny_lm(), byte_tokenizer(), folder)
    return Artifact(str(folder), "sft digest")


def saved(models: Sequence[RewardModel], folder: Path) -> list[Artifact]:
    found = []
    for number, model in enumerate(models):
        model.save(folder / f"m{number}")
        found.append(Artifact(str(folder / f"m{number}"), f"digest {number}"))
    return found


def merged(job: Job, sft: Artifact, members: Sequence[Artifact]) -> Scorer:
    merge_members(job, 5, sft, members)
    return load_scorer("rm.path", str(job.folder / "model"), CPU)


def summary(job: Job) -> dict[str, float]:
    return json.loads((job.folder / "summary.json").read_text())


def rows(job: Job) -> list[dict[str, float]]:
    return [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lora_members(labels: int) -> list[RewardModel]:
    """As a run with rm.peft=lora saves them: merged."""
    found = []
    for seed in range(3):
        reward = any_model("llama", labels, 0, **CAPS)
        reward.model = with_lora(reward, seed + 1).merged()
        found.append(reward)
    return found


class TestWeights:
    @pytest.mark.parametrize("labels", [1, GRADES])
    @pytest.mark.parametrize("peft", ["none", "lora"])
    def test_they_are_the_mean_of_the_members(self, peft: str, labels: int, sft: Artifact, tmp_path: Path) -> None:
        models = (
            lora_members(labels)
            if peft == "lora"
            else [any_model("llama", labels, seed, **CAPS) for seed in range(3)]
        )
        members = saved(models, tmp_path)
        kind = MemberKind.scalar if labels == 1 else MemberKind.distributional
        job = job_for(tmp_path, WarmRm, kind=kind, members=3)
        found = merged(job, sft, members)
        assert isinstance(found, RewardModel) and found.model.config.num_labels == labels
        each = [weights(Path(member.path)) for member in members]
        for name, tensor in weights(job.folder / "model").items():
            mean = torch.stack([one[name].double() for one in each]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, atol=1e-7, rtol=0)
        adapted = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(each[0][adapted], each[1][adapted]), "the members differ"
        assert (found.format.grade_loss is None) == (labels == 1)

    @pytest.mark.parametrize("selection", list(Selection))
    def test_one_member_is_that_member_bit_for_bit(
        self, selection: Selection, sft: Artifact, tmp_path: Path
    ) -> None:
        members = saved([reward_model(seed=2, **CAPS)], tmp_path)
        job = job_for(tmp_path, WarmRm, members=1, selection=selection)
        found = merged(job, sft, members)
        one, own = weights(Path(members[0].path)), weights(job.folder / "model")
        assert one.keys() == own.keys() and all(torch.equal(one[name], own[name]) for name in one)
        assert found.format.std != 1.0, "but it is scaled"

    def test_the_originals_stay_and_the_mean_has_no_dropout(self) -> None:
        models = [any_model("gpt2", 1, seed) for seed in range(2)]
        before = [{name: p.clone() for name, p in one.model.state_dict().items()} for one in models]
        mean = averaged(models)
        assert not mean.model.training
        for one, kept in zip(models, before, strict=True):
            assert all(torch.equal(tensor, kept[name]) for name, tensor in one.model.state_dict().items())

    def test_models_that_do_not_fit_together(self) -> None:
        with pytest.raises(ValueError, match=r"score\.weight"):
            averaged([any_model("llama", 3), any_model("llama", 4)])


class TestPredictions:
    @pytest.mark.parametrize("labels", [1, GRADES])
    def test_they_are_the_mean_of_the_members(self, labels: int, sft: Artifact, tmp_path: Path) -> None:
        models = [any_model("llama", labels, seed, **CAPS) for seed in range(3)]
        kind = MemberKind.scalar if labels == 1 else MemberKind.distributional
        job = job_for(tmp_path, EnsembleRm, kind=kind, members=3, disagreement_penalty=0.5)
        found = merged(job, sft, saved(models, tmp_path))
        assert isinstance(found, EnsembleRewardModel) and found.penalty == 0.5
        prompts, texts = ["the film ", "a "], ["was good .", "bad plot ."]
        free = replace(found, penalty=0.0).score(prompts, texts).raw
        expected = ensemble_of(models).score(prompts, texts).raw
        torch.testing.assert_close(free, expected, atol=1e-6, rtol=0)
        assert bool((found.score(prompts, texts).raw < free).all())

    def test_members_are_centred_on_samples_of_the_sft_model(self, sft: Artifact, tmp_path: Path) -> None:
        """One that is shifted by a constant is no reason to disagree."""
        twin = any_model("distilbert", 1, 0, **CAPS)
        shifted = any_model("distilbert", 1, 0, **CAPS)
        with torch.no_grad():
            shifted.model.classifier.bias += 7.0
        job = job_for(tmp_path, EnsembleRm, members=2, disagreement_penalty=1.0)
        found = merged(job, sft, saved([twin, shifted], tmp_path))
        assert isinstance(found, EnsembleRewardModel)
        assert sorted(found.centres)[1] - sorted(found.centres)[0] == pytest.approx(7.0, abs=1e-4)
        scores = found.score(["the film "], ["was good ."])
        assert scores.disagreement is not None and float(scores.disagreement) < 1e-4


def headed(factor: float) -> RewardModel:
    """The same reward times a factor: accuracy depends on its sign, likelihood on its size."""
    reward = reward_model(**CAPS)
    with torch.no_grad():
        reward.model.score.weight *= factor
    return reward


@pytest.fixture(scope="module")
def sign(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What makes `headed` more often right than wrong."""
    job = job_for(tmp_path_factory.mktemp("sign"), WarmRm)
    accuracy = score_pairs(headed(1.0), job.data.pairs_validation, job.precision).accuracy
    assert accuracy != 0.5
    return 1.0 if accuracy > 0.5 else -1.0


class TestSelection:
    @pytest.mark.parametrize("kind", [WarmRm, EnsembleRm])
    def test_greedy_leaves_out_what_hurts(
        self, kind: type[MembersRm], sign: float, sft: Artifact, tmp_path: Path
    ) -> None:
        members = saved([headed(sign * factor) for factor in (-20.0, 1.0, 3.0)], tmp_path)
        job = job_for(tmp_path, kind, members=3, selection=Selection.greedy)
        found = merged(job, sft, members)
        figures = summary(job)
        assert (figures["rm/members"], figures["rm/members_trained"]) == (2, 3)
        good = score_pairs(headed(sign), job.data.pairs_validation, job.precision).accuracy
        assert figures["rm/accuracy"] == good > 0.5
        expected = headed(sign * 2.0).score(["the film "], ["was good ."]).raw
        torch.testing.assert_close(found.score(["the film "], ["was good ."]).raw, expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("kind", [WarmRm, EnsembleRm])
    def test_all_takes_it_all_the_same(
        self, kind: type[MembersRm], sign: float, sft: Artifact, tmp_path: Path
    ) -> None:
        members = saved([headed(sign * factor) for factor in (-20.0, 1.0, 3.0)], tmp_path)
        job = job_for(tmp_path, kind, members=3)
        found = merged(job, sft, members)
        assert summary(job)["rm/members"] == 3 and summary(job)["rm/accuracy"] < 0.5
        expected = headed(sign * -16.0 / 3).score(["the film "], ["was good ."]).raw
        torch.testing.assert_close(found.score(["the film "], ["was good ."]).raw, expected, atol=1e-4, rtol=0)

    def test_members_are_ranked_by_accuracy_then_by_likelihood_then_by_number(
        self, sign: float, sft: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        factors = [-1.0, 1.0, 1e-3, 1.0, -1e-3]
        job = job_for(tmp_path, WarmRm, members=5)
        pairs = {
            factor: score_pairs(headed(sign * factor), job.data.pairs_validation, job.precision)
            for factor in factors
        }
        merged(job, sft, saved([headed(sign * factor) for factor in factors], tmp_path))
        order = [int(row["member"]) for row in rows(job)]
        right = [2, 1, 3] if pairs[1e-3].nll < pairs[1.0].nll else [1, 3, 2]
        assert order == [*right, 4, 0]  # of two that are wrong, the one that is less sure of it
        assert "members by accuracy on the validation pairs: " + f"{order[0]} (" in capsys.readouterr().err

    def test_every_number_of_members_is_measured(self, sign: float, sft: Artifact, tmp_path: Path) -> None:
        factors = [-20.0, 1.0, 3.0]
        job = job_for(tmp_path, WarmRm, members=3)
        merged(job, sft, saved([headed(sign * factor) for factor in factors], tmp_path))
        good = score_pairs(headed(sign), job.data.pairs_validation, job.precision).accuracy
        bad = score_pairs(headed(-sign), job.data.pairs_validation, job.precision).accuracy
        found = rows(job)
        assert [row["step"] for row in found] == [1, 2, 3]
        assert [row["selection/member"] for row in found] == [good, good, bad]
        for key in ("selection/weight_average", "selection/ensemble"):
            assert [row[key] for row in found] == [good, good, bad]


class TestFitted:
    @pytest.mark.parametrize("kind", [WarmRm, EnsembleRm])
    def test_without_scale_and_temperature(self, kind: type[MembersRm], sft: Artifact, tmp_path: Path) -> None:
        members = saved([reward_model(seed=seed, **CAPS) for seed in range(2)], tmp_path)
        job = job_for(tmp_path, kind, members=2, standardize=Standardize.none, calibrate=False)
        found = merged(job, sft, members).format
        assert (found.mean, found.std, found.temperature) == (0.0, 1.0, 1.0)
        assert not [key for key in summary(job) if key.startswith(("rm/sft", "rm/temperature"))]

    def test_what_the_run_is_made_of(self, sft: Artifact, tmp_path: Path) -> None:
        members = saved([reward_model(seed=seed, **CAPS) for seed in range(2)], tmp_path)
        job = job_for(tmp_path, WarmRm, members=2)
        merged(job, sft, members)
        record = json.loads((job.folder / "run.json").read_text())
        assert (record["status"], record["seed"]) == ("finished", 5)
        assert record["upstream"] == {
            "sft": sft.record(),
            "member-0": members[0].record(),
            "member-1": members[1].record(),
        }
        assert (job.folder / "model" / "README.md").is_file()
        assert (job.folder / "plots" / "members.png").is_file()
