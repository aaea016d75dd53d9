"""The dataclasses behind every YAML: types, defaults and checks. Imports no torch.

Fields are mutable and enums matched by name because OmegaConf asks for it; a `check` method holds what types
cannot say.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING

from rlhf_cli.errors import RequestError, bad_value
from rlhf_cli.models.settings import ModelSettings, PeftSettings
from rlhf_cli.rewards.settings import MembersRm, RmInit
from rlhf_cli.rewards.term_settings import Normalize, RewardSettings
from rlhf_cli.settings import CheckpointSettings, KlSettings, TrainSettings


class Device(Enum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class PrecisionName(Enum):
    """What forward passes run in; weights stay float32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class WandbMode(Enum):
    """How W&B records."""

    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass
class PrecisionConfig:
    """Group `precision`."""

    name: PrecisionName = PrecisionName.auto


@dataclass
class SftConfig:
    """The supervised stage."""

    path: str | None = None  # run folder, model folder or hub id; null = built and cached
    seed: int = 0
    snapshots: int = 0
    peft: PeftSettings = field(default_factory=PeftSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        check_seed("sft.seed", self.seed)
        if self.snapshots < 0:
            raise bad_value("sft.snapshots", self.snapshots, "a whole number >= 0")
        self.peft.check("sft.peft")
        self.train.check("sft.train")


@dataclass
class RolloutConfig:
    """Sampling while training."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    max_new_tokens: int = 256
    max_rows: int = 512

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise bad_value("rollout.temperature", self.temperature, "a number > 0")
        if self.top_k is not None and self.top_k < 1:
            raise bad_value("rollout.top_k", self.top_k, "a whole number >= 1, or null")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise bad_value("rollout.top_p", self.top_p, "a number above 0 and up to 1, or null")
        for key in ("max_new_tokens", "max_rows"):
            if getattr(self, key) < 1:
                raise bad_value(f"rollout.{key}", getattr(self, key), "a whole number >= 1")

    def cuts(self) -> tuple[str, float] | None:
        """The key, and its value, that takes tokens out of the distribution; None where none does."""
        if self.top_k is not None:
            return "rollout.top_k", self.top_k
        if self.top_p is not None and self.top_p < 1:
            return "rollout.top_p", self.top_p
        return None


@dataclass
class ReferenceConfig:
    """What an evaluation measures differences to."""

    path: str | None = None


@dataclass
class EvalConfig:
    """How an evaluation samples and resamples."""

    num_prompts: int = 200
    samples_per_prompt: int = 1
    split: str = "test"
    temperature: float = 1.0
    num_resamples: int = 2000
    best_of_n: int = 0
    best_of_samples: int = 64

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        for key in ("num_prompts", "samples_per_prompt", "num_resamples", "best_of_samples"):
            if getattr(self, key) < 1:
                raise bad_value(f"eval.{key}", getattr(self, key), "a whole number >= 1")
        if self.best_of_n < 0:
            raise bad_value("eval.best_of_n", self.best_of_n, "a whole number >= 1, or 0 for none")
        if self.best_of_n >= self.best_of_samples:
            raise bad_value(
                "eval.best_of_samples", self.best_of_samples, f"more than eval.best_of_n={self.best_of_n}"
            )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise bad_value("eval.temperature", self.temperature, "a number > 0")


@dataclass
class LoggerConfig:
    """Group `logger`; metrics.jsonl is always written."""

    name: str = "jsonl"


@dataclass
class WandbConfig(LoggerConfig):
    """logger=wandb."""

    name: str = "wandb"
    project: str = "rlhf"
    entity: str | None = None
    group: str | None = None
    mode: WandbMode | None = None
    tags: list[str] = field(default_factory=list)


class Resume(Enum):
    """What to do with a run_dir that holds a run."""

    none = "none"
    auto = "auto"


@dataclass
class StagesConfig:
    """Stages that are built for a command which needs them."""

    auto: bool = True
    cache_dir: str = "outputs/cache"


@dataclass
class RunConfig:
    """The one tree that every command shares; a command reads the nodes it needs."""

    command: str = MISSING
    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 0
    device: Device = Device.auto
    threads: int | None = None
    resume: Resume = Resume.none
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    algo: Any = MISSING
    rm: Any = MISSING
    data: Any = MISSING
    model: ModelSettings = field(default_factory=ModelSettings)
    peft: PeftSettings = field(default_factory=PeftSettings)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    logger: Any = MISSING
    kl: KlSettings = field(default_factory=KlSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    sft: SftConfig = field(default_factory=SftConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    policies: list[str] = field(default_factory=list)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    stages: StagesConfig = field(default_factory=StagesConfig)

    def check(self) -> None:
        """Raises RequestError for impossible values, before anything has been done."""
        if not self.name.strip() or "/" in self.name:
            raise bad_value("name", self.name, "a word that tables and plots call the run by, without a slash")
        check_seed("seed", self.seed)
        if self.threads is not None and self.threads < 1:
            raise bad_value("threads", self.threads, "a whole number >= 1, or null")
        self.model.check("model")
        if self.model.encoder:
            raise bad_value(
                "model",
                self.model.name,
                "a causal language model, because an encoder writes no text "
                f"(it can be the reward model's: model@rm.model={self.model.name})",
            )
        self.peft.check("peft")
        self.data.check()
        self.sft.check()
        self.rm.check()
        self.algo.check()
        self.algo.check_others(self.kl, self.peft.name)
        self.reward.check()
        if self.command == "train-policy":
            self.algo.check_data(self.data.name, self.data.pairs_share_prompt, self.data.has_gold)
            self._check_reward()
        if isinstance(self.rm, MembersRm) and self.rm.member is not None and self.command != "train-rm":
            raise bad_value("rm.member", self.rm.member, f"null, because {self.command} needs all members")
        self.rollout.check()
        self._check_support()
        self.eval.check()
        self.checkpoint.check("checkpoint")
        self._check_lengths()
        self._check_rows()
        for stage, command in (("sft", "train-sft"), ("rm", "train-rm")):
            if self.command == command and getattr(self, stage).path is not None:
                raise bad_value(
                    f"{stage}.path", getattr(self, stage).path, f"null, because {command} trains that model"
                )
        if not self.stages.auto:
            self._check_paths()

    def asks_reward(self) -> bool:
        """Whether the policy's algorithm learns from what the node `reward` says."""
        return bool(self.algo.needs_reward_model(self.data.pairs_share_prompt))

    def needs_rm(self) -> bool:
        """Whether that is, among others, a reward model's."""
        return self.asks_reward() and self.reward.rm != 0

    def learns_from_pairs(self) -> bool:
        """Whether the policy's algorithm trains on the data's pairs."""
        return bool(self.algo.learns_from_pairs(self.data.pairs_share_prompt))

    def check_processes(self, num_processes: int) -> None:
        """Raises RequestError where a batch cannot be shared by the processes that torchrun starts."""
        if num_processes == 1:
            return
        if self.command == "eval":
            raise RequestError(f"eval runs in one process, not in {num_processes}: start it without torchrun")
        shares: dict[str, tuple[int, int]] = {}
        if self.command == "train-policy":
            counts = self.algo.shared_counts(self.data.pairs_share_prompt)
            shares |= {f"algo.{key}": value for key, value in counts.items()}
            if self.reward.normalize is Normalize.sft_samples:
                shares["reward.normalize_samples"] = (self.reward.normalize_samples, 1)
        if self.command == "train-rm" or (
            self.command == "train-policy" and self.rm.path is None and self.needs_rm()
        ):
            shares["rm.train.batch_size"] = (self.rm.train.batch_size, 1)
            shares["rm.standardize_samples"] = (self.rm.standardize_samples, 1)
        if self.command == "train-sft" or self.sft.path is None:
            shares["sft.train.batch_size"] = (self.sft.train.batch_size, 1)
        for key, (value, at_once) in shares.items():
            if value < num_processes * at_once:
                each = "" if at_once == 1 else f" x algo.k={at_once}, the samples of a prompt"
                raise bad_value(
                    key, value, f"at least the {num_processes} processes{each}, so that each has a share"
                )

    def _check_support(self) -> None:
        """Only samples that nothing is measured on may lack the less likely tokens."""
        if (cut := self.rollout.cuts()) is None:
            return
        problem = f"{self.command} samples no pairs (train-policy does, with algo=dpo algo.pairs=on_policy)"
        if self.command == "train-policy":
            problem = self.algo.support_problem(self.data.pairs_share_prompt)
        if problem is not None:
            key, value = cut
            usual = "null" if key == "rollout.top_k" else "null or 1"
            raise bad_value(key, value, f"{usual}, because {problem}")

    def _needs_sampler(self) -> bool:
        """Whether best-of-n samples from an SFT model that no policy and no key names."""
        return (
            self.command == "eval"
            and self.eval.best_of_n > 0
            and not self.policies
            and self.reference.path is None
        )

    def _check_reward(self) -> None:
        """What a policy is rewarded by is there, and is read."""
        algo, reward = self.algo.name, self.reward
        if self.rm.noise and not self.needs_rm():
            why = "because reward.rm=0" if self.asks_reward() else f"because algo={algo} asks no reward model here"
            raise bad_value("rm.noise", self.rm.noise, f"0, {why}")
        if not self.asks_reward():
            if changed := reward.changed():
                key, value, default = changed
                usual = "null" if default is None else default
                raise bad_value(key, value, f"{usual}, because algo={algo} asks no reward here")
            return
        if reward.gold and not self.data.has_gold:
            raise bad_value("reward.gold", reward.gold, f"0, because data={self.data.name} knows no true reward")
        if reward.normalize is Normalize.running and (problem := self.algo.running_scale_problem()):
            raise bad_value("reward.normalize", "running", f"none or sft_samples, because {problem}")

    def _check_rows(self) -> None:
        """A source without training rows can only be measured on."""
        if not self.data.evaluation_only:
            return
        if self.command != "eval":
            raise bad_value("data", self.data.name, f"data with rows to train on, because this is {self.command}")
        if self.rm.path is None and not self.policies:
            raise bad_value(
                "rm.path", None, f"a reward model to measure: data={self.data.name} has no rows to train one"
            )
        if self._needs_sampler() and self.sft.path is None:
            raise bad_value(
                "eval.best_of_n",
                self.eval.best_of_n,
                "0, or a model to sample from (sft.path or reference.path): "
                f"data={self.data.name} has no rows to train one",
            )

    def _check_lengths(self) -> None:
        if self.rollout.max_new_tokens > self.data.max_completion_tokens:
            raise bad_value(
                "rollout.max_new_tokens",
                self.rollout.max_new_tokens,
                f"at most data.max_completion_tokens={self.data.max_completion_tokens}, the longest that is trained on",
            )
        needed, keys = self.data.longest_row()
        for where, model in self._built():
            if model.path is None and needed > model.max_positions:
                raise bad_value(
                    f"{where}.max_positions",
                    model.max_positions,
                    f"at least {keys} = {needed}",
                )

    def _built(self) -> list[tuple[str, ModelSettings]]:
        """The backbones that this command trains a model from; those of given models are not looked at."""
        measures_rm = self.command == "eval" and not self.policies  # else the one behind the first policy
        trains_rm = self.command == "train-rm" or (
            self.rm.path is None and (measures_rm or (self.command == "train-policy" and self.needs_rm()))
        )
        trains_sft = self.command == "train-sft" or (
            self.sft.path is None and (trains_rm or self.command == "train-policy" or self._needs_sampler())
        )
        found = [("model", self.model)] if trains_sft else []
        # from a given SFT model it starts unless it is told otherwise
        if trains_rm and (self.sft.path is None or self.rm.init is RmInit.backbone):
            found.append(("rm.model", self.rm.model))
        return found

    def _check_paths(self) -> None:
        measures_rm = () if self.policies else ("rm",)  # else the one behind the first policy
        if self._needs_sampler():
            measures_rm = (*measures_rm, "sft")
        policy = ("sft", "rm") if self.command == "train-policy" and self.needs_rm() else ("sft",)
        needs = {"train-sft": (), "train-rm": ("sft",), "train-policy": policy, "eval": measures_rm}
        for stage in needs[self.command]:
            if getattr(self, stage).path is None:
                raise RequestError(
                    f"{stage}.path=null: expected a path, because stages.auto=false builds no missing stage"
                )


def check_seed(key: str, seed: int) -> None:
    """Seeds key 64-bit counters."""
    if not 0 <= seed < 2**63:
        raise bad_value(key, seed, "a whole number >= 0, below 2^63")


def check_no_extra_keys(node: Any, where: str = "") -> None:
    """Raises RequestError for a key that no schema has: Hydra's `+key=value` adds it past the types."""
    known = [field.name for field in fields(node)]
    for name in vars(node):
        key = f"{where}{name}"
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {where}{near[0]}?)" if near else ""
            place = where.rstrip(".") or "the top level"
            raise RequestError(f"{key}={getattr(node, name)}: unknown key{hint}; {place} has {', '.join(known)}")
        if is_dataclass(getattr(node, name)):
            check_no_extra_keys(getattr(node, name), f"{key}.")
