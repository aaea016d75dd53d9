"""What members start from, and that they differ in nothing they should share."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_models import CPU, make_job, run_config
from safetensors.torch import load_file

from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.settings import MemberKind, MembersRm, WarmRm
from rlhf_cli.runs import members
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.members import publish_member, train_member, train_start
from rlhf_cli.runs.sft import SNAPSHOTS, train_sft
from rlhf_cli.settings import TrainSettings

Weights = dict[str, torch.Tensor]
HEAD = "score.weight"


def job_for(folder: Path, **changes: Any) -> Job:
    config = run_config(folder, "train-rm")
    shared = {"model": config.rm.model, "train": config.rm.train, "standardize_samples": 8}
    graded = {"num_grades": 4} if changes.get("kind") is MemberKind.distributional else {}
    config.rm = WarmRm(**{**shared, **graded, **changes})
    config.rm.check()
    return make_job(config)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A run of six steps that kept the models after the second and the fourth."""
    config = run_config(tmp_path_factory.mktemp("sft"), "train-sft")
    config.sft.train = TrainSettings(steps=6, batch_size=4, lr=1e-2)
    config.sft.snapshots = 2
    job = make_job(config)
    train_sft(job, 0)
    return Artifact(str(job.folder / "model"), "sft digest")


def start_of(sft: Artifact, folder: Path, seed: int = 0, **changes: Any) -> tuple[Job, Artifact]:
    job = job_for(folder, **changes)
    train_start(replace(job, folder=folder / "start"), seed, sft)
    return job, Artifact(str(folder / "start" / "model"), "start digest")


def backbone(path: str) -> Weights:
    """Of a language model, under the names of a classifier."""
    model, _ = load_causal_lm("sft.path", path, CPU)
    return {f"model.{name}": tensor for name, tensor in model.base_model.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other if name != HEAD)


def begun(job: Job, start: Artifact, snapshot: Artifact | None, number: int) -> Weights:
    """What a member's training begins with."""
    found: list[Weights] = []

    def record(_job: Job, _recorder: object, _seed: int, reward: RewardModel, *_: object) -> dict[str, float]:
        found.append(copy.deepcopy(reward.model.state_dict()))
        raise InterruptedError

    member = job.config.rm.of_member(number, number)
    own = replace(job, folder=job.folder / f"begun-{number}", config=replace(job.config, rm=member))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(members, "fit_reward_model", record)
        with pytest.raises(InterruptedError):
            train_member(own, member.seed, start, snapshot, start.path)
    return found[0]


def trained(job: Job, start: Artifact, snapshot: Artifact | None, number: int) -> Path:
    member = job.config.rm.of_member(number, number)
    own = replace(job, folder=job.folder / f"member-{number}", config=replace(job.config, rm=member))
    train_member(own, member.seed, start, snapshot, start.path)
    return own.folder / "model"


class TestSnapshots:
    def test_they_are_kept_on_the_way(self, sft: Artifact) -> None:
        folder = Path(sft.path).parent / SNAPSHOTS
        assert sorted(one.name for one in folder.iterdir()) == ["step-00000002", "step-00000004"]
        kept = [backbone(str(folder / name)) for name in ("step-00000002", "step-00000004")]
        assert not same(*kept) and not same(kept[1], backbone(sft.path))

    def test_they_change_nothing_of_the_run(self, sft: Artifact, tmp_path: Path) -> None:
        config = run_config(tmp_path, "train-sft")
        config.sft.train = TrainSettings(steps=6, batch_size=4, lr=1e-2)
        job = make_job(config)
        train_sft(job, 0)
        assert not (job.folder / SNAPSHOTS).exists()
        assert (job.folder / "model/model.safetensors").read_bytes() == Path(
            sft.path, "model.safetensors"
        ).read_bytes()

    def test_each_is_a_model_that_can_be_loaded(self, sft: Artifact) -> None:
        for folder in (Path(sft.path).parent / SNAPSHOTS).iterdir():
            model, tokenizer = load_causal_lm("sft.path", str(folder), CPU)
            assert model.config.vocab_size == len(tokenizer)


