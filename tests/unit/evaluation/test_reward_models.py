from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures_models import CPU, FP32, reward_model
from scipy import stats
from transformers import PreTrainedModel

from rlhf_cli.evaluation.reward_models import (
    PairScores,
    Side,
    consistency,
    margin_histogram,
    pair_rows,
    score_pairs,
    summarise_pairs,
)
from rlhf_cli.evaluation.statistics import Estimate
from rlhf_cli.rewards.ensemble import EnsembleRewardModel
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.train.precision import Precision
from rlhf_cli.types import Preference, Scores, Sequences

PAIRS = [
    Preference("the film ", "was good .", "was bad ."),
    Preference("a ", "warm , funny story !", "slow plot"),
    Preference("the plot is ", "funny", "bad and slow ."),
    Preference("the ", "film", "film"),
]


def side(raw: Sequence[float], **columns: Sequence[float]) -> Side:
    """Standardised with mean 1 and std 2; every completion has a length of its own unless it is given."""
    values = np.array(raw, dtype=np.float64)
    lengths = {"length": np.arange(len(values)) + 1.0}
    return Side(values, (values - 1) / 2, **(lengths | {name: np.array(c) * 1.0 for name, c in columns.items()}))


def pair_scores(*margins: float, shift: float = 0.0) -> PairScores:
    """Of a scalar reward model: its log-odds are the margins."""
    odds = np.array(margins, dtype=np.float64)
    return PairScores(side(odds + shift), side(np.full(len(odds), shift)), odds)


