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
    # float32 [N, L-1], nats, of the distribution the token was drawn from; detached; None where nobody asked for it
    entropy: Tensor | None
    mask: Tensor  # bool [N, L-1], True = a completion token

    def __getitem__(self, rows: slice) -> TokenLogprobs:
        entropy = None if self.entropy is None else self.entropy[rows]
        return TokenLogprobs(self.logprob[rows], entropy, self.mask[rows])

    def detached(self) -> TokenLogprobs:
        """The same figures without their gradient."""
        return TokenLogprobs(self.logprob.detach(), self.entropy, self.mask)

    def sequence_logprob(self) -> Tensor:
        """log pi(y|x): the sum over the completion up to and including the first EOS, float32 [N]."""
        return masked_sum(self.logprob, self.mask)

    def sum_entropy(self) -> Tensor:
        """Over all tokens, scalar, nats."""
        assert self.entropy is not None, "entropies were not asked for"
        return self.entropy.sum()

    def mean_entropy(self) -> Tensor:
        """Mean over each completion's tokens, float32 [N], nats."""
        assert self.entropy is not None, "entropies were not asked for"
        return self.entropy.sum(-1) / self.mask.sum(-1).clamp(min=1)


def joined(parts: Iterable[TokenLogprobs]) -> TokenLogprobs:
    """The rows of several, which have equally many columns, one after the other; all with entropies or none."""
    every = list(parts)
    entropies = [part.entropy for part in every if part.entropy is not None]
    return TokenLogprobs(
        torch.cat([part.logprob for part in every]),
        torch.cat(entropies) if entropies else None,
        torch.cat([part.mask for part in every]),
    )


def predicted(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The completions' tokens, int64 [C] row by row, and where they are: bool [N, L-1], column t for token t + 1."""
    mask = sequences.completion_mask[:, 1:]
    return sequences.ids[:, 1:][mask], mask


def on_grid(values: Tensor, mask: Tensor) -> Tensor:
    """Figures of the C tokens of a mask [N, L-1], row by row, at their places; 0 elsewhere. Float32 [N, L-1]."""
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    return zeros.masked_scatter(mask, values)


def completion_logprobs(
    logits: Tensor, sequences: Sequences, temperature: float = 1.0, with_entropy: bool = True
) -> TokenLogprobs:
    """log pi(y_t | x, y_<t) of every completion token.

    The logits at column t predict the token at column t + 1. Only completion positions are normalised, so the
    float32 copy has a row per completion token and not per padded position.

    Args:
        logits: [N, L, V], any float type.
        sequences: N rows of L tokens. The first column is never a completion token.
        temperature: what the logits are divided by; the one used for sampling.
        with_entropy: whether entropies are asked for.

    Returns:
        TokenLogprobs; the gradient flows through `logprob`.
    """
    assert temperature > 0, temperature
    assert not bool(sequences.completion_mask[:, 0].any()), "a completion needs a token before it"
    targets, mask = predicted(sequences)
    logprob, entropy = row_logprobs(logits[:, :-1][mask], targets, temperature, with_entropy)
    return TokenLogprobs(on_grid(logprob, mask), None if entropy is None else on_grid(entropy, mask), mask)


def row_logprobs(
    logits: Tensor, targets: Tensor, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probs float32 [C] of tokens int64 [C] under logits [C, V], and the entropies of these, without gradient."""
    rows = logits.float()
    if temperature != 1.0:
        rows = rows / temperature
    log_normaliser = torch.logsumexp(rows, dim=-1)
    chosen = rows.gather(-1, targets[:, None])[:, 0] - log_normaliser
    if not with_entropy:
        return chosen, None
    with torch.no_grad():
        # H = log Z - E[logit]; needs no second [tokens, V] tensor of log-probabilities
        probability = torch.softmax(rows, dim=-1)
        return chosen, log_normaliser - (probability * rows).sum(-1)
