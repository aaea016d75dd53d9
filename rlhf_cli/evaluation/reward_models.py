"""Measuring a reward model on held-out pairs: ranking, calibration, length bias, consistency, each with an interval.

Figures, over Q pairs (`rm/` in front):

    accuracy, accuracy/<subset>     share with the higher reward for chosen; a tie counts one half
    section/<section>               RewardBench's scores, where its subsets are there
    margin                          raw reward of chosen minus rejected
    chosen_reward, rejected_reward  standardised
    nll, brier, ece                 of P(chosen is preferred) = sigmoid(log-odds)
    calibrated/nll, ...             the same of sigmoid(log-odds / temperature)
    length/pearson, length/spearman of the standardised reward with the length of the completion in tokens
    length/accuracy_shorter, _longer  accuracy on pairs whose chosen completion is the shorter, the longer one
    gold/spearman                   of the reward with the gold reward, where the data knows it
    disagreement, ...               of an ensemble's members, and on pairs ranked rightly and wrongly
    consistency                     largest difference of a raw reward scored in another company
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit
from torch import Tensor

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.tokenise import TokenPair, collate
from rlhf_cli.evaluation.statistics import Bootstrap, Estimate, expected_calibration_error
from rlhf_cli.models.positions import max_positions
from rlhf_cli.rewards.ensemble import EnsembleRewardModel
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel, Scorer
from rlhf_cli.rewards.scoring import MAX_ROWS, logits_of_rows, score_sequences
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Preference, Scores

Column = NDArray[np.float64]

# Pairs that `consistency` scores again and again, and the batch it compares with the usual one.
CONSISTENCY_PAIRS = 64
_OTHER_BATCH = 7


@dataclass(frozen=True)
class Side:
    """The chosen completions of Q pairs, or the rejected ones."""

    raw: Column  # [Q], the reward model's own scale
    reward: Column  # [Q], standardised
    length: Column  # [Q], tokens of the completion as it is scored: cut at the cap, the EOS included
    gold: Column | None = None  # [Q]
    disagreement: Column | None = None  # [Q], std of an ensemble's members, standardised


@dataclass(frozen=True)
class PairScores:
    """Scores of Q pairs."""

    chosen: Side
    rejected: Side
    log_odds: Column  # [Q], uncalibrated, that chosen is preferred
    temperature: float = 1.0  # what the stored calibration divides them by
    subsets: Sequence[str] = ()  # part of the data each pair is from, Q; empty where the data has no parts
    logits: tuple[Tensor, Tensor] | None = None  # float32 [Q, K] each, of the chosen and of the rejected

    def __len__(self) -> int:
        return len(self.log_odds)

    @property
    def margin(self) -> Column:
        """r+ - r-, raw."""
        return self.chosen.raw - self.rejected.raw

    @property
    def right(self) -> Column:
        """1 where chosen has the higher reward, 1/2 in a tie, else 0."""
        return (self.margin > 0) + 0.5 * (self.margin == 0)

    @property
    def accuracy(self) -> float:
        """Share of the pairs whose preferred side has the higher reward; a tie counts one half."""
        return float(np.mean((self.margin > 0) + 0.5 * (self.margin == 0)))

    @property
    def nll(self) -> float:
        """Mean of -log P(chosen is preferred), nats, uncalibrated."""
        return float(np.mean(np.logaddexp(0.0, -self.log_odds)))

    @property
    def probability(self) -> Column:
        """P(chosen is preferred) = sigmoid(log-odds)."""
        return expit(self.log_odds)

    @property
    def calibrated_probability(self) -> Column:
        """sigmoid(log-odds / temperature)."""
        return expit(self.log_odds / self.temperature)


def score_pairs(
    reward_model: Scorer,
    pairs: Sequence[Preference],
    precision: Precision,
    gold: GoldReward | None = None,
    max_rows: int = MAX_ROWS,
) -> PairScores:
    """Scores both completions of every pair, at most `max_rows` in a forward pass."""
    prompts = [pair.prompt for pair in pairs]
    texts = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    with precision.autocast():
        chosen, rejected = reward_model.score_sides(pairs, max_rows)
    subsets = [pair.subset for pair in pairs]

    def side(scores: Scores, completions: Sequence[str]) -> Side:
        asked = list(zip(prompts, completions, strict=True))
        lengths = [
            len(reward_model.format.encode(reward_model.tokenizer, prompt, text)[1]) for prompt, text in asked
        ]
        return Side(
            raw=scores.raw.double().numpy(),
            reward=scores.reward.double().numpy(),
            length=np.array(lengths, dtype=np.float64),
            gold=None if gold is None else np.array([gold(prompt, text) for prompt, text in asked]),
            disagreement=None if scores.disagreement is None else scores.disagreement.double().numpy(),
        )

    return PairScores(
        side(chosen, texts[0]),
        side(rejected, texts[1]),
        reward_model.log_odds(chosen, rejected).double().numpy(),
        reward_model.format.temperature,
        subsets if any(subsets) else (),
        None if chosen.logits is None or rejected.logits is None else (chosen.logits, rejected.logits),
    )


def consistency(reward_model: Scorer, pairs: Sequence[Preference], precision: Precision) -> float:
    """Largest difference of a raw score in another company, over the completions of the first 64 pairs.

    Each alone is compared with batches of 7 as they stand, padded on the right, on the left and to twice the width,
    and with all of them scored at once. Above the rounding of the precision it means that what a completion is worth
    depends on its neighbours. Of several models it is the largest of theirs.
    """
    sides = [(pair.prompt, text) for pair in pairs[:CONSISTENCY_PAIRS] for text in (pair.chosen, pair.rejected)]
    prompts, texts = zip(*sides, strict=True)
    rows = reward_model.format.encode_all(reward_model.tokenizer, prompts, texts)
    models = reward_model.members if isinstance(reward_model, EnsembleRewardModel) else [reward_model]
    return max(_inconsistency(one, reward_model.format, rows, precision) for one in models)


@torch.no_grad()
def _inconsistency(
    one: RewardModel, text_format: RewardFormat, rows: Sequence[TokenPair], precision: Precision
) -> float:
    pad_id, longest = int(one.tokenizer.pad_token_id), max(len(prompt) + len(text) for prompt, text in rows)
    limit = max_positions(one.model)
    wide = 2 * longest if limit is None else min(2 * longest, limit)

    def raw(size: int, side: str = "right", width: int | None = None) -> Tensor:
        parts = [
            score_sequences(one.model, collate(rows[i : i + size], pad_id, side, width).to(one.model.device))
            for i in range(0, len(rows), size)
        ]
        return text_format.raw(torch.cat(parts).float().cpu())

    with precision.autocast():
        alone = raw(1)
        together = text_format.raw(logits_of_rows(one.model, one.tokenizer, rows))
        others = (together, raw(_OTHER_BATCH), raw(_OTHER_BATCH, "left"), raw(_OTHER_BATCH, "right", wide))
    return max(float((alone - other).abs().max()) for other in others)


def summarise_pairs(scores: PairScores, num_resamples: int, seed: int) -> dict[str, Estimate]:
    """The figures of the pairs, as this file's head lists them, but for those of RewardBench and consistency.

    Resamples of the ECE are larger on average than the figure itself, because |.| adds up their noise: its interval
    is that of the resamples, moved back by their mean excess.
    """
    bootstrap = Bootstrap(len(scores), num_resamples, seed)
    return {
        "rm/accuracy": bootstrap.mean(scores.right),
        **_by_subset(scores, num_resamples, seed),
        "rm/margin": bootstrap.mean(scores.margin),
        "rm/chosen_reward": bootstrap.mean(scores.chosen.reward),
        "rm/rejected_reward": bootstrap.mean(scores.rejected.reward),
        **_calibration(scores, bootstrap),
        **_length_bias(scores, bootstrap, num_resamples, seed),
        **_gold_rank(scores, bootstrap),
        **_disagreement(scores, bootstrap),
    }


def pair_rows(scores: PairScores) -> Iterator[dict[str, Any]]:
    """One row a pair, as rm_pairs.jsonl has them."""
    calibrated = scores.calibrated_probability
    for i in range(len(scores)):
        row: dict[str, Any] = {"pair": i, "subset": scores.subsets[i] if scores.subsets else ""}
        for name, side in (("chosen", scores.chosen), ("rejected", scores.rejected)):
            row |= {f"{name}_reward": float(side.reward[i]), f"{name}_raw": float(side.raw[i])}
            row[f"{name}_length"] = int(side.length[i])
            if side.gold is not None:
                row[f"{name}_gold"] = float(side.gold[i])
            if side.disagreement is not None:
                row[f"{name}_disagreement"] = float(side.disagreement[i])
        yield row | {"log_odds": float(scores.log_odds[i]), "probability": float(calibrated[i])}


def _by_subset(scores: PairScores, num_resamples: int, seed: int) -> dict[str, Estimate]:
    names = list(dict.fromkeys(scores.subsets))
    if len(names) < 2:
        return {}
    places = {name: np.array([one == name for one in scores.subsets]) for name in names}
    return {
        f"rm/accuracy/{name}": _accuracy(scores.right, place, num_resamples, seed)
        for name, place in places.items()
    }


def _accuracy(right: Column, place: NDArray[np.bool_], num_resamples: int, seed: int) -> Estimate:
    part = right[place]
    return Bootstrap(len(part), num_resamples, seed).mean(part)


def _calibration(scores: PairScores, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Proper scores and calibration error, before the stored temperature and after it."""

    def of(log_odds: Column) -> dict[str, Estimate]:
        return {
            "nll": bootstrap.mean(np.logaddexp(0.0, -log_odds)),
            "brier": bootstrap.mean((1 - expit(log_odds)) ** 2),
            "ece": _calibration_error(expit(log_odds), bootstrap),
        }

    before = of(scores.log_odds)
    after = before if scores.temperature == 1 else of(scores.log_odds / scores.temperature)
    return {
        **{f"rm/{name}": estimate for name, estimate in before.items()},
        **{f"rm/calibrated/{name}": estimate for name, estimate in after.items()},
        "rm/temperature": without_interval(scores.temperature, len(scores)),
    }


