"""Training a scalar reward model on pairs, and the scale it is reported in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_cli.data.rows import mapped, rows_of_epochs
from rlhf_cli.data.tokenise import TokenPair, collate_pairs
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.recompute import recomputing
from rlhf_cli.ops.preference_losses import bradley_terry_loss, wins
from rlhf_cli.rewards.model import RewardModel, score_sequences
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.loop import Evaluation, StepBatch, Task
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import batch_places
from rlhf_cli.types import LossOutput, Preference, PreferenceBatch, Sequences

EncodedPair = tuple[TokenPair, TokenPair, float]  # chosen, rejected, margin


def encode(reward_model: RewardModel, pairs: Sequence[Preference]) -> Sequence[EncodedPair]:
    """Ids of each pair, in the reward model's own text format; of many pairs they are made when they are read."""

    def encode_pair(pair: Preference) -> EncodedPair:
        return (
            reward_model.encode(pair.prompt, pair.chosen),
            reward_model.encode(pair.prompt, pair.rejected),
            pair.margin,
        )

    return mapped(pairs, encode_pair)


class RewardTask(Task):
    """loss = -(1/n) sum log sigmoid(r+ - r-), n = pairs of the step; margins on request."""

    def __init__(
        self,
        reward_model: RewardModel,
        pairs: Sequence[EncodedPair],
        validation: Sequence[EncodedPair],
        settings: TrainSettings,
        precision: Precision,
        seed: int,
        use_margin: bool,
        world: World = ALONE,
        adapter: Adapter | None = None,
    ) -> None:
        self.reward_model = reward_model
        self.model: PreTrainedModel = reward_model.model
        self.pairs = pairs
        self.validation = validation
        self.settings = settings
        self.precision = precision
        self.seed = seed
        self.use_margin = use_margin
        self.world = world
        self.adapter = adapter

    def batch(self, step: int) -> StepBatch:
        """This process' pairs of a step, as a function of the step alone."""
        self.model.train()
        size = self.settings.batch_size
        mine = self.world.share(size)
        epochs, places = batch_places(self.seed, step, size, len(self.pairs))
        chosen = rows_of_epochs(self.pairs, epochs[mine], places[mine])
        micro = self._collated(chosen)
        return StepBatch(
            micro_batches=micro,
            normaliser=float(len(chosen)),
            num_samples=2 * len(chosen),
            num_tokens=sum(
                int(part.chosen.attention_mask.sum() + part.rejected.attention_mask.sum()) for part in micro
            ),
        )

    def loss(self, micro_batch: PreferenceBatch, normaliser: float) -> LossOutput:
        """Bradley-Terry loss of the pairs."""
        with recomputing(self.model):
            chosen, rejected = self._rewards(micro_batch)
        margin = micro_batch.margin if self.use_margin else None
        difference = (chosen - rejected).detach()
        return LossOutput(
            loss=bradley_terry_loss(chosen, rejected, normaliser, margin),
            metrics={
                "rm/accuracy": wins(difference) / normaliser,
                "rm/margin": difference.sum() / normaliser,
            },
        )

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Loss, accuracy and margin on the validation pairs."""
        self.model.eval()
        count = float(len(self.validation))
        loss = correct = margin = 0.0
        for part in self._collated(self.validation[self.world.share(len(self.validation))]):
            with self.precision.autocast():
                chosen, rejected = self._rewards(part)
            loss += float(bradley_terry_loss(chosen, rejected, count))
            correct += float(wins(chosen - rejected)) / count
            margin += float((chosen - rejected).sum()) / count
        loss, correct, margin = self.world.sum([loss, correct, margin])
        return Evaluation({"loss": loss, "rm/accuracy": correct, "rm/margin": margin}, score=-loss)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        self.reward_model.save(folder, self.adapter)

    def _rewards(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        # one pass for both, so that dropout and padding treat them alike
        both = Sequences(
            torch.cat([batch.chosen.ids, batch.rejected.ids]),
            torch.cat([batch.chosen.attention_mask, batch.rejected.attention_mask]),
            torch.cat([batch.chosen.completion_mask, batch.rejected.completion_mask]),
        )
        scores = score_sequences(self.model, both).float()
        return scores[: len(batch)], scores[len(batch) :]

    def _collated(self, pairs: Sequence[EncodedPair]) -> list[PreferenceBatch]:
        size = self.settings.micro_batch_size or self.settings.batch_size
        parts = []
        for start in range(0, len(pairs), size):
            chosen, rejected, margin = zip(*pairs[start : start + size], strict=True)
            batch = collate_pairs(chosen, rejected, margin, int(self.reward_model.tokenizer.pad_token_id))
            parts.append(batch.to(self.precision.device))
        return parts
