from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_models import (
    CPU,
    bert_tokenizer,
    bos_tokenizer,
    byte_tokenizer,
    distilbert,
    gpt2_lm,
    run_config,
    tiny_lm,
    tiny_settings,
)

from rlhf_cli import build
from rlhf_cli.algos.base import ValueHead
from rlhf_cli.algos.ppo import Ppo
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.algos.vanilla_pg import VanillaPg
from rlhf_cli.config.schema import (
    Device,
    LoggerConfig,
    PrecisionConfig,
    PrecisionName,
    WandbConfig,
)
from rlhf_cli.data import reviews
from rlhf_cli.data.settings import DataSettings, JsonlSettings, ReviewsSettings
from rlhf_cli.errors import RequestError
from rlhf_cli.models.critic import SeparateCritic, SharedCritic
from rlhf_cli.models.loading import save_model
from rlhf_cli.models.settings import LearningRates
from rlhf_cli.models.tokenizer import PAD_TOKEN
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.settings import RmInit
from rlhf_cli.train.tracking import NullTracker, TensorBoardTracker, WandbTracker
from rlhf_cli.types import Message

REVIEWS = ReviewsSettings(
    name="reviews",
    num_sft=20,
    num_pairs=15,
    num_validation=6,
    num_test=7,
    num_prompts=2000,
    swap_rate=0.5,
    max_prompt_tokens=24,
    max_completion_tokens=48,
)