def draws(n: int, seed: int, scale: float = 1.0) -> PairScores:
    """Pairs whose probability sigmoid(margin) is right; with `scale` the model is over- or underconfident."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(0, 1.5, n)
    first_wins = rng.random(n) < 1 / (1 + np.exp(-margin))
    return pair_scores(*(scale * np.where(first_wins, margin, -margin)))


class TestScores:
    def test_every_pair_is_scored_in_its_place(self) -> None:
        reward = reward_model(mean=5.0, std=2.0)
        scores = score_pairs(reward, PAIRS, FP32)
        for i, pair in enumerate(PAIRS):
            raw = reward.score([pair.prompt] * 2, [pair.chosen, pair.rejected]).raw  # raw: not standardised
            for number, one, text in ((0, scores.chosen, pair.chosen), (1, scores.rejected, pair.rejected)):
                assert one.raw[i] == pytest.approx(float(raw[number]), abs=1e-5)
                assert one.reward[i] == pytest.approx((float(raw[number]) - 5) / 2, abs=1e-5)
                assert one.length[i] == len(reward.encode(pair.prompt, text)[1])
        assert scores.chosen.raw.dtype == scores.rejected.raw.dtype == np.float64
        assert scores.margin[3] == 0 and (scores.margin[:3] != 0).all()
        np.testing.assert_allclose(scores.log_odds, scores.margin, atol=1e-6)
        assert scores.temperature == 1 and scores.chosen.gold is None and scores.chosen.disagreement is None

    def test_gold_of_both_completions(self) -> None:
        scores = score_pairs(reward_model(), PAIRS, FP32, lambda prompt, text: len(text) - 100.0 * len(prompt))
        for one, texts in (
            (scores.chosen, [p.chosen for p in PAIRS]),
            (scores.rejected, [p.rejected for p in PAIRS]),
        ):
            expected = [len(text) - 100 * len(pair.prompt) for text, pair in zip(texts, PAIRS, strict=True)]
            assert one.gold is not None and one.gold.tolist() == expected

    def test_the_precision_of_the_run(self) -> None:
        full, half = (score_pairs(reward_model(), PAIRS, p) for p in (FP32, Precision("bf16", CPU)))
        assert (full.chosen.raw != half.chosen.raw).any()
        np.testing.assert_allclose(full.chosen.raw, half.chosen.raw, atol=0.1)

    def test_probability(self) -> None:
        scores = pair_scores(0.0, math.log(3), -math.log(3), 1e4, -1e4, shift=2.0)
        np.testing.assert_allclose(scores.probability[:3], [0.5, 0.75, 0.25])
        assert scores.probability[3] == 1 and 0 <= scores.probability[4] < 1e-300
        cooler = replace(scores, temperature=0.5)  # twice the log-odds
        np.testing.assert_allclose(cooler.calibrated_probability[:3], [0.5, 0.9, 0.1])
        np.testing.assert_array_equal(cooler.probability, scores.probability)

    def test_the_parts_of_the_data_stay_with_the_scores(self) -> None:
        assert score_pairs(reward_model(), PAIRS, FP32).subsets == ()
        parts = [replace(pair, subset=subset) for pair, subset in zip(PAIRS, "abba", strict=True)]
        assert list(score_pairs(reward_model(), parts, FP32).subsets) == ["a", "b", "b", "a"]


class TestSummary:
    def test_accuracy_by_subset(self) -> None:
        margins = pair_scores(1.0, -1.0, 2.0, 0.0, 3.0)
        names = ["hard", "hard", "easy", "hard", "easy"]
        summary = summarise_pairs(replace(margins, subsets=names), 200, 0)
        assert [name for name in summary if name.startswith("rm/accuracy/")] == [
            "rm/accuracy/hard",
            "rm/accuracy/easy",
        ]
        hard, easy = summary["rm/accuracy/hard"], summary["rm/accuracy/easy"]
        assert (hard.value, hard.n, easy.value, easy.n) == (0.5, 3, 1.0, 2)
        assert summary["rm/accuracy"] == summarise_pairs(margins, 200, 0)["rm/accuracy"]
        only = summarise_pairs(replace(margins, subsets=["one"] * 5), 200, 0)
        assert set(only) == set(summarise_pairs(margins, 200, 0)), "one subset is the whole"

    def test_accuracy_by_hand(self) -> None:
        # two right, one wrong, one tie
        accuracy = summarise_pairs(pair_scores(0.5, -1.0, 0.0, 2.0), 500, 0)["rm/accuracy"]
        assert accuracy.value == (2 + 0.5) / 4
        assert accuracy.lo <= accuracy.value <= accuracy.hi and accuracy.n == 4

    def test_margin_and_nll_by_hand(self) -> None:
        table = summarise_pairs(pair_scores(1.0, -2.0, 0.0, shift=7.0), 500, 0)
        assert table["rm/margin"].value == pytest.approx(-1 / 3)
        terms = [math.log1p(math.exp(-1)), math.log1p(math.exp(2)), math.log(2)]
        assert table["rm/nll"].value == pytest.approx(sum(terms) / 3)

    def test_a_certain_mistake_costs_its_margin(self) -> None:
        assert summarise_pairs(pair_scores(-1e4), 10, 0)["rm/nll"].value == pytest.approx(1e4)

    def test_calibration_by_hand(self) -> None:
        # p = 0.75 each and always right: both halves of the symmetrised bins are off by 0.25
        assert summarise_pairs(pair_scores(*[math.log(3)] * 8), 100, 0)["rm/ece"].value == pytest.approx(0.25)
        # of four with p = 0.75 three are right
        margins = [math.log(3)] * 3 + [-math.log(3)]
        assert summarise_pairs(pair_scores(*margins), 100, 0)["rm/ece"].value == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("n", [30, 300, 3000])
    def test_the_interval_of_the_calibration_error_contains_it(self, n: int) -> None:
        # the mean excess of the resamples is taken off, or a calibrated model lies below its own interval
        for seed in range(12):
            found = summarise_pairs(draws(n, seed), 100, seed)["rm/ece"]
            assert 0 <= found.lo <= found.value <= found.hi <= 1
            assert found.lo < found.hi and found.n == n

    def test_overconfidence_is_seen(self) -> None:
        right, sharp = (summarise_pairs(draws(3000, 1, scale), 200, 0)["rm/ece"] for scale in (1.0, 5.0))
        assert sharp.lo > right.hi

    def test_one_pair_has_no_interval(self) -> None:
        for estimate in summarise_pairs(pair_scores(1.0), 100, 0).values():
            assert math.isnan(estimate.lo) and math.isnan(estimate.hi) and estimate.n == 1

    def test_rewards_of_both_sides_are_standardised(self) -> None:
        table = summarise_pairs(pair_scores(1.0, 3.0, shift=2.0), 100, 0)
        assert table["rm/chosen_reward"].value == pytest.approx(((3 - 1) / 2 + (5 - 1) / 2) / 2)
        assert table["rm/rejected_reward"].value == pytest.approx((2 - 1) / 2)

    def test_brier_by_hand(self) -> None:
        brier = summarise_pairs(pair_scores(math.log(3), math.log(3), -math.log(4)), 100, 0)["rm/brier"]
        assert brier.value == pytest.approx((0.25**2 + 0.25**2 + 0.8**2) / 3)
        assert brier.lo <= brier.value <= brier.hi

    def test_the_seed_decides_the_intervals(self) -> None:
        def table(seed: int) -> dict[str, Estimate]:
            return dict(summarise_pairs(draws(50, 0), 100, seed))

        assert table(1) == table(1)
        for name, estimate in table(1).items():
            other = table(2)[name]
            if name == "rm/temperature" or name.startswith("rm/rejected") or "length" in name:
                continue  # no mean over pairs, or equal for all of them
            assert estimate.value == other.value and (estimate.lo, estimate.hi) != (other.lo, other.hi)


class TestCalibration:
    def test_the_stored_temperature_is_applied(self) -> None:
        """A model three times too sure of itself is put right by a temperature of 3."""
        sharp = replace(draws(3000, 1, 3.0), temperature=3.0)
        table, right = summarise_pairs(sharp, 100, 0), summarise_pairs(draws(3000, 1), 100, 0)
        for name in ("nll", "brier", "ece"):
            assert table[f"rm/calibrated/{name}"].value == pytest.approx(right[f"rm/{name}"].value)
            assert table[f"rm/{name}"].lo > table[f"rm/calibrated/{name}"].hi
        assert table["rm/temperature"].value == 3 and math.isnan(table["rm/temperature"].lo)
        assert table["rm/accuracy"] == summarise_pairs(replace(sharp, temperature=1.0), 100, 0)["rm/accuracy"]

    def test_without_a_temperature_nothing_changes(self) -> None:
        table = summarise_pairs(draws(50, 0), 100, 0)
        assert all(table[f"rm/calibrated/{name}"] == table[f"rm/{name}"] for name in ("nll", "brier", "ece"))

    def test_probabilities_are_of_the_log_odds(self) -> None:
        """Of a reward model that is not scalar they are not the margins."""
        scores = replace(pair_scores(1.0, 1.0), log_odds=np.array([math.log(3)] * 2))
        table = summarise_pairs(scores, 100, 0)
        assert table["rm/nll"].value == pytest.approx(math.log(4 / 3)) and table["rm/margin"].value == 1


class TestLength:
    def test_correlations_over_all_completions(self) -> None:
        rng = np.random.default_rng(0)
        length, noise = rng.integers(1, 40, (2, 60)).astype(float), rng.normal(0, 5, (2, 60))
        raw = length + noise
        scores = PairScores(side(raw[0], length=length[0]), side(raw[1], length=length[1]), raw[0] - raw[1])
        table = summarise_pairs(scores, 300, 0)
        for name, kind in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
            found = table[f"rm/length/{name}"]
            assert found.value == pytest.approx(kind(raw.ravel(), length.ravel()).statistic)
            assert 0.8 < found.lo < found.value < found.hi < 1 and found.n == 60
        assert table["rm/length/pearson"].value != table["rm/length/spearman"].value

    def test_accuracy_where_the_better_one_is_shorter_and_where_it_is_longer(self) -> None:
        margins = np.array([1.0, -1.0, 1.0, 1.0, -1.0, 0.0])
        chosen, rejected = [1, 1, 9, 9, 9, 5], [2, 2, 2, 2, 2, 5]
        scores = PairScores(side(margins, length=chosen), side(0 * margins, length=rejected), margins)
        table = summarise_pairs(scores, 100, 0)
        shorter, longer = table["rm/length/accuracy_shorter"], table["rm/length/accuracy_longer"]
        assert (shorter.value, shorter.n) == (0.5, 2) and (longer.value, longer.n) == (pytest.approx(2 / 3), 3)
        equal = PairScores(side(margins, length=[3] * 6), side(0 * margins, length=[3] * 6), margins)
        table = summarise_pairs(equal, 100, 0)
        assert not [name for name in table if name.startswith("rm/length/accuracy")]
        assert math.isnan(table["rm/length/pearson"].value) and math.isnan(table["rm/length/spearman"].lo)


class TestGold:
    def test_rank_correlation_with_the_truth(self) -> None:
        rng = np.random.default_rng(1)
        raw = rng.normal(size=(2, 80))
        gold = np.exp(raw)  # another scale, the same order
        scores = PairScores(side(raw[0], gold=gold[0]), side(raw[1], gold=gold[1]), raw[0] - raw[1])
        found = summarise_pairs(scores, 100, 0)["rm/gold/spearman"]
        assert (found.value, found.lo, found.hi) == pytest.approx((1, 1, 1))
        backwards = replace(scores, chosen=side(raw[0], gold=-gold[0]), rejected=side(raw[1], gold=-gold[1]))
        assert summarise_pairs(backwards, 100, 0)["rm/gold/spearman"].value == pytest.approx(-1)

    def test_without_gold_there_is_none(self) -> None:
        assert "rm/gold/spearman" not in summarise_pairs(draws(20, 0), 100, 0)


class TestDisagreement:
    def test_on_right_and_on_wrong_pairs(self) -> None:
        margins = np.array([1.0, 2.0, -1.0, 0.0, 1.0, -2.0])
        scores = PairScores(
            side(margins, disagreement=[1, 1, 3, 9, 1, 5]),
            side(0 * margins, disagreement=[3, 1, 3, 9, 1, 5]),
            margins,
        )
        table = summarise_pairs(scores, 300, 0)
        right, wrong = table["rm/disagreement/right"], table["rm/disagreement/wrong"]
        assert table["rm/disagreement"].value == pytest.approx((2 + 1 + 3 + 9 + 1 + 5) / 6)
        assert (right.value, right.n) == (pytest.approx(4 / 3), 3)  # a tie is neither
        assert (wrong.value, wrong.n) == (pytest.approx(4), 2)
        excess = table["rm/disagreement/excess"]
        assert excess.value == pytest.approx(4 - 4 / 3) and 0 < excess.lo < excess.hi

    def test_of_one_model_there_is_none(self) -> None:
        assert not [name for name in summarise_pairs(draws(20, 0), 100, 0) if "disagreement" in name]

    def test_a_model_without_mistakes(self) -> None:
        scores = PairScores(
            side([1, 2], disagreement=[1, 1]), side([0, 0], disagreement=[1, 3]), np.array([1.0, 2.0])
        )
        assert {name for name in summarise_pairs(scores, 100, 0) if "disagreement" in name} == {
            "rm/disagreement",
            "rm/disagreement/right",
        }

    def test_it_is_read_from_the_scores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        score = RewardModel.score

        def of_ensemble(
            self: RewardModel,
            prompts: Sequence[str],
            completions: Sequence[str],
            finished: None = None,
            batch_size: int = 0,
        ) -> Scores:
            found = score(self, prompts, completions)
            return replace(found, disagreement=torch.tensor([float(len(text)) for text in completions]))

        monkeypatch.setattr(RewardModel, "score", of_ensemble)
        scores = score_pairs(reward_model(), PAIRS, FP32)
        assert scores.rejected.disagreement is not None
        assert scores.rejected.disagreement.tolist() == [len(pair.rejected) for pair in PAIRS]


class TestConsistency:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
    def test_a_reward_does_not_depend_on_its_neighbours(self, kind: str) -> None:
        assert 0 <= consistency(reward_model(kind), PAIRS * 5, FP32) < 1e-4

    @pytest.mark.parametrize("depends_on", ["one at a time", "batch size", "left padding", "width"])
    def test_one_that_does_is_caught(self, depends_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
        score = score_sequences

        def spoilt(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
            found = score(model, sequences)
            is_so = {
                "one at a time": len(sequences) == 1,
                "batch size": len(sequences) == 7,
                "left padding": not bool(sequences.attention_mask[:, 0].all()),
                "width": not bool(sequences.attention_mask[:, -1].any()),
            }
            return found + is_so[depends_on]

        monkeypatch.setattr("rlhf_cli.evaluation.reward_models.score_sequences", spoilt)
        assert consistency(reward_model(), PAIRS * 5, FP32) == pytest.approx(1, abs=1e-4)

    def test_it_looks_at_the_first_pairs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        score = score_sequences

        def counting(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
            asked.append(len(sequences))
            return score(model, sequences)

        monkeypatch.setattr("rlhf_cli.evaluation.reward_models.score_sequences", counting)
        consistency(reward_model(), PAIRS * 40, FP32)
        assert sum(asked) == 4 * 128  # alone, in sevens, on the left, wide; all at once is counted elsewhere

    def test_of_several_models_it_is_the_worst(self) -> None:
        members = [reward_model(seed=seed) for seed in (0, 1)]
        whole = EnsembleRewardModel(members, members[0].format, [0.0, 0.0], [1.0, 1.0])
        assert consistency(whole, PAIRS, FP32) == max(consistency(one, PAIRS, FP32) for one in members)


class TestFiles:
    def test_a_row_for_each_pair(self) -> None:
        scores = PairScores(
            side([3.0, 1.0], length=[4, 5], gold=[1, 2], disagreement=[0.5, 0.25]),
            side([1.0, 2.0], length=[6, 7], gold=[3, 4], disagreement=[0.125, 1]),
            np.array([2.0, -1.0]),
            temperature=2.0,
            subsets=("a", "b"),
        )
        first, second = pair_rows(scores)
        assert first == {
            "pair": 0,
            "subset": "a",
            "chosen_reward": 1.0,
            "chosen_raw": 3.0,
            "chosen_length": 4,
            "chosen_gold": 1.0,
            "chosen_disagreement": 0.5,
            "rejected_reward": 0.0,
            "rejected_raw": 1.0,
            "rejected_length": 6,
            "rejected_gold": 3.0,
            "rejected_disagreement": 0.125,
            "log_odds": 2.0,
            "probability": pytest.approx(1 / (1 + math.exp(-1))),
        }
        assert (second["pair"], second["subset"], second["log_odds"]) == (1, "b", -1.0)
        assert json.loads(json.dumps(second)) == second
        plain = next(pair_rows(pair_scores(1.0)))
        assert plain["subset"] == "" and not {"chosen_gold", "rejected_disagreement"} & set(plain)

    def test_no_bin_of_margins_has_right_and_wrong_pairs(self) -> None:
        rng = np.random.default_rng(0)
        for margin in (rng.normal(0.3, 1, 500), rng.normal(5, 1, 50), np.array([-2.0, -1.0]), np.array([3.0])):
            edges, counts = margin_histogram(margin)
            assert counts.sum() == len(margin) and len(edges) == len(counts) + 1
            assert 0 in edges and edges[0] <= margin.min() and margin.max() <= edges[-1]
            assert counts[edges[:-1] >= 0].sum() == (margin >= 0).sum()
            assert 2 <= len(counts) + 1 <= 33

    def test_rounding_loses_no_pair(self) -> None:
        rng = np.random.default_rng(1)
        for reach in rng.uniform(0.01, 100, 2000):
            edges, counts = margin_histogram(np.array([-reach, reach]))
            assert counts.sum() == 2 and edges[0] <= -reach and reach <= edges[-1]

    def test_margins_that_are_all_ties(self) -> None:
        edges, counts = margin_histogram(np.zeros(4))
        assert counts.tolist() == [4] and edges[0] == 0
