from __future__ import annotations

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from fixtures_models import (
    bos_tokenizer,
    byte_tokenizer,
    make_job,
    run_config,
    tiny_lm,
)

from rlhf_cli.config.schema import PrecisionConfig, PrecisionName, RunConfig
from rlhf_cli.models.loading import save_model
from rlhf_cli.models.settings import LearningRates, PeftSettings
from rlhf_cli.rewards.settings import RmInit, Standardize
from rlhf_cli.runs.job import Artifact
from rlhf_cli.settings import Schedule, Select, TrainSettings
from rlhf_cli.stages import keys as stages
from rlhf_cli.stages.keys import StageKey, file_digest, rm_key, sft_key


def keys(config: RunConfig) -> tuple[str, str]:
    """Digests of the SFT model and of the reward model that is built on it."""
    job = make_job(config)
    sft = sft_key(job)
    return sft.digest, rm_key(job, Artifact("anywhere", sft.digest)).digest


def set_key(config: RunConfig, key: str, value: Any) -> None:
    *nodes, name = key.split(".")
    node: Any = config
    for part in nodes:
        node = getattr(node, part)
    assert getattr(node, name) != value, f"{key} has this value already"
    setattr(node, name, value)


def both_models(config: RunConfig, name: str, value: Any) -> None:
    """As `model.x=` does it: rm.model follows model."""
    set_key(config, f"model.{name}", value)
    set_key(config, f"rm.model.{name}", value)


# key -> value, whether the SFT model changes, whether the reward model does
DIGEST_TABLE: dict[str, tuple[Any, bool, bool]] = {
    "sft.seed": (1, True, True),
    "rm.seed": (1, False, True),
    "data.seed": (1, True, True),
    "data.num_sft": (15, True, True),
    "data.num_validation": (5, True, True),
    "data.max_prompt_tokens": (23, True, True),
    "data.max_completion_tokens": (17, True, True),
    "precision": (PrecisionConfig(PrecisionName.bf16), True, True),
    "data.num_pairs": (11, False, True),
    "data.swap_rate": (0.5, False, True),
    "data.label_temperature": (9.0, False, True),
    "rm.name": ("other", False, True),
    "rm.append_eos": (False, False, True),
    "rm.use_margin": (True, False, True),
    "rm.init": (RmInit.backbone, False, True),
    "rm.standardize": (Standardize.none, False, True),
    "rm.standardize_samples": (7, False, True),
    "rm.model.hidden_size": (32, False, True),
    "rollout.temperature": (0.5, False, True),
    "rollout.max_new_tokens": (9, False, True),
    # what neither of them sees
    "command": ("train-rm", False, False),
    "name": ("other", False, False),
    "run_dir": ("/elsewhere", False, False),
    "seed": (1, False, False),
    "threads": (2, False, False),
    "algo.k": (4, False, False),
    "algo.beta": (0.5, False, False),
    "algo.eval_prompts": (5, False, False),
    "algo.train.lr": (1.0, False, False),
    "algo.train.steps": (9, False, False),
    "data.name": ("other", False, False),
    "data.num_test": (5, False, False),
    "data.num_prompts": (40, False, False),
    "eval.num_prompts": (1, False, False),
    "eval.temperature": (0.1, False, False),
    "rollout.max_rows": (1, False, False),
    "rollout.max_tokens": (9, False, False),
    "rollout.top_k": (3, False, False),  # the reward's scale is of the whole distribution
    "rollout.top_p": (0.5, False, False),
    "model.name": ("other", False, False),
    "model.lr": (LearningRates(sft=1.0), False, False),
    "rm.model.name": ("other", False, False),
    "rm.model.lr": (LearningRates(rm=1.0), False, False),
    "stages.cache_dir": ("/elsewhere", False, False),
    "sft.train.samples_every": (1, False, False),
    "rm.train.samples_every": (1, False, False),
    "algo.train.samples_every": (1, False, False),
    "sft.train.gradient_checkpointing": (True, False, False),
    "rm.train.gradient_checkpointing": (True, False, False),
    "algo.train.gradient_checkpointing": (True, False, False),
}

TRAINING = {
    "steps": 3,
    "epochs": 2.0,
    "batch_size": 5,
    "micro_batch_size": 2,
    "micro_batch_tokens": 40,
    "lr": 2e-3,
    "schedule": Schedule.constant,
    "warmup_ratio": 0.5,
    "warmup_steps": 1,
    "min_lr_ratio": 0.5,
    "weight_decay": 0.1,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-6,
    "max_grad_norm": None,
    "eval_every": 1,
    "patience": 3,
    "select": Select.best,
}


