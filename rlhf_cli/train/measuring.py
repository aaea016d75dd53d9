"""What a policy's samples on held-out prompts come to: the same figures for every way of training one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.models.causal import LanguageModel, full_kls
from rlhf_cli.rewards.terms import gold_rewards
from rlhf_cli.rollout.engine import Engine, Sampling
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import World
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Prompt, Rollout, Scores


@dataclass(frozen=True)
class HeldOut:
    """What policies are asked while they learn, and with which noise."""

    prompts: Sequence[Prompt]
    max_prompt_tokens: int
    sampling: Sampling
    seed: int  # of the noise: the same one gives the same samples to the same policy


@torch.no_grad()
def measure(
    engine: Engine,
    reference: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: Callable[[Rollout], Scores] | None,
    gold: GoldReward | None,
    held_out: HeldOut,
    settings: TrainSettings,
    precision: Precision,
    world: World,
) -> dict[str, Tensor]:
    """One sample of the engine's policy for each prompt, in shares of the processes: float32 [prompts], on the CPU.

    Figures by name: full KL to the reference (nats), length, whether it was cut and, where they are given, gold reward
    and reward with its parts.
    """
    mine = world.share(len(held_out.prompts))
    index = range(len(held_out.prompts))[mine]
    batch = prompt_batch(tokenizer, held_out.prompts[mine], index, held_out.max_prompt_tokens)
    with precision.autocast():
        rollout = engine.generate(tokenizer, batch, 1, held_out.sampling, held_out.seed, 0)
        kl = full_kls(
            engine.model,
            reference,
            rollout.sequences,
            held_out.sampling.temperature,
            settings.rows_of_pass,
            settings.micro_batch_tokens,
        )
    columns = {"kl": kl, **lengths(rollout)}
    if reward is not None:
        scores = reward(rollout)
        columns |= {"reward": scores.reward, **parts_of_reward(scores)}
    if gold is not None:
        columns["gold"] = gold_rewards(gold, rollout)
    return of_all(columns, world)


_LENGTHS = {"length": "length/mean", "truncated": "length/truncated_frac"}
# What a figure's mean is called among the metrics.
_METRICS = {"reward": "reward/mean", "gold": "gold/mean", "kl": "kl/full", **_LENGTHS}


def means(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Metrics of a run: the mean of each figure."""
    return {metric_of(name): float(column.mean()) for name, column in columns.items()}


def metric_of(name: str) -> str:
    """What the mean of a figure of `measure` is called; those of a reward's parts have their metric's name."""
    return _METRICS.get(name, name)


def length_metrics(columns: Mapping[str, Tensor]) -> dict[str, float]:
    """Those of `lengths`."""
    return {metric: float(columns[name].mean()) for name, metric in _LENGTHS.items()}


def lengths(rollout: Rollout, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Completion tokens, and whether the length limit cut them, float32 [n]."""
    tokens = torch.tensor([len(ids) for ids in rollout.completion_ids[rows]], dtype=torch.float32)
    return {"length": tokens, "truncated": rollout.truncated[rows].float()}


def parts_of_reward(scores: Scores, rows: slice = slice(None)) -> dict[str, Tensor]:
    """What there is to tell of a reward beside itself, by metric, float32 [n]: terms, disagreement, clip."""
    parts = {f"reward/{name}": term[rows] for name, term in scores.terms.items()}
    if scores.disagreement is not None:
        parts["reward/disagreement"] = scores.disagreement[rows]
    if scores.clipped is not None:
        parts["reward/clipped"] = scores.clipped[rows]
    return parts


def of_all(columns: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Columns float32 [n] of this process' rows to those of all processes' rows, on the CPU."""
    table = torch.stack([column.float().cpu() for column in columns.values()], dim=1)
    return dict(zip(columns, world.gather(table).T.contiguous(), strict=True))
