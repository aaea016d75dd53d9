"""A policy of a few thousand parameters, what it is trained by, and a run of a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.base import ActorCriticAlgorithm, OnlineAlgorithm, ValueHead
from rlhf_cli.algos.rloo import Rloo
from rlhf_cli.models.critic import Critic, SeparateCritic, SharedCritic
from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.rollout.engine import Sampling
from rlhf_cli.settings import Schedule, TrainSettings
from rlhf_cli.train.loop import Task, fit
from rlhf_cli.train.policy import PolicyTask, RewardFunction
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import PolicyBatch, Rollout, Scores

FP32 = Precision("fp32", torch.device("cpu"))
PROMPTS = tuple(" ".join(f"t{(5 * i + j) % 20 + 2}" for j in range(1 + 3 * i % 7)) for i in range(10))
MAX_NEW, N = 6, 8
STOPS = [1, 4, 13]  # likely enough for completions of all lengths


def some_reward(rollout: Rollout) -> Scores:
    """Some function of the tokens, of mean about 0."""
    raw = torch.tensor([float(sum(ids) % 11) for ids in rollout.completion_ids])
    return Scores(reward=(raw - 5) / 3, raw=raw)


def constant_reward(rollout: Rollout) -> Scores:
    return Scores(reward=torch.full((len(rollout),), 0.1), raw=torch.zeros(len(rollout)))


def make_critic(algorithm: OnlineAlgorithm, model: PreTrainedModel, head_std: float) -> Critic | None:
    """What the algorithm asks for; its head, which is 0 in a real run's beginning, with weights of that size."""
    if not isinstance(algorithm, ActorCriticAlgorithm):
        return None
    critic: Critic
    if algorithm.value_head is ValueHead.shared:
        critic = SharedCritic(model)
    else:
        critic = SeparateCritic(classifier_from_lm(copy.deepcopy(model), seed=1))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in critic.head.parameters():
            parameter.copy_(head_std * torch.randn(parameter.shape, generator=generator))
    return critic.train()  # the task has to switch dropout off


def policy_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    algorithm: OnlineAlgorithm | None = None,
    reward: RewardFunction = some_reward,
    gold: Callable[..., float] | None = None,
    temperature: float = 1.0,
    head_std: float = 0.0,
    more: dict[str, Any] | None = None,
    **settings: Any,
) -> PolicyTask:
    """`more` goes to the task, `settings` to the algorithm's `train`."""
    model.generation_config.eos_token_id = STOPS
    defaults: dict[str, Any] = {
        "batch_size": N,
        "lr": 1e-2,
        "schedule": Schedule.constant,
        "warmup_ratio": 0.0,
    }
    algorithm = replace(algorithm or Rloo(k=2, beta=0.1), train=TrainSettings(**{**defaults, **settings}))
    return PolicyTask(
        model,
        copy.deepcopy(model),
        tokenizer,
        algorithm,
        reward,
        gold,
        PROMPTS,
        PROMPTS[:4],
        16,
        Sampling(MAX_NEW, temperature),
        FP32,
        seed=3,
        critic=make_critic(algorithm, model, head_std),
        **(more or {}),
    )


def completions(batch: PolicyBatch) -> list[list[int]]:
    """Tokens of each completion."""
    counts = batch.sequences.completion_mask
    return [row[mask].tolist() for row, mask in zip(batch.sequences.ids, counts, strict=True)]


class Rows(list[dict[str, Any]]):
    """Keeps the rows of metrics.jsonl."""

    def metrics(self, step: int, row: Any) -> None:
        self.append(row)

    def samples(self, step: int, rows: Any) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def train(task: Task, folder: Path, num_steps: int) -> Rows:
    folder.mkdir(exist_ok=True)
    rows = Rows()
    fit(task, task.settings, num_steps, folder, rows, FP32, seed=3)
    return rows