def _calibration_error(probability: Column, bootstrap: Bootstrap) -> Estimate:
    outcome, resampled = np.ones(len(probability)), []

    def error(rows: NDArray[np.int64]) -> float:
        resampled.append(expected_calibration_error(probability[rows], outcome))
        return resampled[-1]

    found = bootstrap.of_rows(error)
    if found.n == 1:
        return found
    excess = float(np.mean(resampled[1:])) - found.value
    lo, hi = np.clip([found.lo - excess, found.hi - excess], 0.0, 1.0)
    return Estimate(found.value, float(lo), float(hi), found.n)


def _length_bias(scores: PairScores, bootstrap: Bootstrap, num_resamples: int, seed: int) -> dict[str, Estimate]:
    chosen, rejected = scores.chosen, scores.rejected
    reward = np.stack([chosen.reward, rejected.reward], axis=1)
    length = np.stack([chosen.length, rejected.length], axis=1)
    figures = {
        "rm/length/pearson": _correlation(stats.pearsonr, reward, length, bootstrap),
        "rm/length/spearman": _correlation(stats.spearmanr, reward, length, bootstrap),
    }
    for name, place in (("shorter", chosen.length < rejected.length), ("longer", chosen.length > rejected.length)):
        if place.any():
            figures[f"rm/length/accuracy_{name}"] = _accuracy(scores.right, place, num_resamples, seed)
    return figures


