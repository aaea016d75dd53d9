"""Training a policy on pairs: chosen and rejected of a prompt, under the policy and under the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.preference import PreferenceAlgorithm
from rlhf_cli.data.tokenise import TokenPair, collate
from rlhf_cli.models.adapters import Adapter, save_trained
from rlhf_cli.models.causal import LanguageModel, token_logprobs
from rlhf_cli.models.recompute import recomputing
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.loop import Evaluation, StepBatch, Task
from rlhf_cli.train.micro_batches import micro_batches
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import batch_rows
from rlhf_cli.types import LossOutput, Sequences

EncodedPair = tuple[TokenPair, TokenPair]  # chosen, rejected


@dataclass(frozen=True)
class Reference:
    """Where the reference's log-probs come from: one of the two."""

    model: LanguageModel | None = None  # asked with each batch
    logprobs: tuple[Tensor, Tensor] | None = None  # float32 [n, 2] of training and validation pairs, on the CPU


@dataclass(frozen=True)
class PairBatch:
    """Tokenised pairs in one batch: rows 0 .. N-1 are chosen, the next N the rejected ones of the same prompts."""

    sequences: Sequences  # 2N rows
    ref_logprob: Tensor | None  # float32 [2N], of whole completions under the reference; None = not yet known

    def __len__(self) -> int:
        return len(self.sequences) // 2


class PreferenceTask(Task):
    """Any algorithm over pairs. What it is normalised by is the pairs of the whole optimizer step.

    Dropout stays off and the temperature is 1: policy and reference are compared as distributions, and at the first
    step they are the same one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        reference: Reference,
        tokenizer: PreTrainedTokenizerBase,
        algorithm: PreferenceAlgorithm,
        pairs: Sequence[EncodedPair],
        validation: Sequence[EncodedPair],
        precision: Precision,
        seed: int,
        world: World = ALONE,
        adapter: Adapter | None = None,
    ) -> None:
        assert (reference.model is None) != (reference.logprobs is None), "one of the two"
        self.model: PreTrainedModel = model.eval()
        self.reference = reference
        if isinstance(reference.model, nn.Module):
            reference.model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.algorithm = algorithm
        self.pairs = pairs
        self.validation = validation
        self.settings = algorithm.train
        self.precision = precision
        self.seed = seed
        self.world = world
        self.adapter = adapter

    def batch(self, step: int) -> StepBatch:
        """This process' pairs of a step, as a function of the step alone."""
        size = self.settings.batch_size
        mine = batch_rows(self.seed, step, size, len(self.pairs))[self.world.share(size)]
        known = None if self.reference.logprobs is None else self.reference.logprobs[0]
        micro = self._collated(self.pairs, [int(place) for place in mine], known)
        return StepBatch(
            micro_batches=micro,
            normaliser=float(len(mine)),
            num_samples=2 * len(mine),
            num_tokens=sum(int(part.sequences.attention_mask.sum()) for part in micro),
        )

    def loss(self, micro_batch: PairBatch, normaliser: float) -> LossOutput:
        """The algorithm's loss of the pairs."""
        ref = micro_batch.ref_logprob
        if ref is None:
            assert self.reference.model is not None
            with torch.no_grad():
                ref = token_logprobs(
                    self.reference.model, micro_batch.sequences, with_entropy=False
                ).sequence_logprob()
        with recomputing(self.model):
            tokens = token_logprobs(self.model, micro_batch.sequences)
        n = len(micro_batch)
        return self.algorithm.pair_loss(tokens[:n], tokens[n:], ref[:n], ref[n:], normaliser)

    @torch.no_grad()
    def evaluate(self, step: int) -> Evaluation:
        """The loss and its figures on the validation pairs."""
        count = len(self.validation)
        known = None if self.reference.logprobs is None else self.reference.logprobs[1]
        mine = range(count)[self.world.share(count)]
        sums: dict[str, float] = {}
        for part in self._collated(self.validation, mine, known):
            with self.precision.autocast():
                output = self.loss(part, float(count))
            for name, value in {"loss": output.loss, **output.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        names = self.world.from_main(lambda: list(sums))  # a share may be empty, the first never is
        metrics = dict(zip(names, self.world.sum([sums.get(name, 0.0) for name in names]), strict=True))
        return Evaluation(metrics, score=-metrics["loss"])

    def save(self, folder: Path) -> None:
        """Writes a Hugging Face folder."""
        save_trained(self.model, self.tokenizer, folder, self.adapter)

    def _collated(
        self, pairs: Sequence[EncodedPair], places: Sequence[int], known: Tensor | None
    ) -> list[PairBatch]:
        parts = []
        every = [pairs[place] for place in places]
        for part in micro_batches([*map(_num_tokens, every)], self.settings):
            ref = None if known is None else known[list(places[part])].T.reshape(-1).to(self.precision.device)
            sequences = collate_both(every[part], int(self.tokenizer.pad_token_id))
            parts.append(PairBatch(sequences.to(self.precision.device), ref))
        return parts


def collate_both(pairs: Sequence[EncodedPair], pad_id: int) -> Sequences:
    """N pairs as 2N rows, the chosen ones first, padded to one length."""
    return collate([*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)], pad_id)


def _num_tokens(pair: EncodedPair) -> int:
    chosen, rejected = pair
    return sum(map(len, (*chosen, *rejected)))


@torch.no_grad()
def reference_logprobs(
    reference: LanguageModel,
    pairs: Sequence[EncodedPair],
    pad_id: int,
    settings: TrainSettings,
    precision: Precision,
    world: World = ALONE,
) -> Tensor:
    """Log-probs of whole completions under the reference, as many pairs at a time as a training pass may have.

    Returns:
        float32 [n, 2] on the CPU, chosen and rejected, of all n pairs, whichever process has taken them.
    """
    mine = range(len(pairs))[world.share(len(pairs))]
    parts = [torch.zeros(0, 2)]
    for part in micro_batches([_num_tokens(pairs[place]) for place in mine], settings):
        sequences = collate_both([pairs[place] for place in mine[part]], pad_id)
        with precision.autocast():
            tokens = token_logprobs(reference, sequences.to(precision.device), with_entropy=False)
            logprob = tokens.sequence_logprob()
        parts.append(logprob.cpu().reshape(2, -1).T)
    return world.gather(torch.cat(parts))
