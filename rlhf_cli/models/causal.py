"""Forward passes of a causal language model over prompt + completion rows.

A model that takes layouts works on the rows without padding, a shared prompt once, and its output layer on the states
that predict a completion token alone (`rlhf_cli.models.packing`, `rlhf_cli.ops.head_logprobs`); any other is called as
transformers calls it, with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.attention import takes_layouts
from rlhf_cli.models.packing import packed_states
from rlhf_cli.models.positions import check_length, token_positions
from rlhf_cli.models.vocabulary import ids_without_token, tokens_only
from rlhf_cli.ops.cutting import cut
from rlhf_cli.ops.head_logprobs import head_logprobs
from rlhf_cli.ops.kl import full_kl, token_kl
from rlhf_cli.ops.logprobs import TokenLogprobs, completion_logprobs, joined, on_grid, predicted, row_logprobs
from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.ops.output_layer import output_logits
from rlhf_cli.types import Sequences

# Logits of both models that a KL is computed from at a time.
_KL_LOGITS = 1 << 24


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


@contextmanager
def _packable(model: LanguageModel) -> Iterator[PreTrainedModel | None]:
    """The transformers model behind this one, as long as it is asked; None where it cannot work on packed rows."""
    inside: Callable[[], Any] | None = getattr(model, "inside", None)  # a policy whose adapter is off
    if inside is not None:
        with inside() as inner:
            yield inner if takes_layouts(inner) else None
    else:
        yield model if isinstance(model, PreTrainedModel) and takes_layouts(model) else None


def completion_states(model: PreTrainedModel, sequences: Sequences) -> Tensor:
    """The states that completion tokens are predicted from, [C, H], row by row, of a model that takes layouts."""
    assert not bool(sequences.completion_mask[:, 0].any()), "a completion needs a token before it"
    hidden, packing = packed_states(model, sequences)
    return hidden.index_select(0, packing.predictors)


def token_logprobs(
    model: LanguageModel, sequences: Sequences, temperature: float = 1.0, with_entropy: bool = True
) -> TokenLogprobs:
    """Log-probs of the completion tokens under `model`; gradients flow where they are enabled."""
    with _packable(model) as inner:
        if inner is not None:
            states = completion_states(inner, sequences)
            return logprobs_of_states(inner, states, sequences, temperature, with_entropy)
    return completion_logprobs(sequence_logits(model, sequences), sequences, temperature, with_entropy)


def head_logits(head: nn.Module, states: Tensor) -> Tensor:
    """Logits [N, V] of hidden states [N, H]."""
    return output_logits(states, head.weight, head.bias) if type(head) is nn.Linear else head(states)


def logprobs_of_states(
    model: PreTrainedModel, states: Tensor, sequences: Sequences, temperature: float, with_entropy: bool = True
) -> TokenLogprobs:
    """Log-probs of the completion tokens from `completion_states` [C, H]."""
    assert temperature > 0, temperature
    targets, mask = predicted(sequences)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        logprob, entropy = head_logprobs(
            states, head.weight, head.bias, targets, temperature, ids_without_token(model), with_entropy
        )
    else:  # one with an adapter of its own
        logprob, entropy = row_logprobs(tokens_only(model, head(states)), targets, temperature, with_entropy)
    return TokenLogprobs(on_grid(logprob, mask), None if entropy is None else on_grid(entropy, mask), mask)


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
    tokens = frozen_logprobs(model, sequences, temperature, micro_batch_size, with_entropy=True)
    return tokens.sequence_logprob(), tokens.mean_entropy()


@torch.no_grad()
def frozen_logprobs(
    model: LanguageModel,
    sequences: Sequences,
    temperature: float,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
    with_entropy: bool = False,
) -> TokenLogprobs:
    """`token_logprobs` of N rows without gradient, in passes of so many rows and tokens at most."""
    parts = parts_of(sequences, micro_batch_size, micro_batch_tokens)
    return joined([token_logprobs(model, sequences[part], temperature, with_entropy) for part in parts])


def parts_of(sequences: Sequences, micro_batch_size: int, micro_batch_tokens: int | None = None) -> list[slice]:
    """`cut` of N rows; their padding is not counted."""
    return cut(sequences.attention_mask.sum(-1).tolist(), micro_batch_size, micro_batch_tokens)


@torch.no_grad()
def full_kls(
    policy: LanguageModel,
    reference: LanguageModel,
    sequences: Sequences,
    temperature: float,
    micro_batch_size: int,
    micro_batch_tokens: int | None = None,
) -> Tensor:
    """Full-vocabulary KL(policy||reference) summed over each completion, float32 [N], nats."""
    parts = parts_of(sequences, micro_batch_size, micro_batch_tokens)
    return torch.cat([_full_kls(policy, reference, sequences[part], temperature) for part in parts])


def _full_kls(policy: LanguageModel, reference: LanguageModel, sequences: Sequences, temperature: float) -> Tensor:
    states = []
    for model in (policy, reference):
        with _packable(model) as inner:
            if inner is not None:
                states.append(completion_states(inner, sequences))
    if len(states) < 2:
        logits = (sequence_logits(model, sequences) for model in (policy, reference))
        return full_kl(*logits, sequences, temperature)
    _, mask = predicted(sequences)
    found = torch.empty(len(states[0]), device=mask.device)
    with _packable(policy) as one, _packable(reference) as other:
        assert one is not None and other is not None
        head = one.get_output_embeddings()
        size = max(1, _KL_LOGITS // head.weight.shape[0])
        for block in (slice(start, start + size) for start in range(0, len(found), size)):
            q, p = (_head_logits(model, part[block]) for model, part in zip((one, other), states, strict=True))
            found[block] = token_kl(q, p, temperature)
    return masked_sum(on_grid(found, mask), mask)


def _head_logits(model: PreTrainedModel, states: Tensor) -> Tensor:
    return tokens_only(model, head_logits(model.get_output_embeddings(), states))
