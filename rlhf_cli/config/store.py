"""Registers the schema dataclasses with Hydra, so that YAML files can be checked against them."""

from __future__ import annotations

from functools import cache

from hydra.core.config_store import ConfigStore

from rlhf_cli.algos.registry import algorithms
from rlhf_cli.config import schema
from rlhf_cli.data.settings import (
    HelpSteer2Settings,
    HhRlhfSettings,
    ImdbSettings,
    JsonlSettings,
    ReviewsSettings,
    RewardBenchSettings,
    TldrSettings,
)
from rlhf_cli.models.settings import ModelSettings, PeftSettings
from rlhf_cli.rewards.settings import DistributionalRm, EnsembleRm, ScalarRm, WarmRm

_SCHEMAS: dict[str, dict[str, type]] = {
    "schema": {"run": schema.RunConfig},
    "schema/algo": dict(algorithms()),
    "schema/rm": {
        "scalar": ScalarRm,
        "distributional": DistributionalRm,
        "warm": WarmRm,
        "ensemble": EnsembleRm,
    },
    "schema/data": {
        "reviews": ReviewsSettings,
        "jsonl": JsonlSettings,
        "helpsteer2": HelpSteer2Settings,
        "hh-rlhf": HhRlhfSettings,
        "imdb": ImdbSettings,
        "tldr": TldrSettings,
        "rewardbench": RewardBenchSettings,
    },
    "schema/model": {"model": ModelSettings},
    "schema/peft": {"peft": PeftSettings},
    "schema/precision": {"precision": schema.PrecisionConfig},
    "schema/logger": {
        "jsonl": schema.LoggerConfig,
        "tensorboard": schema.LoggerConfig,
        "wandb": schema.WandbConfig,
    },
}


@cache  # the jobs of a sweep ask for it again
def register() -> None:
    """Makes the schemas known under the group `schema`; harmless when repeated."""
    store = ConfigStore.instance()
    for group, nodes in _SCHEMAS.items():
        for name, node in nodes.items():
            store.store(group=group, name=name, node=node, provider="rlhf")