class TestDigest:
    @pytest.mark.parametrize("key", DIGEST_TABLE)
    def test_it_changes_with_what_changes_the_artifact(self, key: str, tmp_path: Path) -> None:
        value, sft_changes, rm_changes = DIGEST_TABLE[key]
        config = run_config(tmp_path)
        before = keys(config)
        set_key(config, key, value)
        after = keys(config)
        assert (after[0] != before[0], after[1] != before[1]) == (sft_changes, rm_changes)

    @pytest.mark.parametrize("stage", ["sft", "rm"])
    @pytest.mark.parametrize("name", TRAINING)
    def test_every_setting_of_the_training_counts(self, stage: str, name: str, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        before = keys(config)
        set_key(config, f"{stage}.train.{name}", TRAINING[name])
        after = keys(config)
        assert (after[0] != before[0], after[1] != before[1]) == (stage == "sft", True)

    @pytest.mark.parametrize(
        ("name", "used"),
        [
            ("none", set()),
            ("lora", {"r", "alpha", "dropout", "target_modules"}),
            ("adapter", {"variant", "bottleneck"}),
            ("last_layer", set()),
        ],
    )
    def test_the_settings_that_the_kind_of_adapter_uses(self, name: str, used: set[str], tmp_path: Path) -> None:
        others = {"r": 1, "alpha": 1.0, "dropout": 0.5, "target_modules": ["x"]}
        others |= {"variant": "replace", "bottleneck": 1}
        assert {field.name for field in fields(PeftSettings)} == {"name", *others}
        changed = set()
        for key, value in others.items():
            config = run_config(tmp_path)
            config.rm.peft.name = name
            before = keys(config)[1]
            set_key(config, f"rm.peft.{key}", value)
            changed |= {key} if keys(config)[1] != before else set()
        assert changed == used

    def test_warm_up_by_ratio_has_the_digest_it_had_before_there_were_steps(self, tmp_path: Path) -> None:
        job = make_job(run_config(tmp_path))
        sft = sft_key(job)
        for key in (sft, rm_key(job, Artifact("anywhere", sft.digest))):
            assert not [name for name in key.parts if "warmup_steps" in name]

    def test_no_setting_of_the_training_is_left_out(self) -> None:
        assert {field.name for field in fields(TrainSettings)} == {
            *TRAINING,
            "samples_every",
            "gradient_checkpointing",
        }

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("hidden_size", 32),
            ("num_layers", 3),
            ("num_heads", 4),
            ("intermediate_size", 64),
            ("vocab_size", 301),
            ("max_positions", 99),
        ],
    )
    def test_the_size_of_both_backbones(self, name: str, value: int, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        before = keys(config)
        both_models(config, name, value)
        after = keys(config)
        assert after[0] != before[0] and after[1] != before[1]

    def test_a_reward_model_that_does_not_use_the_sft_model(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        config.rm.init, config.rm.standardize = RmInit.backbone, Standardize.none
        before = keys(config)
        for key, value in (
            ("sft.seed", 1),
            ("rollout.temperature", 0.5),
            ("rollout.max_new_tokens", 9),
            ("rm.standardize_samples", 7),
        ):
            set_key(config, key, value)
        assert keys(config)[1] == before[1]
        set_key(config, "rm.model.num_layers", 3)
        assert keys(config)[1] != before[1]

    def test_a_scaled_one_needs_the_sft_model_even_with_its_own_backbone(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        config.rm.init = RmInit.backbone
        before = keys(config)
        set_key(config, "sft.seed", 1)
        assert keys(config)[1] != before[1]

    def test_the_samples_that_the_scale_comes_from(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        job = make_job(config)
        first = replace(job, data=replace(job.data, prompts=["another", *job.data.prompts[1:]]))
        beyond = replace(job, data=replace(job.data, prompts=[*job.data.prompts[:8], "another"]))
        sft = Artifact("x", "y")
        assert rm_key(first, sft).digest != rm_key(job, sft).digest == rm_key(beyond, sft).digest

    def test_a_backbone_is_known_by_its_files(self, tmp_path: Path) -> None:
        save_model(tiny_lm(), byte_tokenizer(), tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        save_model(tiny_lm(1), byte_tokenizer(), tmp_path / "c")
        config = run_config(tmp_path)
        built = keys(config)
        found = {}
        for name in "abc":
            config.model.path = config.rm.model.path = str(tmp_path / name)
            found[name] = keys(config)
        assert found["a"] == found["b"]
        assert len({built[0], found["a"][0], found["c"][0]}) == len({built[1], found["a"][1], found["c"][1]}) == 3

    def test_a_schema_version_parts_old_artifacts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        config = run_config(tmp_path)
        before = keys(config)
        monkeypatch.setattr(stages, "SCHEMA_VERSION", stages.SCHEMA_VERSION + 1)
        assert not set(before) & set(keys(config))

    def test_names_and_digests(self) -> None:
        one, other = StageKey("sft", {"a": 1, "b": 2}), StageKey("sft", {"b": 2, "a": 1})
        assert one.digest == other.digest and one.folder_name == f"sft-{one.digest[:12]}"
        assert StageKey("sft", {"a": 1, "b": "2"}).digest != one.digest


class TestFileDigest:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        tokenizer = bos_tokenizer("{{ messages[0].content }}")
        save_model(tiny_lm(), tokenizer, tmp_path / "model")
        assert (tmp_path / "model" / "chat_template.jinja").is_file()
        return tmp_path / "model"

    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
    )
    def test_every_file_of_a_model_counts(self, folder: Path, name: str) -> None:
        before = file_digest(str(folder))
        file = folder / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert file_digest(str(folder)) != before
        file.unlink()
        assert file_digest(str(folder)) != before

    def test_the_rest_does_not(self, folder: Path, tmp_path: Path) -> None:
        before = file_digest(str(folder))
        (folder / "README.md").write_text("hello")
        os.utime(folder / "config.json", (1, 1))
        assert file_digest(str(folder)) == before
        assert file_digest(str(shutil.copytree(folder, tmp_path / "copy"))) == before

    def test_two_files_are_not_taken_for_one(self, tmp_path: Path) -> None:
        folders = ({"x.json": "1", "y.json": "2"}, {"x.json": "2", "y.json": "1"}, {"x.json": "1", "z.json": "2"})
        for i, files in enumerate(folders):
            (tmp_path / str(i)).mkdir()
            for name, content in files.items():
                (tmp_path / str(i) / name).write_text(content)
        assert len({file_digest(str(tmp_path / str(i))) for i in range(3)}) == 3

    def test_a_hub_id_is_its_name(self) -> None:
        assert file_digest("gpt2") == file_digest("gpt2") != file_digest("gpt3")
