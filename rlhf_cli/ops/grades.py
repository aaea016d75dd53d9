"""A distributional reward model's maths: K >= 2 ordered grades 1..K of a completion, p = softmax(logits [N, K]).

Everything is in log space, O(K), float32 (float64 where the logits are), and shifting a row of logits changes nothing.
A strict win is an improper score: two completions that nobody can tell apart get at most (1 - 1/K) / 2, which a model
raises by smearing its grades. Half a tie to each side is proper, and so the default elsewhere.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_cli.settings import GradeLoss, ReadOut


def log_pair_probability(winner_logits: Tensor, loser_logits: Tensor, loss: GradeLoss) -> Tensor:
    """log P(w > l) where both grades are drawn independently.

        strict    P(w > l) = sum_{i>j} p_i(w) p_j(l)
        half_tie  P(w > l) = sum_{i>j} p_i(w) p_j(l) + 1/2 sum_i p_i(w) p_i(l)
        renorm    strict(w, l) / (strict(w, l) + strict(l, w)), no tie being possible

    half_tie as logsumexp_i [l_w(i) + log(F_l(i-1) + p_l(i) / 2)], l = log p, F the distribution function. The first
    grade stands apart, so that no log F(0) = -inf is among what has a gradient.

    Args:
        winner_logits: [N, K], of the preferred completions.
        loser_logits: [N, K].
        loss: which P.

    Returns:
        [N], nats. A P of one may come out a rounding above it: for probabilities take sigmoid(`pair_log_odds`).

    >>> uniform = torch.zeros(1, 10)
    >>> [round(log_pair_probability(uniform, uniform, loss).exp().item(), 6) for loss in GradeLoss]
    [0.45, 0.5, 0.5]
    """
    winner, loser = _log_softmax(winner_logits), _log_softmax(loser_logits)
    match loss:
        case GradeLoss.strict:
            return _log_strict(winner, loser)
        case GradeLoss.half_tie:
            return _log_half_tie(winner, loser)
        case GradeLoss.renorm:
            return F.logsigmoid(_log_strict(winner, loser) - _log_strict(loser, winner))


def grade_loss(winner_logits: Tensor, loser_logits: Tensor, normaliser: float, loss: GradeLoss) -> Tensor:
    """-(1/n) sum log P(w > l), with the P of `log_pair_probability`.

    Args:
        winner_logits: [N, K], of the preferred completions.
        loser_logits: [N, K].
        normaliser: n, the number of pairs in the whole optimizer step.
        loss: which P.

    Returns:
        Scalar.

    >>> round(grade_loss(torch.zeros(1, 10), torch.zeros(1, 10), 1.0, GradeLoss.half_tie).item(), 6)
    0.693147
    """
    return -log_pair_probability(winner_logits, loser_logits, loss).sum() / normaliser


def pair_log_odds(first_logits: Tensor, second_logits: Tensor, loss: GradeLoss) -> Tensor:
    """log P(first > second) - log P(second > first): changes its sign, exactly, when the two change places.

    The two P of half_tie sum to one, and so do those of renorm. The two of strict do not: their odds are renorm's.

    Args:
        first_logits: [N, K].
        second_logits: [N, K].
        loss: which P.

    Returns:
        [N], nats; sigmoid of it is the probability that the first is preferred.

    >>> low, high = torch.tensor([[9.0, 0.0]]).log(), torch.tensor([[1.0, 1.0]]).log()
    >>> round(pair_log_odds(high, low, GradeLoss.half_tie).sigmoid().item(), 6)  # 1/2 + 1/2 * 1/2
    0.75
    """
    first, second = _log_softmax(first_logits), _log_softmax(second_logits)
    log_probability = _log_half_tie if loss is GradeLoss.half_tie else _log_strict
    return log_probability(first, second) - log_probability(second, first)


def sum_probabilities(logits: Tensor) -> Tensor:
    """sum_n p_n without gradient, [K]; over the step's micro-batches and divided by n it is the step's marginal."""
    return _log_softmax(logits.detach()).exp().sum(dim=0)


def entropy_bonus(logits: Tensor, marginal: Tensor, normaliser: float) -> Tensor:
    """-(1/n) sum_n sum_k p_nk log m_k: adds up over micro-batches to H(m), in value and in gradient.

    H of the step's marginal m = (1/n) sum_n p_n is no sum over micro-batches, but with m held constant this is one.
    dH = -sum_k (log m_k + 1) dm_k, and the 1 drops out because sum_k dm_k = 0. Only where m is the whole step's.

    Args:
        logits: [N, K], of one micro-batch, with gradient.
        marginal: m [K], detached: `sum_probabilities` of the whole step over n.
        normaliser: n, the number of rows of logits in the whole optimizer step.

    Returns:
        Scalar, nats; to be added to what is maximised.
    """
    p = _log_softmax(logits).exp()
    # A grade whose m underflows has p = 0 in every row: the clamp only keeps 0 * inf out.
    log_marginal = marginal.detach().clamp(min=torch.finfo(marginal.dtype).tiny).log()
    return -(p * log_marginal).sum() / normaliser


def mean_grade(logits: Tensor) -> Tensor:
    """Mean of the grades 1..K, [N].

    >>> mean_grade(torch.zeros(1, 4)).item()
    2.5
    """
    p = _log_softmax(logits).exp()
    return (p * _grades(p)).sum(dim=-1)


def std_grade(logits: Tensor) -> Tensor:
    """Standard deviation of the grades 1..K, [N]; for reading out, its gradient at a deviation of 0 being infinite.

    >>> std_grade(torch.tensor([[0.0, -torch.inf, 0.0]])).item()
    1.0
    """
    p = _log_softmax(logits).exp()
    distance = _grades(p) - mean_grade(logits)[:, None]
    return (p * distance.square()).sum(dim=-1).sqrt()


def read_out(
    logits: Tensor, how: ReadOut, std_weight: float = 1.0, alpha: float = 0.1, opponent: Tensor | None = None
) -> Tensor:
    """The reward of a distribution over grades; higher is better in each.

    Args:
        logits: [N, K].
        how: mean; mean_std = mean - c * std; cvar = the mean grade of the worst alpha of the mass
            (Rockafellar & Uryasev 2000), the grade on the boundary counting in part; win_rate = the probability of
            beating a grade drawn from the opponent's distribution, a tie counting one half.
        std_weight: c, read by mean_std.
        alpha: above 0 to 1, read by cvar; 1 gives the mean.
        opponent: p [K], which sums to one, read by win_rate.

    Returns:
        [N]: grades, 1..K (below with mean_std), or a probability with win_rate.

    >>> logits = torch.log(torch.tensor([[0.1, 0.3, 0.6]]))
    >>> read_out(logits, ReadOut.cvar, alpha=0.2).item()  # half of it grade 1, half grade 2
    1.5
    >>> read_out(logits, ReadOut.win_rate, opponent=torch.tensor([0.0, 1.0, 0.0])).item()
    0.75
    """
    match how:
        case ReadOut.mean:
            return mean_grade(logits)
        case ReadOut.mean_std:
            return mean_grade(logits) - std_weight * std_grade(logits)
        case ReadOut.cvar:
            return _cvar(_log_softmax(logits).exp(), alpha)
        case ReadOut.win_rate:
            assert opponent is not None, "win_rate needs the opponent's distribution"
            p = _log_softmax(logits).exp()
            opponent = opponent.to(p)
            # no matrix product: under autocast it would be one of half precision
            return (p * (opponent.cumsum(dim=0) - opponent / 2)).sum(dim=-1)


def _cvar(p: Tensor, alpha: float) -> Tensor:
    """(1/alpha) sum_i i (min(F_i, alpha) - min(F_{i-1}, alpha)), summed by parts with F_K = 1."""
    below = p.cumsum(dim=-1)[:, :-1]
    return p.shape[-1] - (below / alpha).clamp(max=1.0).sum(dim=-1)


def _log_strict(winner: Tensor, loser: Tensor) -> Tensor:
    return torch.logsumexp(winner[:, 1:] + loser.logcumsumexp(dim=-1)[:, :-1], dim=-1)


def _log_half_tie(winner: Tensor, loser: Tensor) -> Tensor:
    half = loser - math.log(2.0)
    above_first = torch.logaddexp(loser.logcumsumexp(dim=-1)[:, :-1], half[:, 1:])
    return torch.logsumexp(winner + torch.cat([half[:, :1], above_first], dim=-1), dim=-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits if logits.dtype is torch.float64 else logits.float(), dim=-1)


def _grades(p: Tensor) -> Tensor:
    return torch.arange(1, p.shape[-1] + 1, dtype=p.dtype, device=p.device)
