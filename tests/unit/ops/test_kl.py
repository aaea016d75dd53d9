import itertools
import math

import pytest
import torch

from rlhf_cli.data.tokenise import collate
from rlhf_cli.ops.kl import full_kl, k1, k2, k3, shaped_reward
from rlhf_cli.types import Sequences

VOCAB, EOS = 3, 2
PREFIXES = [(), (0,), (1,)]
COMPLETIONS = [(EOS,), *itertools.product((0, 1), (0, 1, EOS))]  # at most two tokens


def _random_logits(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _log_distribution(table):
    """log-prob of every completion, float64 [7]; table: logits [prefix, token]."""
    log_probability = torch.log_softmax(table, dim=-1)
    rows = []
    for completion in COMPLETIONS:
        steps = [log_probability[PREFIXES.index(completion[:t]), token] for t, token in enumerate(completion)]
        rows.append(torch.stack(steps).sum())
    return torch.stack(rows)


def _kl(log_q, log_p):
    return sum(math.exp(q) * (q - p) for q, p in zip(log_q.tolist(), log_p.tolist(), strict=True))


@pytest.fixture
def pair():
    """log-probs of all completions under a policy and a reference."""
    return _log_distribution(_random_logits(0, 3, VOCAB)), _log_distribution(_random_logits(1, 3, VOCAB))


def test_estimators_by_hand():
    # q = 0.5, p = 0.25: l = ln 2
    log_q, log_p = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert k1(log_q, log_p).item() == pytest.approx(math.log(2))
    assert k2(log_q, log_p).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(log_q, log_p).item() == pytest.approx(0.5 - 1 + math.log(2))
    assert k1(log_p, log_q).item() == pytest.approx(-math.log(2))


def test_estimators_of_equal_distributions_are_exactly_zero():
    logprob = torch.tensor([-0.1, -7.3, -55.0])
    for estimator in (k1, k2, k3):
        assert estimator(logprob, logprob.clone()).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_have_the_kl_as_their_expectation(pair, estimator):
    log_q, log_p = pair
    assert _kl(log_q, log_p) > 0.1
    expectation = (log_q.exp() * estimator(log_q, log_p)).sum()
    assert expectation.item() == pytest.approx(_kl(log_q, log_p), abs=1e-12)


def test_k2_is_biased_and_k2_and_k3_are_never_negative(pair):
    log_q, log_p = pair
    squares = [(q - p) ** 2 / 2 for q, p in zip(log_q.tolist(), log_p.tolist(), strict=True)]
    assert k2(log_q, log_p).tolist() == pytest.approx(squares)
    assert abs((log_q.exp() * k2(log_q, log_p)).sum().item() - _kl(log_q, log_p)) > 1e-2
    assert (k2(log_q, log_p) >= 0).all() and (k3(log_q, log_p) >= 0).all()
    assert (k1(log_q, log_p) < 0).any() and (k1(log_q, log_p) > 0).any()


def test_k3_of_a_tiny_difference_keeps_its_sign_in_float32():
    difference = torch.logspace(-9, -2, 50)
    assert (k3(difference, torch.zeros(50)) >= 0).all() and (k3(-difference, torch.zeros(50)) >= 0).all()


@pytest.mark.parametrize(("estimator", "target"), [(k1, "zero"), (k2, "reverse"), (k3, "forward")])
def test_expected_gradient_of_an_on_policy_loss(estimator, target):
    # k1 has none, k2 that of KL(pi||ref), k3 that of KL(ref||pi)
    table = _random_logits(0, 3, VOCAB).requires_grad_()
    log_p = _log_distribution(_random_logits(1, 3, VOCAB))
    log_q = _log_distribution(table)
    (gradient,) = torch.autograd.grad((log_q.detach().exp() * estimator(log_q, log_p)).sum(), table)
    log_q = _log_distribution(table)
    true = {
        "zero": (log_q.exp() * 0.0).sum(),
        "reverse": (log_q.exp() * (log_q - log_p)).sum(),
        "forward": (log_p.exp() * (log_p - log_q)).sum(),
    }[target]
    (expected,) = torch.autograd.grad(true, table)
    assert torch.allclose(gradient, expected, atol=1e-12)


def test_shaped_reward_by_hand_and_detached():
    reward, ref = torch.tensor([1.0, -2.0]), torch.tensor([-3.0, -5.0])
    logprob = torch.tensor([-1.0, -6.0], requires_grad=True)
    shaped = shaped_reward(reward, logprob, ref, beta=0.5)
    assert shaped.tolist() == [0.0, -1.5]
    assert not shaped.requires_grad
    assert torch.equal(shaped_reward(reward, logprob, ref, beta=0.0), reward)


def _sequences_of_all_completions():
    """Every completion as a row after a prompt of one token; pad is the EOS."""
    return collate([([0], list(completion)) for completion in COMPLETIONS], pad_id=EOS)


def _logits_of_all_completions(table, sequences):
    logits = torch.full((*sequences.ids.shape, VOCAB), float("nan"))  # what is not read may be anything
    for row, completion in enumerate(COMPLETIONS):
        for t in range(len(completion)):
            logits[row, t] = table[PREFIXES.index(completion[:t])].float()
    return logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_full_kl_equals_a_sum_over_the_vocabulary_and_averages_to_the_kl(temperature):
    policy, ref = _random_logits(0, 3, VOCAB), _random_logits(1, 3, VOCAB)
    sequences = _sequences_of_all_completions()
    per_row = full_kl(
        _logits_of_all_completions(policy, sequences),
        _logits_of_all_completions(ref, sequences),
        sequences,
        temperature,
    )
    assert per_row.dtype == torch.float32
    log_q, log_p = (torch.log_softmax(table / temperature, -1) for table in (policy, ref))
    by_prefix = [_kl(log_q[i], log_p[i]) for i in range(len(PREFIXES))]
    slow = [sum(by_prefix[PREFIXES.index(row[:t])] for t in range(len(row))) for row in COMPLETIONS]
    assert per_row.tolist() == pytest.approx(slow, abs=1e-6)
    # KL(q||p) over completions is the expected sum of the KLs of the next token
    whole_q, whole_p = _log_distribution(policy / temperature), _log_distribution(ref / temperature)
    average = (whole_q.exp() * per_row.double()).sum().item()
    assert average == pytest.approx(_kl(whole_q, whole_p), abs=1e-6)


def test_full_kl_of_equal_logits_is_exactly_zero_and_never_negative():
    sequences = collate([([0, 1], [1, 2, 0]), ([1], [2])], pad_id=0)
    for seed in range(5):
        logits = 3 * _random_logits(seed, 2, 5, VOCAB).float()
        assert full_kl(logits, logits.clone(), sequences).tolist() == [0.0, 0.0]
        nearly = full_kl(logits, logits + 1e-7 * _random_logits(9, 2, 5, VOCAB).float(), sequences)
        assert (nearly >= 0).all()
        assert (full_kl(logits, _random_logits(8, 2, 5, VOCAB).float(), sequences) > 0).all()


def test_full_kl_ignores_a_constant_per_position_and_rows_without_completion():
    sequences = collate([([0, 1], [1, 2]), ([1, 0, 2], [])], pad_id=0)
    policy, ref = _random_logits(0, 2, 4, VOCAB).float(), _random_logits(1, 2, 4, VOCAB).float()
    values = full_kl(policy, ref, sequences)
    assert torch.allclose(full_kl(policy + 5.0, ref - 2.0, sequences), values, atol=1e-5)
    assert values[0] > 0 and values[1] == 0.0


def test_full_kl_gradient_equals_a_slow_implementation():
    ids = torch.tensor([[0, 1, 2]])
    everything = torch.ones_like(ids, dtype=torch.bool)
    sequences = Sequences(ids, everything, torch.tensor([[False, True, True]]))
    policy = _random_logits(0, 1, 3, VOCAB).float().requires_grad_()
    ref = _random_logits(1, 1, 3, VOCAB).float()
    full_kl(policy, ref, sequences).sum().backward()
    again = policy.detach().double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for t in (0, 1):
        q = again[0, t].exp() / again[0, t].exp().sum()
        p = ref[0, t].double().exp() / ref[0, t].double().exp().sum()
        total = total + (q * torch.log(q / p)).sum()
    total.backward()
    assert torch.allclose(policy.grad.double(), again.grad, atol=1e-6)
    assert again.grad.abs().max() > 0.05