def _gold_rank(scores: PairScores, bootstrap: Bootstrap) -> dict[str, Estimate]:
    chosen, rejected = scores.chosen, scores.rejected
    if chosen.gold is None or rejected.gold is None:
        return {}
    reward = np.stack([chosen.reward, rejected.reward], axis=1)
    gold = np.stack([chosen.gold, rejected.gold], axis=1)
    return {"rm/gold/spearman": _correlation(stats.spearmanr, reward, gold, bootstrap)}


def _correlation(kind: Callable[[Column, Column], Any], x: Column, y: Column, bootstrap: Bootstrap) -> Estimate:
    """Of all 2Q completions; pairs are resampled, because the two of a pair share a prompt. x, y: [Q, 2].

    NaN where one of them is constant.
    """

    def of(rows: NDArray[np.int64]) -> float:
        one, other = x[rows].ravel(), y[rows].ravel()
        if one.min() == one.max() or other.min() == other.max():
            return math.nan
        return float(kind(one, other).statistic)

    return bootstrap.of_rows(of)


def _disagreement(scores: PairScores, bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Mean over a pair's two completions; and whether it is larger where the ranking is wrong."""
    if scores.chosen.disagreement is None or scores.rejected.disagreement is None:
        return {}
    spread = (scores.chosen.disagreement + scores.rejected.disagreement) / 2
    right, wrong = (scores.margin > 0).astype(np.float64), (scores.margin < 0).astype(np.float64)
    figures = {"rm/disagreement": bootstrap.mean(spread)}
    for name, place in (("right", right), ("wrong", wrong)):
        if place.any():
            found = bootstrap.ratio(spread * place, place)
            figures[f"rm/disagreement/{name}"] = Estimate(found.value, found.lo, found.hi, int(place.sum()))
    if right.any() and wrong.any():
        figures["rm/disagreement/excess"] = bootstrap.ratio_delta(spread * wrong, wrong, spread * right, right)
    return figures


def without_interval(value: float, n: int) -> Estimate:
    """A figure that is no mean over pairs."""
    return Estimate(value, math.nan, math.nan, n)


def margin_histogram(margin: Column, num_bins: int = 30) -> tuple[Column, NDArray[np.int64]]:
    """Edges [B + 1] and counts [B] of the margins, 0 among the edges, so that no bin has right and wrong pairs.

    The edges are multiples of one width; a tie is in the bin above 0.
    """
    reach = float(np.abs(margin).max()) or 1.0
    width = 2 * reach / num_bins * (1 + 1e-9)  # or rounding could leave the outermost pair out
    low, high = math.floor(float(margin.min()) / width), math.floor(float(margin.max()) / width) + 1
    edges = np.arange(min(low, 0), max(high, 1) + 1, dtype=np.float64) * width
    counts, _ = np.histogram(margin, edges)
    return edges, counts.astype(np.int64)