class TestDataset:
    def test_reviews_by_stage(self) -> None:
        data = build.dataset(REVIEWS, 50)
        spec = REVIEWS.spec()
        assert (spec.num_sft, spec.swap_rate) == (20, 0.5)
        assert list(data.sft) == reviews.sft_examples(spec, "train")
        assert list(data.sft_validation) == reviews.sft_examples(spec, "validation")
        assert list(data.pairs) == reviews.preference_pairs(spec, "train")
        assert list(data.pairs_validation) == reviews.preference_pairs(spec, "validation")
        for split in ("test", "ood"):
            assert list(data.pairs_test[split]) == reviews.preference_pairs(spec, split)
            assert list(data.prompts_test[split]) == reviews.prompts(spec, split)
        assert set(data.pairs_test) == set(data.prompts_test) == {"test", "ood"}
        assert (data.name, data.max_prompt_tokens, data.max_completion_tokens) == ("reviews", 24, 48)

    def test_validation_prompts_are_not_trained_on(self) -> None:
        every = reviews.prompts(REVIEWS.spec(), "train")
        assert set(every[:-400]) & set(every[-400:]), "openings are drawn with replacement"
        data = build.dataset(REVIEWS, 400)
        assert list(data.prompts_validation) == every[-400:]
        assert not set(data.prompts) & set(data.prompts_validation)
        assert list(data.prompts) == [prompt for prompt in every[:-400] if prompt not in set(every[-400:])]
        assert not set(data.prompts) & set(data.prompts_test["test"])

    def test_training_keeps_some_prompts(self) -> None:
        few = replace(REVIEWS, num_prompts=12)
        assert len(build.dataset(few, 100).prompts_validation) == 12 - 8
        with pytest.raises(RequestError, match=r"^data\.num_prompts=8: expected at least 9$"):
            build.dataset(replace(REVIEWS, num_prompts=8), 100)

    def test_gold_reward_of_text_and_chat(self) -> None:
        data = build.dataset(REVIEWS, 10)
        assert data.gold is not None
        pair = data.pairs[0]
        assert isinstance(pair.prompt, str)
        assert data.gold(pair.prompt, pair.chosen) == reviews.gold_reward(pair.prompt, pair.chosen)
        chat = (Message("user", pair.prompt),)
        assert data.gold(chat, pair.chosen) == reviews.gold_reward(
            f"User:\n{pair.prompt}\n\nAssistant:\n", pair.chosen
        )

    def test_a_file_of_pairs(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(60)]
        (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        data = build.dataset(JsonlSettings(path=str(tmp_path / "pairs.jsonl"), test_fraction=0.3), 10)
        assert data.name == "jsonl" and data.gold is None
        assert len(data.pairs) + len(data.pairs_validation) + len(data.pairs_test["test"]) == 60

    def test_settings_without_a_source(self) -> None:
        with pytest.raises(AssertionError, match="no source for DataSettings"):
            build.dataset(DataSettings(), 10)


class TestBackbone:
    def test_built_from_its_sizes(self) -> None:
        settings = replace(tiny_settings(), vocab_size=400)
        model, tokenizer = build.backbone("model", settings, 3, CPU)
        again, same_tokenizer = build.backbone("model", settings, 3, CPU)
        other, _ = build.backbone("model", settings, 4, CPU)
        assert tokenizer.backend_tokenizer.to_str() == same_tokenizer.backend_tokenizer.to_str()
        assert len(tokenizer) == 400 == model.config.vocab_size
        weights = [one.get_input_embeddings().weight for one in (model, again, other)]
        assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
        # learnt on the corpus: common words are single tokens
        assert tokenizer.tokenize(" film") == ["Ġfilm"]

    def test_loaded_from_a_run(self, tmp_path: Path) -> None:
        save_model(tiny_lm(), byte_tokenizer(), tmp_path / "model")
        for seed in (0, 1):
            settings = replace(tiny_settings(), path=str(tmp_path))
            model, tokenizer = build.backbone("model", settings, seed, CPU)
            assert torch.equal(model.get_input_embeddings().weight, tiny_lm().get_input_embeddings().weight)
            assert tokenizer.get_vocab() == byte_tokenizer().get_vocab()

    def test_a_wrong_path_is_named_by_its_key(self) -> None:
        with pytest.raises(RequestError, match=r"^rm\.model\.path=/no/such: no such folder$"):
            build.backbone("rm.model", replace(tiny_settings(), path="/no/such"), 0, CPU)


class TestRewardModel:
    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({}, True),
            ({"name": "other"}, True),
            ({"lr": LearningRates(rm=1.0)}, True),
            ({"hidden_size": 32}, False),
            ({"vocab_size": 301}, False),
            ({"path": "elsewhere"}, False),
        ],
    )
    def test_it_starts_from_the_sft_model_where_the_backbone_is_the_same(
        self, change: dict[str, object], expected: bool, tmp_path: Path
    ) -> None:
        config = run_config(tmp_path)
        config.rm.model = replace(config.rm.model, **change)
        assert build.starts_from_sft(config) is expected
        config.rm.init = RmInit.sft
        assert build.starts_from_sft(config) is True
        config.rm.init = RmInit.backbone
        assert build.starts_from_sft(config) is False

    def test_a_loaded_backbone_is_known_by_its_path(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        config.model.path, config.rm.model.path = "gpt2", "gpt2"
        config.rm.model.hidden_size = 32  # says nothing where a path is set
        assert build.starts_from_sft(config)

    def test_from_the_sft_model(self, tmp_path: Path) -> None:
        save_model(gpt2_lm(byte_tokenizer(), 5), byte_tokenizer(), tmp_path / "sft")
        config = run_config(tmp_path)
        config.rm.append_eos = False
        reward = build.new_reward_model(config, str(tmp_path / "sft"), CPU, 0)
        assert torch.equal(
            reward.model.get_input_embeddings().weight, gpt2_lm(byte_tokenizer(), 5).get_input_embeddings().weight
        )
        assert reward.format == RewardFormat(24, 16, append_eos=False)
        other = build.new_reward_model(config, str(tmp_path / "sft"), CPU, 1)
        assert not torch.equal(other.model.score.weight, reward.model.score.weight)

    def test_from_sizes_of_its_own(self, tmp_path: Path) -> None:
        config = run_config(tmp_path)
        config.rm.model = replace(config.rm.model, hidden_size=32, vocab_size=310)
        reward = build.new_reward_model(config, "/not/read", CPU, 0)
        assert reward.model.config.hidden_size == 32 and len(reward.tokenizer) == 310
        assert reward.model.score.weight.shape == (1, 32)
        again = build.new_reward_model(config, "/not/read", CPU, 0)
        assert torch.equal(reward.model.score.weight, again.model.score.weight)
        other = build.new_reward_model(config, "/not/read", CPU, 1)
        for part in ("score", "model.embed_tokens"):
            one, two = (model.get_submodule(part).weight for model in (reward.model, other.model))
            assert not torch.equal(one, two)

    def test_from_an_encoder(self, tmp_path: Path) -> None:
        tokenizer = bert_tokenizer()
        save_model(distilbert(tokenizer), tokenizer, tmp_path / "bert")
        config = run_config(tmp_path)
        config.rm.model = replace(config.rm.model, path=str(tmp_path / "bert"))
        reward = build.new_reward_model(config, "/not/read", CPU, 0)
        assert reward.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert reward.score(["the film "], ["was good ."]).raw.isfinite().all()

    def test_a_tokenizer_without_pad(self, tmp_path: Path) -> None:
        tokenizer = bos_tokenizer()
        save_model(gpt2_lm(tokenizer), tokenizer, tmp_path / "sft")
        reward = build.new_reward_model(run_config(tmp_path), str(tmp_path / "sft"), CPU, 0)
        assert reward.tokenizer.pad_token == PAD_TOKEN
        assert reward.model.config.pad_token_id == reward.tokenizer.pad_token_id == len(tokenizer)
        assert reward.model.get_input_embeddings().weight.shape[0] == len(tokenizer) + 1


class TestCritic:
    def test_an_algorithm_without_use_for_one_has_none(self) -> None:
        assert build.critic(Rloo(), tiny_lm(), "/not/read", 0) is None

    def test_a_shared_one_is_a_head_on_the_policy(self) -> None:
        critic = build.critic(Ppo(), tiny_lm(), "/not/read", 0)
        assert type(critic) is SharedCritic
        assert [name for name, _ in critic.named_parameters()] == ["head.linear.weight", "head.linear.bias"]

    def test_a_separate_one_starts_from_the_sft_model(self, tmp_path: Path) -> None:
        sft = tiny_lm(seed=3)
        save_model(sft, byte_tokenizer(), tmp_path / "sft")
        critic = build.critic(VanillaPg(value_head=ValueHead.separate), tiny_lm(), str(tmp_path / "sft"), 0)
        assert type(critic) is SeparateCritic
        own, given = dict(critic.backbone.named_parameters()), dict(sft.base_model.named_parameters())
        assert own.keys() == given.keys()
        assert all(torch.equal(own[name], given[name]) for name in given)
        assert not {id(p) for p in own.values()} & {id(p) for p in given.values()}


class TestTracker:
    @staticmethod
    def build(config: LoggerConfig, folder: Path) -> object:
        return build.tracker(config, folder, "id", None, "name", "group", {"seed": 0})

    def test_metrics_file_alone(self, tmp_path: Path) -> None:
        assert type(self.build(LoggerConfig(), tmp_path)) is NullTracker

    def test_tensorboard(self, tmp_path: Path) -> None:
        tracker = self.build(LoggerConfig(name="tensorboard"), tmp_path)
        assert type(tracker) is TensorBoardTracker

    @pytest.mark.parametrize(("own", "expected"), [(None, "group"), ("mine", "mine")])
    def test_wandb(self, own: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, object] = {}

        def record(_: WandbTracker, folder: Path, **settings: object) -> None:
            given.update(settings, folder=folder)

        monkeypatch.setattr(WandbTracker, "__init__", record)
        config = WandbConfig(project="p", entity="e", group=own, tags=["t"])
        assert type(self.build(config, tmp_path)) is WandbTracker
        assert given == {
            "folder": tmp_path,
            "run_id": "id",
            "config": {"seed": 0},
            "mode": None,
            "project": "p",
            "entity": "e",
            "group": expected,
            "name": "name",
            "tags": ["t"],
        }


def test_precision_of_a_config(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.device, config.precision = Device.cpu, PrecisionConfig(PrecisionName.bf16)
    assert (build.precision(config).name, build.precision(config).device) == ("bf16", CPU)
    config.precision = PrecisionConfig(PrecisionName.fp16)
    with pytest.raises(RequestError, match=r"^precision=fp16: expected fp32 or bf16 on a CPU$"):
        build.precision(config)


def test_texts_fit_the_positions_of_the_model(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.data.max_prompt_tokens, config.data.max_completion_tokens = 100, 28
    build.check_context(config, "model", tiny_lm())  # 128 positions
    config.data.max_completion_tokens = 29
    expected = (
        r"^data\.max_prompt_tokens \+ data\.max_completion_tokens=129: expected at most the 128 positions of sft"
    )
    with pytest.raises(RequestError, match=expected):
        build.check_context(config, "sft.path", tiny_lm())


def test_longer_texts_of_supervised_fine_tuning_fit_too(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    build.check_context(config, "model", tiny_lm(), 127)  # and the token they start with
    with pytest.raises(
        RequestError, match=r"^data\.max_sft_tokens=129: expected at most the 128 positions of model"
    ):
        build.check_context(config, "model", tiny_lm(), 128)
