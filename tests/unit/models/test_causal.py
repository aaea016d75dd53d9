from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from rlhf_cli.data.tokenise import TokenPair, collate
from rlhf_cli.models import causal
from rlhf_cli.models.causal import (
    frozen_logprobs,
    full_kls,
    sequence_logits,
    sequence_logprobs,
    token_logprobs,
)
from rlhf_cli.types import Sequences

ROWS: list[TokenPair] = [([3, 4, 5], [6, 7, 1]), ([8], [9]), ([2, 2, 2, 2], [10, 11]), ([5], [])]

ModelFactory = Callable[..., PreTrainedModel]


def by_hand(model: PreTrainedModel, row: TokenPair, temperature: float = 1.0) -> tuple[list[float], list[float]]:
    """Log-prob and entropy of each completion token, from one forward pass per prefix and no padding."""
    prompt, completion = row
    logprobs, entropies = [], []
    for t, token in enumerate(completion):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *completion[:t]]])).logits[0, -1].double() / temperature
        distribution = F.log_softmax(logits, dim=-1)
        logprobs.append(float(distribution[token]))
        entropies.append(float(-(distribution.exp() * distribution).sum()))
    return logprobs, entropies


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_logprobs_by_hand(make_model: ModelFactory, side: str, temperature: float) -> None:
    model = make_model()
    tokens = token_logprobs(model, collate(ROWS, 0, side, length=9), temperature)
    for i, row in enumerate(ROWS):
        logprobs, entropies = by_hand(model, row, temperature)
        assert tokens.logprob[i][tokens.mask[i]].tolist() == pytest.approx(logprobs, abs=2e-5)
        assert tokens.entropy[i][tokens.mask[i]].tolist() == pytest.approx(entropies, abs=2e-5)
        assert tokens.sequence_logprob()[i].item() == pytest.approx(sum(logprobs), abs=5e-5)
        assert not tokens.logprob[i][~tokens.mask[i]].any()


def test_padding_changes_nothing(make_model: ModelFactory) -> None:
    model = make_model()
    alone = torch.cat([sequence_logprobs(model, collate([row], 0), 1.0, 1)[0] for row in ROWS])
    for side in ("right", "left"):
        for pad_id in (0, 7):
            together, _ = sequence_logprobs(model, collate(ROWS, pad_id, side, length=12), 1.0, len(ROWS))
            torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


def test_micro_batches_add_up(make_model: ModelFactory) -> None:
    model = make_model()
    sequences = collate(ROWS, 0)
    whole = sequence_logprobs(model, sequences, 0.8, 4)
    for size in (1, 3):
        for part, full in zip(sequence_logprobs(model, sequences, 0.8, size), whole, strict=True):
            torch.testing.assert_close(part, full, atol=2e-5, rtol=0)


def test_sequence_entropy_is_a_mean_over_the_completion(make_model: ModelFactory) -> None:
    model = make_model()
    _, entropy = sequence_logprobs(model, collate(ROWS, 0), 1.0, 2)
    expected = [sum(e) / max(1, len(e)) for e in (by_hand(model, row)[1] for row in ROWS)]
    assert entropy.tolist() == pytest.approx(expected, abs=2e-5)


def test_gradients_flow_where_they_should(make_model: ModelFactory) -> None:
    model = make_model()
    sequences = collate(ROWS, 0)
    assert token_logprobs(model, sequences).logprob.requires_grad
    assert not token_logprobs(model, sequences).entropy.requires_grad
    assert not any(value.requires_grad for value in sequence_logprobs(model, sequences, 1.0, 2))
    assert not full_kls(model, make_model(1), sequences, 1.0, 2).requires_grad


def test_tokens_bound_a_pass(make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, sequences = make_model(0), make_model(1), collate(ROWS, 0)
    kls, logprob = full_kls(model, other, sequences, 1.0, 4), frozen_logprobs(model, sequences, 1.0, 4).logprob
    seen: list[int] = []
    for name in ("_full_kls", "token_logprobs"):
        original = getattr(causal, name)

        def counted(*arguments: Any, original: Callable[..., Any] = original) -> Any:
            rows = next(one for one in arguments if isinstance(one, Sequences))
            seen.append(int(rows.attention_mask.sum()))
            return original(*arguments)

        monkeypatch.setattr(causal, name, counted)
    torch.testing.assert_close(full_kls(model, other, sequences, 1.0, 4, 8), kls, atol=2e-5, rtol=0)
    torch.testing.assert_close(frozen_logprobs(model, sequences, 1.0, 4, 8).logprob, logprob, atol=2e-5, rtol=0)
    assert seen == [8, 7, 8, 7]  # of rows with 6, 2, 6 and 1


def test_full_kl_by_hand(make_model: ModelFactory) -> None:
    policy, reference = make_model(0), make_model(1)
    found = full_kls(policy, reference, collate(ROWS, 0, length=8), 0.7, 3)
    for i, (prompt, completion) in enumerate(ROWS):
        total = 0.0
        for t in range(len(completion)):
            prefix = torch.tensor([[*prompt, *completion[:t]]])
            with torch.no_grad():
                q, p = (F.log_softmax(m(prefix).logits[0, -1].double() / 0.7, dim=-1) for m in (policy, reference))
            total += float((q.exp() * (q - p)).sum())
        assert found[i].item() == pytest.approx(total, abs=1e-4)
    assert found[3] == 0


def test_a_model_has_no_kl_to_itself(make_model: ModelFactory) -> None:
    assert not full_kls(make_model(), make_model(), collate(ROWS, 0), 1.0, 2).any()


def test_logits_have_a_row_for_every_column(make_model: ModelFactory) -> None:
    model = make_model()
    sequences = collate(ROWS, 0, length=7)
    assert sequence_logits(model, sequences).shape == (4, 7, model.config.vocab_size)
