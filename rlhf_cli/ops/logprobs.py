"""Log-probabilities of tokens from logits: the one place that shifts logits against tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_cli.ops.masks import masked_sum
from rlhf_cli.types import Sequences


@dataclass(frozen=True)
class TokenLogprobs:
    """Per-token figures of the completion; column t belongs to the token at column t + 1 of the ids."""

    logprob: Tensor  # float32 [N, L-1], 0 outside the mask
    entropy: Tensor  # float32 [N, L-1], nats, of the distribution the token was drawn from; detached
    mask: Tensor  # bool [N, L-1], True = a completion token

    def __getitem__(self, rows: slice) -> TokenLogprobs:
        return TokenLogprobs(self.logprob[rows], self.entropy[rows], self.mask[rows])

    def sequence_logprob(self) -> Tensor:
        """log pi(y|x): the sum over the completion up to and including the first EOS, float32 [N]."""
        return masked_sum(self.logprob, self.mask)

    def mean_entropy(self) -> Tensor:
        """Mean over each completion's tokens, float32 [N], nats."""
        return self.entropy.sum(-1) / self.mask.sum(-1).clamp(min=1)


def joined(parts: Iterable[TokenLogprobs]) -> TokenLogprobs:
    """The rows of several, which have equally many columns, one after the other."""
    columns = zip(*((part.logprob, part.entropy, part.mask) for part in parts), strict=True)
    return TokenLogprobs(*(torch.cat(column) for column in columns))


def completion_logprobs(logits: Tensor, sequences: Sequences, temperature: float = 1.0) -> TokenLogprobs:
    """log pi(y_t | x, y_<t) of every completion token.

    The logits at column t predict the token at column t + 1. Only completion positions are normalised, so the
    float32 copy has a row per completion token and not per padded position.

    Args:
        logits: [N, L, V], any float type.
        sequences: N rows of L tokens. The first column is never a completion token.
        temperature: what the logits are divided by; the one used for sampling.

    Returns:
        TokenLogprobs; the gradient flows through `logprob`.
    """
    assert temperature > 0, temperature
    assert not bool(sequences.completion_mask[:, 0].any()), "a completion needs a token before it"
    mask = sequences.completion_mask[:, 1:]
    targets = sequences.ids[:, 1:][mask]
    rows = logits[:, :-1][mask].float()
    if temperature != 1.0:
        rows = rows / temperature
    log_normaliser = torch.logsumexp(rows, dim=-1)
    chosen = rows.gather(-1, targets[:, None])[:, 0] - log_normaliser
    with torch.no_grad():
        # H = log Z - E[logit]; needs no second [tokens, V] tensor of log-probabilities
        probability = torch.softmax(rows, dim=-1)
        row_entropy = log_normaliser - (probability * rows).sum(-1)
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=logits.device)
    return TokenLogprobs(
        logprob=zeros.masked_scatter(mask, chosen),
        entropy=zeros.masked_scatter(mask, row_entropy),
        mask=mask,
    )
