"""Ids that a model has rows for and that no text has: its tokenizer has no token for them, or added the pad token.

Tables are padded to round sizes (Pythia: 50,304 rows, 50,277 tokens; Qwen2.5: 151,936 rows, 151,665 tokens). Such
an id has no text. It is taken out of the distribution wherever there is one, in sampling, log-probs and KL alike, so
that all of these speak of the same distribution: the model's, given that a token comes next. The weights stay as they
are, and the saved model has the base model's shape.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput

from rlhf_cli.models.tokenizer import PAD_TOKEN
from rlhf_cli.ops.head_logprobs import NEVER

_BUFFER = "ids_without_token"


def never_without_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives ids without a token probability 0 in all that `model(...)` answers from now on.

    A hook of the model rather than a step of each caller: policy, reference, sampling and training cannot then differ.
    Code that calls a model's parts by itself (its head, to see fewer logits) has to call `tokens_only` as well.

    Args:
        model: with or without a language model's head; changed in place, but for its weights.
        tokenizer: what says which ids are tokens.
    """
    head = model.get_output_embeddings()
    if head is None:
        return
    without = torch.ones(head.weight.shape[0], dtype=torch.bool)
    known = [i for i in tokenizer.get_vocab().values() if i < len(without)]
    without[known] = False
    # A pad token that was added to a published tokenizer: its row is untrained, and its logit can be any
    pad = tokenizer.pad_token_id
    if tokenizer.pad_token == PAD_TOKEN and tokenizer.vocab_size <= pad < len(without):
        without[pad] = True
    if without.any():
        ids = without.nonzero()[:, 0].to(head.weight.device)
        model.register_buffer(_BUFFER, ids, persistent=False)  # moves with the model, and is not saved
        model.register_forward_hook(_on_forward)


def tokens_only(model: PreTrainedModel, logits: Tensor) -> Tensor:
    """Logits under which an id without a token has probability 0.

    Args:
        model: loaded with its tokenizer; one that has a token for every id gets its logits back as they are.
        logits: [..., V]. Changed in place: a copy would be a step's largest tensor.

    Returns:
        The same tensor. Its gradient needs no masking, as that of a logit is proportional to its probability.
    """
    ids = ids_without_token(model)
    if ids is not None:
        with torch.no_grad():
            logits.index_fill_(-1, ids, NEVER)
    return logits


def ids_without_token(model: PreTrainedModel) -> Tensor | None:
    """The ids of probability 0, int64; None where every id has a token."""
    ids: Tensor | None = getattr(model, _BUFFER, None)
    return ids


def _on_forward(model: PreTrainedModel, _: object, output: CausalLMOutput) -> None:
    tokens_only(model, output.logits)
