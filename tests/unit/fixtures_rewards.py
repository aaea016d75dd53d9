"""Small reward models of each kind: over grades, with an adapter, several as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fixtures_models import byte_tokenizer, distilbert, gpt2_lm, reward_model, tiny_lm
from transformers import DistilBertForSequenceClassification

from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.models.lora import Lora, add_lora
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rewards.ensemble import EnsembleRewardModel
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.settings import GradeLoss
from rlhf_cli.types import Preference

GRADES = 5

PROMPTS = ["the film ", "a ", "the plot is ", "the ", "funny "]
COMPLETIONS = ["was good .", "warm , funny story !", "bad and slow .", "x", "plot is bad , the film was good !"]

# One word tells the two sides apart: a head alone can learn it.
SEPARABLE = [
    Preference(prompt, f"{subject} good .", f"{subject} bad .")
    for prompt in ("the ", "a ", "funny ")
    for subject in ("film was", "story is", "plot is", "warm story was")
]


def graded_model(kind: str = "llama", seed: int = 0, labels: int = GRADES, **changes: Any) -> RewardModel:
    """An untrained one over grades."""
    single = reward_model(kind, seed, **{"grade_loss": GradeLoss.half_tie.value, **changes})
    if kind == "distilbert":
        config = distilbert(single.tokenizer).config
        config.num_labels = labels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return replace(single, model=DistilBertForSequenceClassification(config).eval())
    lm = tiny_lm(seed) if kind == "llama" else gpt2_lm(byte_tokenizer(), seed)
    return replace(single, model=classifier_from_lm(lm, seed + 1, labels))


def any_model(kind: str, labels: int, seed: int = 0, **changes: Any) -> RewardModel:
    """Scalar with one label, else over grades."""
    return reward_model(kind, seed, **changes) if labels == 1 else graded_model(kind, seed, labels, **changes)


def with_lora(reward: RewardModel, seed: int = 1) -> Lora:
    """An adapter inside the model, with weights as if it had been trained."""
    adapter = add_lora("rm.peft", reward.model, PeftSettings(name="lora", r=2, alpha=4.0), "base", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in reward.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


def ensemble_of(members: Sequence[RewardModel], penalty: float = 0.0, **changes: Any) -> EnsembleRewardModel:
    """The members as one, none of them centred; `changes` go to the format of the whole."""
    return EnsembleRewardModel(
        members, replace(members[0].format, **changes), [0.0] * len(members), [1.0] * len(members), penalty
    )


def save_all(members: Sequence[RewardModel], folder: Path) -> list[Path]:
    """A folder for each."""
    folders = [folder / f"one-{i}" for i in range(len(members))]
    for member, place in zip(members, folders, strict=True):
        member.save(place)
    return folders


def marginal_entropy(marginal: torch.Tensor) -> torch.Tensor:
    """H = -sum_k p_k log p_k of a mean distribution over grades [K], nats."""
    return -torch.xlogy(marginal, marginal).sum()
