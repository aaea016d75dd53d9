"""What surrounds a row (padding, other rows) changes none of its figures."""

from __future__ import annotations

import pytest
import torch

from rlhf_cli.data.tokenise import collate
from rlhf_cli.models.causal import full_kls, sequence_logprobs, token_logprobs
from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.rewards.scoring import score_sequences

ROWS = [
    ([3, 4, 5], [6, 7, 1]),
    ([9], [1]),
    ([10, 11, 12, 13, 14, 15, 16, 17], [18]),
    ([2, 2], [20, 21, 22, 23, 20, 21, 22, 23, 4]),
    ([5, 1, 6], [8, 9, 1]),
]
PAD, EOS = 0, 1
LAYOUTS = [
    {"side": "left"},
    {"side": "right", "length": 30},
    {"side": "left", "length": 30},
    {"side": "right", "pad_id": EOS},
    {"side": "left", "pad_id": 7, "length": 17},
]
CLOSE = {"rtol": 0, "atol": 1e-5}


def _figures(policy, reference, classifier, rows, micro_batch_size=8, pad_id=PAD, **layout):
    sequences = collate(rows, pad_id, **layout)
    logprob, entropy = sequence_logprobs(policy, sequences, 0.9, micro_batch_size)
    kl = full_kls(policy, reference, sequences, 0.9, micro_batch_size)
    with torch.no_grad():
        score = torch.cat(
            [
                score_sequences(classifier, sequences[i : i + micro_batch_size])
                for i in range(0, len(rows), micro_batch_size)
            ]
        )
    return {"logprob": logprob, "entropy": entropy, "kl": kl, "score": score}


@pytest.fixture
def models(make_model):
    policy = make_model(seed=1)
    return policy, make_model(seed=2), classifier_from_lm(policy, seed=3)


@pytest.fixture
def alone(models):
    """Figures of each row by itself, without padding."""
    parts = [_figures(*models, [row]) for row in ROWS]
    figures = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name, values in figures.items():
        assert values.isfinite().all() and values.std() > 0.05, name
    return figures


def _assert_same(found, expected):
    for name, values in expected.items():
        assert torch.allclose(found[name], values, **CLOSE), (name, found[name] - values)


def test_a_batch_changes_nothing(models, alone):
    _assert_same(_figures(*models, ROWS), alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_side_amount_and_id_of_padding_change_nothing(models, alone, layout):
    _assert_same(_figures(*models, ROWS, **layout), alone)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_rows_per_pass_change_nothing(models, alone, micro_batch_size):
    _assert_same(_figures(*models, ROWS, micro_batch_size), alone)


def test_the_order_of_rows_changes_nothing(models, alone):
    order = [3, 0, 4, 2, 1]
    shuffled = _figures(*models, [ROWS[i] for i in order])
    _assert_same(shuffled, {name: values[order] for name, values in alone.items()})


def test_logprobs_are_those_of_a_plain_forward_pass(models):
    policy = models[0]
    tokens = token_logprobs(policy, collate(ROWS, PAD, side="left"))
    for row, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = policy(torch.tensor([[*prompt, *completion]])).logits[0].double()
        log_probability = torch.log_softmax(logits, -1)
        slow = [float(log_probability[len(prompt) + t - 1, token]) for t, token in enumerate(completion)]
        assert tokens.logprob[row][tokens.mask[row]].tolist() == pytest.approx(slow, abs=1e-5)


def test_kls_are_sums_over_the_vocabulary_at_the_temperature(models):
    policy, reference, _ = models
    kls = full_kls(policy, reference, collate(ROWS, PAD), 0.5, 2)
    for row, (prompt, completion) in enumerate(ROWS):
        with torch.no_grad():
            logits = [model(torch.tensor([[*prompt, *completion]])).logits[0].double() for model in models[:2]]
        log_q, log_p = (torch.log_softmax(values[len(prompt) - 1 : -1] / 0.5, -1) for values in logits)
        assert kls[row].item() == pytest.approx(float((log_q.exp() * (log_q - log_p)).sum()), rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_see_padding(models, layout):
    policy, _, _ = models
    gradients = []
    for kwargs in ({"pad_id": PAD}, {"pad_id": PAD, **layout}):
        policy.zero_grad()
        token_logprobs(policy, collate(ROWS, **kwargs)).sequence_logprob().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in policy.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradients[1][name].isfinite().all()
        scale = 1 + float(gradient.abs().max())
        assert torch.allclose(gradients[1][name], gradient, rtol=0, atol=1e-5 * scale), name
