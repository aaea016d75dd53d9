"""Training a reward model on pairs: scalar by Bradley-Terry, over grades by the probability of the pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_cli.data.rows import mapped, rows_of_epochs
from rlhf_cli.data.tokenise import TokenPair, collate_pairs
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.recompute import recomputing
from rlhf_cli.ops.grades import entropy_bonus, grade_loss, sum_probabilities
from rlhf_cli.ops.preference_losses import bradley_terry_loss, wins
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.scoring import head_of_pooled, score_sequences
from rlhf_cli.settings import GradeLoss, TrainSettings
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.loop import Evaluation, StepBatch, Task
from rlhf_cli.train.micro_batches import micro_batches
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import batch_places
from rlhf_cli.types import LossOutput, Preference, PreferenceBatch, Sequences

States = Callable[[Sequences], torch.Tensor]  # -> float32 [N, H], what the head reads
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


@dataclass(frozen=True)
class RewardLoss:
    """What is minimised beside the kind of the reward model, which its format says."""

    use_margin: bool = False  # of a scalar one
    entropy_bonus: float = 0.0  # of one over grades: the weight of the entropy of a step's mean distribution


class RewardTask(Task):
    """loss = -(1/n) sum log P(chosen beats rejected), n = pairs of the step."""

    def __init__(
        self,
        reward_model: RewardModel,
        pairs: Sequence[EncodedPair],
        validation: Sequence[EncodedPair],
        settings: TrainSettings,
        precision: Precision,
        seed: int,
        loss: RewardLoss,
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
        self.of = loss
        self.world = world
        self.adapter = adapter
        self.with_dropout = True
        self.states: States | None = None  # of a backbone that does not move
        self._marginal: torch.Tensor | None = None  # [K], of the step's two completions of every pair

    def batch(self, step: int) -> StepBatch:
        """This process' pairs of a step, as a function of the step alone."""
        self.model.train(self.with_dropout)
        size = self.settings.batch_size
        mine = self.world.share(size)
        epochs, places = batch_places(self.seed, step, size, len(self.pairs))
        chosen = rows_of_epochs(self.pairs, epochs[mine], places[mine])
        micro = self._collated(chosen)
        if self.of.entropy_bonus:
            self._find_marginal(micro)
        return StepBatch(
            micro_batches=micro,
            normaliser=float(len(chosen)),
            num_samples=2 * len(chosen),
            num_tokens=sum(
                int(part.chosen.attention_mask.sum() + part.rejected.attention_mask.sum()) for part in micro
            ),
        )

    def loss(self, micro_batch: PreferenceBatch, normaliser: float) -> LossOutput:
        """The pairs' negative log-probability, less the entropy bonus."""
        with recomputing(self.model):
            chosen, rejected = self._logits(micro_batch)
        loss = self._pair_loss(chosen, rejected, normaliser, micro_batch.margin if self.of.use_margin else None)
        margin = self._margin(chosen.detach(), rejected.detach())
        metrics = {"rm/accuracy": wins(margin) / normaliser, "rm/margin": margin.sum() / normaliser}
        if self._marginal is not None:
            both = torch.cat([chosen, rejected])
            entropy = entropy_bonus(both, self._marginal, 2 * normaliser)
            loss = loss - self.of.entropy_bonus * entropy
            metrics["rm/marginal_entropy"] = entropy.detach()
        return LossOutput(loss=loss, metrics=metrics)

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """Loss, accuracy and margin on the validation pairs; of one over grades, the entropy of a text's grades too."""
        self.model.eval()
        count = float(len(self.validation))
        sums = [0.0] * 4
        for part in self._collated(self.validation[self.world.share(len(self.validation))]):
            with self.precision.autocast():
                chosen, rejected = self._logits(part)
            margin = self._margin(chosen, rejected)
            entropy = torch.distributions.Categorical(logits=torch.cat([chosen, rejected])).entropy()
            found = (self._pair_loss(chosen, rejected, count), wins(margin) / count, margin.sum() / count)
            for i, value in enumerate((*found, entropy.sum() / (2 * count))):
                sums[i] += float(value)
        loss, accuracy, mean_margin, entropy_mean = self.world.sum(sums)
        metrics = {"loss": loss, "rm/accuracy": accuracy, "rm/margin": mean_margin}
        if self.reward_model.format.grade_loss is not None:
            metrics["rm/entropy"] = entropy_mean
        return Evaluation(metrics, score=-loss)

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        self.reward_model.save(folder, self.adapter)

    def _pair_loss(
        self, chosen: torch.Tensor, rejected: torch.Tensor, normaliser: float, margin: torch.Tensor | None = None
    ) -> torch.Tensor:
        kind = self.reward_model.format.grade_loss
        if kind is None:
            return bradley_terry_loss(chosen[:, 0], rejected[:, 0], normaliser, margin)
        return grade_loss(chosen, rejected, normaliser, GradeLoss(kind))

    def _margin(self, chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return self.reward_model.format.raw(chosen) - self.reward_model.format.raw(rejected)

    @torch.no_grad()
    def _find_marginal(self, micro_batches: Sequence[PreferenceBatch]) -> None:
        """The whole step's mean distribution, which no micro-batch and no process knows by itself."""
        total = torch.zeros(int(self.model.config.num_labels or 1), dtype=torch.float64)
        device = self.precision.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.precision.autocast():
            for part in micro_batches:
                total += sum_probabilities(torch.cat(self._logits(part))).cpu().double()
        total = torch.tensor(self.world.sum(total.tolist()))
        self._marginal = (total / total.sum()).float().to(self.precision.device)

    def _logits(self, batch: PreferenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
        # one pass for both, so that dropout and padding treat them alike
        both = Sequences(
            torch.cat([batch.chosen.ids, batch.rejected.ids]),
            torch.cat([batch.chosen.attention_mask, batch.rejected.attention_mask]),
            torch.cat([batch.chosen.completion_mask, batch.rejected.completion_mask]),
        )
        if self.states is None:
            logits = score_sequences(self.model, both).float()
        else:
            logits = head_of_pooled(self.model, self.states(both))
        return logits[: len(batch)], logits[len(batch) :]

    def _collated(self, pairs: Sequence[EncodedPair]) -> list[PreferenceBatch]:
        every = [pairs[i] for i in range(len(pairs))]
        lengths = [sum(map(len, (*chosen, *rejected))) for chosen, rejected, _ in every]
        parts = []
        for part in micro_batches(lengths, self.settings):
            chosen, rejected, margin = zip(*every[part], strict=True)
            batch = collate_pairs(chosen, rejected, margin, int(self.reward_model.tokenizer.pad_token_id))
            parts.append(batch.to(self.precision.device))
        return parts
