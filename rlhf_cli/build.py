"""Config dataclasses to objects. Explicit matches: config never names a Python object to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.base import ActorCriticAlgorithm, Algorithm, ValueHead
from rlhf_cli.config.schema import (
    LoggerConfig,
    RunConfig,
    WandbConfig,
)
from rlhf_cli.data import reviews
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.data.helpsteer2 import load_helpsteer2
from rlhf_cli.data.hh_rlhf import load_hh_rlhf
from rlhf_cli.data.imdb import load_imdb
from rlhf_cli.data.jsonl import load_jsonl
from rlhf_cli.data.rewardbench import load_rewardbench
from rlhf_cli.data.settings import (
    DataSettings,
    HelpSteer2Settings,
    HhRlhfSettings,
    ImdbSettings,
    JsonlSettings,
    ReviewsSettings,
    RewardBenchSettings,
    TldrSettings,
)
from rlhf_cli.data.tldr import load_tldr
from rlhf_cli.data.tokenise import plain_chat
from rlhf_cli.errors import bad_value
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.bottleneck import add_bottleneck
from rlhf_cli.models.critic import Critic, SeparateCritic, SharedCritic
from rlhf_cli.models.last_layer import freeze_below_last_layer
from rlhf_cli.models.loading import (
    build_tiny,
    classifier_from_lm,
    load_backbone_as_classifier,
    load_causal_lm,
    max_positions,
    resolve_path,
)
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.settings import ModelSettings, PeftSettings
from rlhf_cli.models.tokenizer import train_tokenizer
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.settings import Grades, RmConfig, RmInit
from rlhf_cli.train.distributed import ALONE, World, own_device
from rlhf_cli.train.precision import Precision, resolve_device, resolve_precision
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.train.tracking import NullTracker, TensorBoardTracker, Tracker, WandbTracker
from rlhf_cli.types import Prompt

# The validation prompts are taken from the training prompts; this many stay.
_MIN_TRAINING_PROMPTS = 8


def precision(config: RunConfig, world: World = ALONE) -> Precision:
    """Device and numerics of this process. Raises RequestError where the machine has no such device."""
    device = own_device(resolve_device(config.device.value), world)
    return resolve_precision(config.precision.name.value, device)


def dataset(settings: DataSettings, num_validation_prompts: int) -> Dataset:
    """The rows of a source.

    Args:
        settings: which source, and its settings.
        num_validation_prompts: prompts that steer policy training, taken from the training side.
    """
    match settings:
        case ReviewsSettings():
            return _reviews(settings, num_validation_prompts)
        case HelpSteer2Settings():
            return load_helpsteer2(settings)
        case HhRlhfSettings():
            return load_hh_rlhf(settings)
        case ImdbSettings():
            return load_imdb(settings)
        case JsonlSettings():
            return load_jsonl(settings)
        case RewardBenchSettings():
            return load_rewardbench(settings)
        case TldrSettings():
            return load_tldr(settings)
        case _:
            raise AssertionError(f"no source for {type(settings).__name__}")


def _reviews(settings: ReviewsSettings, num_validation_prompts: int) -> Dataset:
    spec = settings.spec()
    train_prompts = reviews.prompts(spec, "train")
    held_out = min(num_validation_prompts, len(train_prompts) - _MIN_TRAINING_PROMPTS)
    if held_out < 1:
        raise bad_value("data.num_prompts", settings.num_prompts, f"at least {_MIN_TRAINING_PROMPTS + 1}")
    validation_prompts = train_prompts[-held_out:]
    seen_again = set(validation_prompts)  # openings are drawn with replacement
    return Dataset(
        name=settings.name,
        sft=reviews.sft_examples(spec, "train"),
        sft_validation=reviews.sft_examples(spec, "validation"),
        pairs=reviews.preference_pairs(spec, "train"),
        pairs_validation=reviews.preference_pairs(spec, "validation"),
        pairs_test={split: reviews.preference_pairs(spec, split) for split in ("test", "ood")},
        prompts=[prompt for prompt in train_prompts[:-held_out] if prompt not in seen_again],
        prompts_validation=validation_prompts,
        prompts_test={split: reviews.prompts(spec, split) for split in ("test", "ood")},
        max_prompt_tokens=settings.max_prompt_tokens,
        max_completion_tokens=settings.max_completion_tokens,
        gold=_gold_reward,
    )


def _gold_reward(prompt: Prompt, completion: str) -> float:
    return reviews.gold_reward(prompt if isinstance(prompt, str) else plain_chat(prompt), completion)


def backbone(
    key: str, settings: ModelSettings, seed: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The language model that supervised fine-tuning starts from: loaded, or built from its sizes."""
    if settings.path is not None:
        return load_causal_lm(f"{key}.path", resolve_path(f"{key}.path", settings.path), device)
    # The corpus' default rows, whatever data is used: one tokenizer for all runs of one vocabulary size
    corpus = reviews.sft_examples(reviews.ReviewsSpec(), "train")
    texts = (f"{example.prompt}{example.completion}" for example in corpus)
    tokenizer = train_tokenizer(texts, settings.vocab_size)
    return build_tiny(settings, tokenizer, derive_seed(seed, "weights")).to(device), tokenizer


