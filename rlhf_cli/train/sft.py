"""Supervised fine-tuning: next-token cross-entropy on the completion tokens."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.rows import rows_of_epochs
from rlhf_cli.data.tokenise import TokenPair, collate
from rlhf_cli.files import write_folder_atomic
from rlhf_cli.models.adapters import Adapter, save_trained
from rlhf_cli.models.causal import token_logprobs
from rlhf_cli.models.recompute import recomputing
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.loop import Evaluation, StepBatch, Task
from rlhf_cli.train.micro_batches import micro_batches
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import batch_places
from rlhf_cli.types import LossOutput, Sequences


@dataclass(frozen=True)
class Snapshots:
    """Models that are kept on the way: reward models that are averaged may start from them."""

    folder: Path
    steps: Container[int] = ()  # after which steps, from 1

    def path(self, step: int) -> Path:
        """Of the model after a step; names sort by step."""
        return self.folder / f"step-{step:08d}"


def snapshot_steps(num_steps: int, number: int) -> list[int]:
    """After which steps a model is kept: `number` of them, evenly, the end not among them; fewer in a short run.

    >>> snapshot_steps(100, 3)
    [25, 50, 75]
    """
    return sorted({round(num_steps * i / (number + 1)) for i in range(1, number + 1)} - {0, num_steps})


class SftTask(Task):
    """loss = -(1/n) sum over completion tokens of log pi(y_t|x, y_<t), n = completion tokens of the step."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[TokenPair],
        validation: Sequence[TokenPair],
        settings: TrainSettings,
        precision: Precision,
        seed: int,
        world: World = ALONE,
        adapter: Adapter | None = None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.model: PreTrainedModel = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.validation = validation
        self.settings = settings
        self.precision = precision
        self.seed = seed
        self.world = world
        self.adapter = adapter
        self.snapshots = snapshots
        self._step = 0

    def batch(self, step: int) -> StepBatch:
        """This process' rows of a step, as a function of the step alone."""
        self.model.train()
        self._step = step
        size = self.settings.batch_size
        mine = self.world.share(size)
        epochs, places = batch_places(self.seed, step, size, len(self.rows))
        chosen = rows_of_epochs(self.rows, epochs[mine], places[mine])
        micro = self._collated(chosen)
        return StepBatch(
            micro_batches=micro,
            normaliser=float(sum(int(part.completion_mask.sum()) for part in micro)),
            num_samples=len(chosen),
            num_tokens=sum(int(part.attention_mask.sum()) for part in micro),
        )

    def loss(self, micro_batch: Sequences, normaliser: float) -> LossOutput:
        """Cross-entropy per completion token."""
        with recomputing(self.model):
            tokens = token_logprobs(self.model, micro_batch)
        return LossOutput(
            loss=-masked_sum(tokens.logprob, tokens.mask).sum() / normaliser,
            metrics={"entropy": tokens.sum_entropy() / normaliser},
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Cross-entropy and perplexity on the validation rows."""
        self.model.eval()
        total, count = 0.0, 0
        for part in self._collated(self.validation[self.world.share(len(self.validation))]):
            with self.precision.autocast():
                tokens = token_logprobs(self.model, part)
            total -= float(masked_sum(tokens.logprob, tokens.mask).sum())
            count += int(tokens.mask.sum())
        total, num_tokens = self.world.sum([total, count])
        loss = total / num_tokens
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 700.0))}, score=-loss)

    def after_step(self) -> None:
        """Keeps the model where this step is one of those."""
        step = self._step + 1
        if self.snapshots is not None and step in self.snapshots.steps and self.world.is_main:
            write_folder_atomic(self.save, self.snapshots.path(step))

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        save_trained(self.model, self.tokenizer, folder, self.adapter)

    def _collated(self, rows: Sequence[TokenPair]) -> list[Sequences]:
        chosen = [rows[i] for i in range(len(rows))]
        return [
            collate(chosen[part], int(self.tokenizer.pad_token_id)).to(self.precision.device)
            for part in micro_batches(
                [len(prompt) + len(completion) for prompt, completion in chosen], self.settings
            )
        ]