class TestStart:
    @pytest.mark.parametrize("probe_steps", [0, 8])
    @pytest.mark.parametrize("kind", list(MemberKind))
    def test_it_is_the_sft_models_backbone_under_a_head(
        self, kind: MemberKind, probe_steps: int, sft: Artifact, tmp_path: Path
    ) -> None:
        _, start = start_of(sft, tmp_path / "a", kind=kind, probe_steps=probe_steps)
        found = load_reward_model("rm.start", start.path, CPU)
        assert same(found.model.state_dict(), backbone(sft.path)), "probing moves the head alone"
        assert found.model.score.weight.shape == (1 if kind is MemberKind.scalar else 4, 16)
        _, again = start_of(sft, tmp_path / "b", kind=kind, probe_steps=probe_steps)
        assert (
            Path(again.path, "model.safetensors").read_bytes()
            == Path(start.path, "model.safetensors").read_bytes()
        )

    def test_probing_and_the_seed_change_the_head(self, sft: Artifact, tmp_path: Path) -> None:
        heads = []
        for name, seed, steps in (("a", 0, 0), ("b", 0, 8), ("c", 1, 0)):
            _, start = start_of(sft, tmp_path / name, seed, probe_steps=steps)
            heads.append(load_file(Path(start.path, "model.safetensors"))[HEAD])
        assert not any(torch.equal(heads[i], heads[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


class TestMembers:
    def test_all_begin_with_one_head_and_one_backbone(self, sft: Artifact, tmp_path: Path) -> None:
        job, start = start_of(sft, tmp_path, probe_steps=4)
        probed = load_file(Path(start.path, "model.safetensors"))
        for number in range(3):
            found = begun(job, start, None, number)
            assert torch.equal(found[HEAD], probed[HEAD]) and same(found, probed)

    def test_with_snapshots_the_backbones_differ_and_the_head_is_the_same(
        self, sft: Artifact, tmp_path: Path
    ) -> None:
        job, start = start_of(sft, tmp_path, probe_steps=4)
        probed = load_file(Path(start.path, "model.safetensors"))
        for number, folder in enumerate(sorted((Path(sft.path).parent / SNAPSHOTS).iterdir())):
            found = begun(job, start, Artifact(str(folder), "x"), number)
            assert torch.equal(found[HEAD], probed[HEAD])
            assert same(found, backbone(str(folder))) and not same(found, probed)

    def test_they_end_apart(self, sft: Artifact, tmp_path: Path) -> None:
        job, start = start_of(sft, tmp_path)
        one, other = (load_file(trained(job, start, None, number) / "model.safetensors") for number in (0, 1))
        assert not torch.equal(one[HEAD], other[HEAD]) and not same(one, other)

    def test_a_members_format_has_nothing_fitted(self, sft: Artifact, tmp_path: Path) -> None:
        job, start = start_of(sft, tmp_path, kind=MemberKind.distributional)
        found = load_reward_model("rm.path", str(trained(job, start, None, 0)), CPU).format
        assert (found.mean, found.std, found.temperature, found.opponent) == (0.0, 1.0, 1.0, ())
        assert (found.grade_loss, found.read_out) == ("half_tie", "mean")

    def test_with_an_adapter_it_is_saved_merged(self, sft: Artifact, tmp_path: Path) -> None:
        job, start = start_of(
            sft,
            tmp_path,
            peft=PeftSettings(name="lora", r=2, alpha=4.0),
            train=TrainSettings(steps=3, batch_size=4, lr=1e-2),
        )
        probed = load_file(Path(start.path, "model.safetensors"))
        found = load_file(trained(job, start, None, 0) / "model.safetensors")
        assert found.keys() == probed.keys(), "no weights of an adapter"
        moved = {name for name in found if not torch.equal(found[name], probed[name])}
        assert {name for name in moved if "embed" in name or "norm" in name} == set()
        assert {HEAD, "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= moved

    def test_dropout_and_learning_rate_are_the_members_own(self, sft: Artifact, tmp_path: Path) -> None:
        job, start = start_of(sft, tmp_path, dropouts=[0.0, 0.5], lr_factors=[1.0, 4.0])
        rates = []
        for number in (0, 1):
            trained(job, start, None, number)
            rows = (job.folder / f"member-{number}" / "metrics.jsonl").read_text().splitlines()
            rates.append(max(json.loads(row).get("lr", 0.0) for row in rows))
        assert rates[1] == pytest.approx(4 * rates[0]) and rates[0] > 0


def test_a_published_member_is_the_one_in_the_cache(sft: Artifact, tmp_path: Path) -> None:
    job, start = start_of(sft, tmp_path, member=1)
    assert isinstance(job.config.rm, MembersRm)
    path = trained(job, start, None, 1)
    publish_member(replace(job, folder=tmp_path / "published"), 0, sft, Artifact(str(path), "member digest"))
    found = tmp_path / "published" / "model"
    assert {file.name: file.read_bytes() for file in found.iterdir() if file.is_file()} == {
        file.name: file.read_bytes() for file in path.iterdir() if file.is_file()
    }
    summary = json.loads((tmp_path / "published" / "summary.json").read_text())
    assert 0 <= summary["rm/accuracy"] <= 1 and summary["loss"] > 0
    record = json.loads((tmp_path / "published" / "run.json").read_text())
    assert record["upstream"]["member"]["digest"] == "member digest"