def adapter(
    key: str, settings: PeftSettings, model: PreTrainedModel, base: str | None, seed: int
) -> Adapter | None:
    """The adapter that a stage trains; None where it trains weights of the model itself, all or the last layer's.

    Args:
        key: of the settings.
        settings: group `peft`.
        model: gets the adapter, or is frozen in part, in place.
        base: what `model` was loaded from; None where it starts from scratch: then there is nothing to adapt.
        seed: of the stage.
    """
    if settings.name == "none" or base is None:
        return None
    match settings.name:
        case "lora":
            return add_lora(key, model, settings, base, derive_seed(seed, "lora"))
        case "adapter":
            return add_bottleneck(key, model, settings, base, derive_seed(seed, "adapter"))
        case "last_layer":
            freeze_below_last_layer(key, model)
            return None
        case _:
            raise AssertionError(f"no adapter {settings.name}")


def starts_from_sft(config: RunConfig) -> bool:
    """Whether the reward model starts from the SFT model's weights; its own backbone otherwise."""
    if config.rm.init is not RmInit.auto:
        return config.rm.init is RmInit.sft
    return _same_backbone(config.rm.model, config.model)


def _same_backbone(one: ModelSettings, other: ModelSettings) -> bool:
    """Whether two settings mean the same starting weights; names and learning rates do not change them."""
    if one.path is not None or other.path is not None:
        return one.path == other.path
    return replace(one, name=other.name, lr=other.lr) == other


def rm_base(config: RunConfig, sft_path: str) -> str | None:
    """What a reward model's backbone is loaded from; None where it starts from scratch."""
    return sft_path if starts_from_sft(config) else config.rm.model.path


def new_reward_model(config: RunConfig, sft_path: str, device: torch.device, seed: int) -> RewardModel:
    """A reward model before training: a backbone under a fresh head, which is a function of the stage's seed."""
    rm: RmConfig = config.rm
    head_seed = derive_seed(seed, "head")
    if starts_from_sft(config):
        model, tokenizer = load_backbone_as_classifier("sft.path", sft_path, device, head_seed, rm.num_labels)
    elif rm.model.path is not None:
        path = resolve_path("rm.model.path", rm.model.path)
        model, tokenizer = load_backbone_as_classifier("rm.model.path", path, device, head_seed, rm.num_labels)
    else:
        language_model, tokenizer = backbone("rm.model", rm.model, seed, device)
        model = classifier_from_lm(language_model, head_seed, rm.num_labels)
    return RewardModel(model, tokenizer, reward_format(config))


def scalar_format(config: RunConfig) -> RewardFormat:
    """How a reward model with one output reads text, on its own scale; one from elsewhere, too."""
    return RewardFormat(
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_completion_tokens=config.data.max_completion_tokens,
        append_eos=config.rm.append_eos,
        is_one_text=isinstance(config.data, ImdbSettings),
    )


def reward_format(config: RunConfig) -> RewardFormat:
    """How a reward model reads text and is read out while it learns; nothing that is fitted after it."""
    rm: RmConfig = config.rm
    if rm.num_labels == 1:
        return scalar_format(config)
    assert isinstance(rm, Grades)
    return replace(
        scalar_format(config),
        grade_loss=rm.loss.value,
        read_out=rm.read_out.value,
        std_weight=rm.std_weight,
        cvar_alpha=rm.cvar_alpha,
    )


def critic(algo: Algorithm, policy: PreTrainedModel, sft_path: str, seed: int) -> Critic | None:
    """The critic that an algorithm asks for; None where it has no use for one."""
    if not isinstance(algo, ActorCriticAlgorithm):
        return None
    if algo.value_head is ValueHead.shared:
        return SharedCritic(policy)
    backbone, _ = load_backbone_as_classifier("sft.path", sft_path, policy.device, derive_seed(seed, "critic"))
    return SeparateCritic(backbone)


def tracker(
    config: LoggerConfig,
    run_dir: Path,
    run_id: str,
    resumed_from: int | None,
    name: str,
    group: str | None,
    flat: Mapping[str, object],
) -> Tracker:
    """The tracker that `logger=` names.

    Args:
        config: group `logger`.
        run_dir: where local files go.
        run_id: the same over resumes.
        resumed_from: the step that a resumed run continues after; None for a new run.
        name: shown for the run.
        group: what the jobs of a sweep share, where the config sets none.
        flat: the run's config, for display.
    """
    match config:
        case WandbConfig():
            return WandbTracker(
                run_dir,
                run_id=run_id,
                config=flat,
                mode=None if config.mode is None else config.mode.value,
                project=config.project,
                entity=config.entity,
                group=config.group or group,
                name=name,
                tags=config.tags,
            )
        case LoggerConfig(name="tensorboard"):
            return TensorBoardTracker(run_dir, config=flat, resumed_from=resumed_from)
        case _:
            return NullTracker()


def check_context(config: RunConfig, key: str, model: PreTrainedModel, max_completion_tokens: int = 0) -> None:
    """Prompt and completion fit the model's positions. Raises RequestError where they do not.

    Args:
        config: of the run.
        key: of the model.
        model: has the positions.
        max_completion_tokens: of this stage, where it has a cap of its own that is higher than the data's.
    """
    limit = max_positions(model)
    needed = config.data.max_prompt_tokens + config.data.max_completion_tokens
    keys = "data.max_prompt_tokens + data.max_completion_tokens"
    if max_completion_tokens > config.data.max_completion_tokens:
        keys, needed = "data.max_sft_tokens", max(needed, max_completion_tokens + 1)
    if limit is not None and needed > limit:
        raise bad_value(keys, needed, f"at most the {limit} positions of {key}")
