import itertools
import math

import pytest
import torch
from fixtures_rewards import marginal_entropy
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cli.ops.grades import (
    entropy_bonus,
    grade_loss,
    log_pair_probability,
    mean_grade,
    pair_log_odds,
    read_out,
    std_grade,
    sum_probabilities,
)
from rlhf_cli.settings import GradeLoss, ReadOut

K = 10
PROPER = [GradeLoss.half_tie, GradeLoss.renorm]
LOGITS = st.lists(st.floats(-80, 80, width=32), min_size=K, max_size=K)
OPPONENT = torch.tensor([0.0, 0.2, 0.1, 0.1, 0.05, 0.3, 0.0, 0.05, 0.1, 0.1])


def _random(seed, rows=6, k=K, scale=2.0, dtype=torch.float64):
    return scale * torch.randn(rows, k, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _slow_probability(winner, loser, loss):
    """Over all K^2 pairs of grades, with probabilities."""
    p, q = winner.double().softmax(-1), loser.double().softmax(-1)
    k = p.shape[-1]
    above = sum(p[:, i] * q[:, j] for i in range(k) for j in range(i))
    below = sum(p[:, i] * q[:, j] for j in range(k) for i in range(j))
    if loss is GradeLoss.strict:
        return above
    return above / (above + below) if loss is GradeLoss.renorm else above + (p * q).sum(-1) / 2


def _extremes(size):
    """Rows at +-size: all mass on one grade, on several, at both ends, and signs drawn at random."""
    one = torch.full((K, K), -size).fill_diagonal_(size)
    rows = [one[i] for i in (0, 1, 4, 8, 9)]
    rows += [-row for row in rows]
    rows += [torch.full((K,), size), torch.linspace(-size, size, K), torch.linspace(size, -size, K)]
    ends = torch.full((K,), -size)
    ends[0] = ends[-1] = size
    signs = torch.randint(2, (8, K), generator=torch.Generator().manual_seed(7)) * 2.0 * size - size
    rows = torch.stack([*rows, ends, -ends, *signs])
    pairs = list(itertools.product(range(len(rows)), repeat=2))
    return rows[[i for i, _ in pairs]].clone(), rows[[j for _, j in pairs]].clone()


def _value_and_gradient(function, winner, loser):
    winner, loser = winner.detach().requires_grad_(), loser.detach().requires_grad_()
    value = function(winner, loser)
    return value.detach().double(), *(g.double() for g in torch.autograd.grad(value.sum(), (winner, loser)))


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("loss", GradeLoss)
def test_the_probability_is_that_of_all_pairs_of_grades(loss, k):
    winner, loser = _random(0, k=k), _random(1, k=k)
    expected = _value_and_gradient(lambda a, b: _slow_probability(a, b, loss).log(), winner, loser)
    actual = _value_and_gradient(lambda a, b: log_pair_probability(a, b, loss), winner, loser)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@settings(deadline=None)
@given(LOGITS)
def test_two_that_cannot_be_told_apart_win_half_of_the_time(logits):
    row = torch.tensor([logits])
    assert log_pair_probability(row, row, GradeLoss.half_tie).exp().item() == pytest.approx(0.5, abs=2e-5)
    assert log_pair_probability(row, row, GradeLoss.renorm).exp().item() == 0.5
    assert log_pair_probability(row, row, GradeLoss.strict).exp().item() <= 0.45 + 1e-5


@settings(deadline=None)
@given(LOGITS, LOGITS)
def test_one_of_two_wins(first, second):
    a, b = torch.tensor([first]), torch.tensor([second])
    for loss in PROPER:
        both = log_pair_probability(a, b, loss).exp() + log_pair_probability(b, a, loss).exp()
        assert both.item() == pytest.approx(1, abs=3e-5)


def test_a_strict_win_of_equals_is_less_likely_than_half():
    uniform = torch.zeros(1, K)
    assert log_pair_probability(uniform, uniform, GradeLoss.strict).exp().item() == pytest.approx(0.45)


@pytest.mark.parametrize("loss", GradeLoss)
def test_60_logits_apart_value_and_gradient_are_those_of_exact_probabilities(loss):
    winner, loser = _extremes(60.0)
    actual = _value_and_gradient(lambda a, b: log_pair_probability(a, b, loss), winner, loser)
    exact = _value_and_gradient(lambda a, b: _slow_probability(a, b, loss).log(), winner.double(), loser.double())
    for a, b in zip(actual, exact, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
        # Log-probabilities of -120 are float32 numbers 8e-6 apart, of -240 twice as much.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("size", [200.0, 1e4])
@pytest.mark.parametrize("loss", GradeLoss)
def test_value_and_gradient_are_finite_wherever_the_logits_are(loss, size):
    winner, loser = _extremes(size)
    for quantity in _value_and_gradient(lambda a, b: grade_loss(a, b, 3.0, loss), winner, loser):
        assert quantity.isfinite().all()
    for quantity in _value_and_gradient(lambda a, b: pair_log_odds(a, b, loss), winner, loser):
        assert quantity.isfinite().all()


def test_renorm_knows_the_odds_of_two_that_share_their_one_grade():
    # Wins of the first: 6 against 5 and 5 against 4. Of the second: 5 against 4 grades, 5 grades against 5.
    first, second = torch.full((1, K), -400.0), torch.full((1, K), -400.0)
    first[0, 4] = second[0, 4] = 0.0
    first[0, 5], second[0, 3] = -200.0, -200.0
    odds = pair_log_odds(first, second, GradeLoss.renorm).item()
    assert odds == pytest.approx(200 + math.log(2 / 9))  # 2 e^-200 against 9 e^-400
    assert log_pair_probability(second, first, GradeLoss.renorm).item() == pytest.approx(-odds)


@pytest.mark.parametrize("loss", GradeLoss)
def test_gradcheck(loss):
    winner, loser = _random(2, rows=3).requires_grad_(), _random(3, rows=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: log_pair_probability(a, b, loss), (winner, loser))
    assert torch.autograd.gradcheck(lambda a, b: pair_log_odds(a, b, loss), (winner, loser))


@pytest.mark.parametrize("loss", GradeLoss)
def test_a_constant_added_to_the_logits_changes_nothing(loss):
    winner, loser = _random(4), _random(5)
    shift = torch.arange(6.0, dtype=torch.float64)[:, None]
    shifted = log_pair_probability(winner + 3 * shift, loser - shift, loss)
    torch.testing.assert_close(shifted, log_pair_probability(winner, loser, loss))
    for how in ReadOut:
        torch.testing.assert_close(
            read_out(winner + shift, how, opponent=OPPONENT), read_out(winner, how, opponent=OPPONENT)
        )


@pytest.mark.parametrize("loss", GradeLoss)
def test_micro_batch_losses_add_up_to_minus_the_mean_log_probability(loss):
    winner, loser = _random(6), _random(7)
    parts = sum(grade_loss(winner[s], loser[s], 6.0, loss) for s in (slice(0, 4), slice(4, 6)))
    torch.testing.assert_close(parts, -_slow_probability(winner, loser, loss).log().mean())


@pytest.mark.parametrize("loss", GradeLoss)
def test_half_precision_is_computed_in_single(loss):
    winner, loser = (x.to(torch.bfloat16) for x in (_random(8), _random(9)))
    actual = log_pair_probability(winner, loser, loss)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, log_pair_probability(winner.float(), loser.float(), loss))


@pytest.mark.parametrize("loss", PROPER)
def test_odds_belong_to_the_probability_and_change_sign_with_the_order(loss):
    first, second = _random(10), _random(11)
    odds = pair_log_odds(first, second, loss)
    torch.testing.assert_close(odds.sigmoid(), _slow_probability(first, second, loss))
    assert torch.equal(odds, -pair_log_odds(second, first, loss))


def test_the_odds_of_strict_are_those_of_renorm():
    first, second = _random(10), _random(11)
    odds = pair_log_odds(first, second, GradeLoss.strict)
    assert torch.equal(odds, pair_log_odds(first, second, GradeLoss.renorm))


def test_the_bonus_adds_up_over_micro_batches_to_the_entropy_of_the_whole_step():
    logits = _random(12, rows=7).requires_grad_()
    direct = marginal_entropy(logits.softmax(-1).mean(0))
    (expected,) = torch.autograd.grad(direct, logits)
    chunks = (slice(0, 3), slice(3, 4), slice(4, 7))
    marginal = sum(sum_probabilities(logits[rows]) for rows in chunks) / 7
    parts = [entropy_bonus(logits[rows], marginal, 7.0) for rows in chunks]
    (actual,) = torch.autograd.grad(sum(parts), logits)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(sum(parts), direct)
    # The sum of the micro-batches' own entropies is another quantity.
    own = sum(marginal_entropy(logits[rows].softmax(-1).mean(0)) for rows in chunks)
    assert not torch.allclose(torch.autograd.grad(own, logits)[0], expected, rtol=1e-2)


def test_the_bonus_is_finite_where_a_grade_is_never_used():
    logits = torch.full((3, K), -60.0)
    logits[:, 2:4] = 60.0
    logits.requires_grad_()
    bonus = entropy_bonus(logits, sum_probabilities(logits) / 3, 3.0)
    (gradient,) = torch.autograd.grad(bonus, logits)
    assert sum_probabilities(logits)[0] == 0
    assert bonus.item() == pytest.approx(math.log(2)) and gradient.abs().max() < 1e-6


def _worst_share(p, alpha):
    """Mean of the lowest `alpha` of the mass, grade by grade."""
    left, total = alpha, 0.0
    for grade, mass in enumerate(p, start=1):
        taken = min(mass, left)
        total, left = total + grade * taken, left - taken
    return total / alpha


def _slow_read_out(p, how, alpha=0.1):
    mean = sum(grade * mass for grade, mass in enumerate(p, start=1))
    match how:
        case ReadOut.mean:
            return mean
        case ReadOut.mean_std:
            second = sum(grade**2 * mass for grade, mass in enumerate(p, start=1))
            return mean - 0.5 * math.sqrt(second - mean**2)
        case ReadOut.cvar:
            return _worst_share(p, alpha)
        case ReadOut.win_rate:
            q = OPPONENT.tolist()
            return sum(p[i] * q[j] * (1.0 if i > j else 0.5) for i in range(K) for j in range(K) if i >= j)


@pytest.mark.parametrize("alpha", [0.03, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("how", ReadOut)
def test_read_outs_equal_slow_ones(how, alpha):
    logits = _random(13)
    expected = [_slow_read_out(p, how, alpha) for p in logits.softmax(-1).tolist()]
    actual = read_out(logits, how, std_weight=0.5, alpha=alpha, opponent=OPPONENT.double())
    assert actual.tolist() == pytest.approx(expected, abs=1e-7)


def test_cvar_of_everything_is_the_mean_and_of_less_is_lower():
    logits = _random(14, scale=0.3, dtype=torch.float32)
    torch.testing.assert_close(read_out(logits, ReadOut.cvar, alpha=1.0), mean_grade(logits))
    torch.testing.assert_close(read_out(logits, ReadOut.cvar, alpha=1e-9), torch.ones(6))
    levels = [read_out(logits, ReadOut.cvar, alpha=alpha) for alpha in (0.4, 0.6, 0.8, 1.0)]
    for lower, higher in itertools.pairwise(levels):
        assert (lower < higher).all()


def test_of_a_certain_grade_every_read_out_is_known():
    logits = torch.full((1, K), -60.0)
    logits[0, 6] = 60.0
    for how in (ReadOut.mean, ReadOut.mean_std, ReadOut.cvar):
        assert read_out(logits, how).item() == pytest.approx(7)
    assert std_grade(logits).item() == pytest.approx(0, abs=1e-6)
    assert read_out(logits, ReadOut.win_rate, opponent=torch.eye(K)[6]).item() == 0.5
    assert read_out(logits, ReadOut.win_rate, opponent=torch.eye(K)[5]).item() == 1.0
