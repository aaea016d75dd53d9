import math

import pytest
import torch

from rlhf_cli.data.tokenise import collate
from rlhf_cli.ops.logprobs import completion_logprobs
from rlhf_cli.types import Sequences

ROWS = [([3, 1], [2, 0, 4]), ([2], [1]), ([4, 4, 0], [3, 3])]
VOCAB = 5


def _logits(sequences, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*sequences.ids.shape, VOCAB, generator=generator)


def _slow(logits, sequences, temperature):
    """Sum of log-probs and mean entropy of each row in plain float64 arithmetic."""
    sums, entropies = [], []
    for row in range(len(sequences)):
        total, entropy, count = torch.zeros((), dtype=torch.float64), 0.0, 0
        for column in range(1, sequences.ids.shape[1]):
            if not sequences.completion_mask[row, column]:
                continue
            weights = torch.exp(logits[row, column - 1].double() / temperature)
            probability = weights / weights.sum()
            total = total + torch.log(probability[sequences.ids[row, column]])
            entropy -= sum(p * math.log(p) for p in probability.tolist())
            count += 1
        sums.append(total)
        entropies.append(entropy / count)
    return torch.stack(sums), entropies


def test_by_hand():
    # prompt [0], completion [1, 0]; the logits of column t predict the token of column t + 1
    sequences = collate([([0], [1, 0])], pad_id=0)
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, math.log(4)], [9.0, -9.0]]])
    tokens = completion_logprobs(logits, sequences)
    assert tokens.logprob[0].tolist() == pytest.approx([math.log(1 / 4), math.log(1 / 5)])
    assert tokens.sequence_logprob().tolist() == pytest.approx([math.log(1 / 20)])
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (3 / 4, 1 / 5)]
    assert tokens.entropy[0].tolist() == pytest.approx(entropy)


def test_temperature_divides_the_logits():
    sequences = collate([([0], [1])], pad_id=0)
    logits = torch.tensor([[[math.log(9), 0.0], [0.0, 0.0]]])
    # logits / 2 = [ln 3, 0]
    assert completion_logprobs(logits, sequences, 2.0).sequence_logprob().tolist() == pytest.approx(
        [math.log(1 / 4)]
    )
    assert torch.equal(
        completion_logprobs(logits, sequences, 0.5).logprob, completion_logprobs(logits * 2, sequences).logprob
    )


def test_equal_logits_give_the_uniform_distribution():
    sequences = collate(ROWS, pad_id=0)
    tokens = completion_logprobs(torch.full((*sequences.ids.shape, VOCAB), 7.0), sequences)
    assert torch.allclose(tokens.logprob[tokens.mask], torch.tensor(-math.log(VOCAB)))
    assert torch.allclose(tokens.entropy[tokens.mask], torch.tensor(math.log(VOCAB)))


def test_a_constant_added_to_a_position_changes_nothing():
    sequences = collate(ROWS, pad_id=0)
    logits = _logits(sequences)
    shifted = logits + torch.arange(logits.shape[1])[:, None] * 3.0
    before, after = completion_logprobs(logits, sequences), completion_logprobs(shifted, sequences)
    assert torch.allclose(before.logprob, after.logprob, atol=1e-5)
    assert torch.allclose(before.entropy, after.entropy, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient_equal_a_slow_implementation(side, temperature):
    sequences = collate(ROWS, pad_id=0, side=side, length=8)
    logits = _logits(sequences).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    tokens = completion_logprobs(logits, sequences, temperature)
    (tokens.sequence_logprob() * weights).sum().backward()
    again = logits.detach().clone().requires_grad_()
    slow, entropy = _slow(again, sequences, temperature)
    (slow * weights).sum().backward()
    assert torch.allclose(tokens.sequence_logprob().double(), slow, atol=1e-5)
    assert torch.allclose(logits.grad, again.grad, atol=1e-6)
    assert again.grad.abs().max() > 0.1
    mean_entropy = tokens.entropy.sum(-1) / tokens.mask.sum(-1)
    assert mean_entropy.tolist() == pytest.approx(entropy, abs=1e-5)
    assert not tokens.entropy.requires_grad


def test_bf16_logits_are_normalised_in_float32():
    sequences = collate(ROWS, pad_id=0)
    logits = _logits(sequences).bfloat16()
    tokens = completion_logprobs(logits, sequences)
    assert tokens.logprob.dtype == tokens.entropy.dtype == torch.float32
    assert torch.equal(tokens.logprob, completion_logprobs(logits.float(), sequences).logprob)


def test_nan_outside_the_completion_reaches_neither_value_nor_gradient():
    sequences = collate(ROWS, pad_id=0, side="left", length=8)
    used = torch.zeros(sequences.ids.shape, dtype=torch.bool)
    used[:, :-1] = sequences.completion_mask[:, 1:]
    clean = _logits(sequences)
    dirty = torch.where(used[..., None], clean, torch.tensor(float("nan"))).requires_grad_()
    tokens = completion_logprobs(dirty, sequences)
    assert torch.equal(tokens.sequence_logprob(), completion_logprobs(clean, sequences).sequence_logprob())
    assert torch.equal(tokens.logprob[~tokens.mask], torch.zeros(int((~tokens.mask).sum())))
    assert torch.equal(tokens.entropy[~tokens.mask], torch.zeros(int((~tokens.mask).sum())))
    tokens.sequence_logprob().sum().backward()
    assert torch.equal(dirty.grad[~used], torch.zeros_like(dirty.grad[~used]))
    assert dirty.grad.isfinite().all()


def test_rows_without_a_completion_have_log_probability_zero():
    sequences = collate([([3, 1], []), ([2, 4], [])], pad_id=0)
    tokens = completion_logprobs(_logits(sequences), sequences)
    assert tokens.sequence_logprob().tolist() == [0.0, 0.0]
    assert tokens.entropy.sum().item() == 0.0


def test_far_apart_logits_stay_finite():
    sequences = collate([([0], [1, 2])], pad_id=0)
    logits = torch.zeros(1, 3, VOCAB)
    logits[..., 1] = 300.0
    tokens = completion_logprobs(logits, sequences)
    assert tokens.logprob[0].tolist() == [0.0, -300.0]
    assert tokens.entropy[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-4)


def test_a_completion_needs_a_token_before_it():
    ids = torch.tensor([[1, 2]])
    counts = torch.tensor([[True, True]])
    with pytest.raises(AssertionError):
        completion_logprobs(torch.zeros(1, 2, VOCAB), Sequences(ids, counts, counts))
