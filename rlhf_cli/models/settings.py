"""Settings of a backbone: the part of the config that model loading reads. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlhf_cli.errors import bad_choice, bad_value

# Names the members of a folder of several models.
INDEX_FILE = "ensemble.json"


@dataclass
class LearningRates:
    """Learning rates that suit the backbone, by stage; algo.train.lr and its like default to them."""

    sft: float = 2e-5
    rm: float = 1e-5
    policy: float = 1e-6
    dpo: float = 1e-6


@dataclass
class ModelSettings:
    """A backbone: a folder or hub id to load, or the sizes of a small Llama to build."""

    name: str = "tiny"
    path: str | None = None  # local folder, run folder or hub id; null = built from the sizes below
    encoder: bool = False  # its tokens see what follows them: for reward models alone
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 384
    vocab_size: int = 1024  # upper limit of the tokenizer trained on the embedded corpus
    max_positions: int = 256  # longest prompt + completion, in tokens
    lr: LearningRates = field(default_factory=LearningRates)

    def check(self, where: str) -> None:
        """Raises RequestError for impossible sizes; `where` is the key prefix."""
        if self.path is None and self.name != "tiny":
            raise bad_value(f"{where}.path", None, "a local folder or hub id")
        if self.path is None and self.encoder:
            raise bad_value(f"{where}.encoder", self.encoder, "false, because the model built here is a Llama")
        for key in ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions"):
            if getattr(self, key) < 1:
                raise bad_value(f"{where}.{key}", getattr(self, key), "a whole number >= 1")
        if self.hidden_size % (2 * self.num_heads):
            raise bad_value(
                f"{where}.hidden_size",
                self.hidden_size,
                f"a multiple of 2 * {where}.num_heads={self.num_heads}",
            )
        if self.vocab_size < 300:
            raise bad_value(f"{where}.vocab_size", self.vocab_size, "at least 300 (256 bytes, specials, merges)")


@dataclass
class PeftSettings:
    """Which weights a stage trains: all of them, those of an adapter, or those of the last block and the head."""

    name: str = "none"  # none | lora | adapter | last_layer
    r: int = 16  # rank
    alpha: float = 32.0  # the adapter counts alpha / r
    dropout: float = 0.0  # of the adapter's input, in stages that train with dropout (not in policy training)
    # names of layers, or "all-linear": every linear layer but the head; not a typed list, which could not be
    # "as the policy's" in a config
    target_modules: Any = "all-linear"
    variant: str = (
        "residual"  # of a bottleneck adapter: residual, beside each block's MLP, or replace, in its place
    )
    bottleneck: int = 64  # its inner width

    def used(self) -> dict[str, Any]:
        """The settings that the chosen kind uses; the others change nothing."""
        keys = {"lora": ("r", "alpha", "dropout", "target_modules"), "adapter": ("variant", "bottleneck")}
        return {key: getattr(self, key) for key in ("name", *keys.get(self.name, ()))}

    def check(self, where: str) -> None:
        """Raises RequestError for impossible values; `where` is the key prefix."""
        if self.name not in ("none", "lora", "adapter", "last_layer"):
            raise bad_value(f"{where}.name", self.name, "none, lora, adapter or last_layer")
        if self.variant not in ("residual", "replace"):
            raise bad_choice(f"{where}.variant", self.variant, ("residual", "replace"))
        if self.bottleneck < 1:
            raise bad_value(f"{where}.bottleneck", self.bottleneck, "a whole number >= 1")
        if self.r < 1:
            raise bad_value(f"{where}.r", self.r, "a whole number >= 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise bad_value(f"{where}.alpha", self.alpha, "a number > 0")
        if not 0.0 <= self.dropout < 1.0:
            raise bad_value(f"{where}.dropout", self.dropout, "a number from 0 to below 1")
        names = self.target_modules
        is_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
        if not is_list and names != "all-linear":
            raise bad_value(
                f"{where}.target_modules", names, "all-linear, or names of layers, e.g. [q_proj,v_proj]"
            )
