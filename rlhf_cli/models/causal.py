"""Forward passes of a causal language model over prompt + completion rows."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_cli.models.positions import check_length, token_positions
from rlhf_cli.ops.kl import full_kl
from rlhf_cli.ops.logprobs import TokenLogprobs, completion_logprobs, joined
from rlhf_cli.types import Sequences


class LanguageModel(Protocol):
    """Anything that is called like a causal language model of transformers."""

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass; the result has `logits`."""
        ...


def forward(model: LanguageModel, sequences: Sequences, **options: Any) -> Any:
    """The model's answer to whole rows; positions count real tokens, so padding changes nothing.

    Raises:
        RequestError: a row has more tokens than the model has positions.
    """
    check_length(model, sequences)
    return model(
        input_ids=sequences.ids,
        attention_mask=sequences.attention_mask.long(),
        position_ids=token_positions(sequences.attention_mask),
        use_cache=False,
        **options,
    )


def sequence_logits(model: LanguageModel, sequences: Sequences) -> Tensor:
    """Logits of every position, [N, L, V]. Raises RequestError as `forward` does."""
    return forward(model, sequences).logits


def token_logprobs(model: LanguageModel, sequences: Sequences, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probs of the completion tokens under `model`; gradients flow where they are enabled."""
    return completion_logprobs(sequence_logits(model, sequences), sequences, temperature)


@torch.no_grad()
def sequence_logprobs(
    model: LanguageModel, sequences: Sequences, temperature: float, micro_batch_size: int
) -> tuple[Tensor, Tensor]:
    """Summed log-prob and entropy of each completion, without gradient.

    Args:
        model: in eval mode.
        sequences: N rows.
        temperature: the sampling temperature.
        micro_batch_size: rows per pass. Use the training step's, so that policy and reference, equal at step 0,
            agree to the bit.

    Returns:
        log-prob float32 [N]; mean entropy per completion token float32 [N], nats.
    """
    tokens = frozen_logprobs(model, sequences, temperature, micro_batch_size)
    return tokens.sequence_logprob(), tokens.mean_entropy()


@torch.no_grad()
def frozen_logprobs(
    model: LanguageModel, sequences: Sequences, temperature: float, micro_batch_size: int
) -> TokenLogprobs:
    """`token_logprobs` of N rows without gradient, `micro_batch_size` at a time."""
    return joined(
        [
            token_logprobs(model, sequences[start : start + micro_batch_size], temperature)
            for start in range(0, len(sequences), micro_batch_size)
        ]
    )


@torch.no_grad()
def full_kls(
    policy: LanguageModel,
    reference: LanguageModel,
    sequences: Sequences,
    temperature: float,
    micro_batch_size: int,
) -> Tensor:
    """Full-vocabulary KL(policy||reference) summed over each completion, float32 [N], nats."""
    parts = []
    for start in range(0, len(sequences), micro_batch_size):
        rows = sequences[start : start + micro_batch_size]
        parts.append(full_kl(sequence_logits(policy, rows), sequence_logits(reference, rows), rows, temperature))
    return torch.cat(parts)
