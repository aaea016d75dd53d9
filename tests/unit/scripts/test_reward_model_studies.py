"""What the studies of reward models compute beside the models: errors of probabilities, differences, mixtures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import compare_reward_models as study
import linear_connectivity as connectivity
import numpy as np
import pytest
import torch
from scipy.special import expit
from study import cell, reviews_of, table

from rlhf_cli.evaluation.statistics import Estimate, expected_calibration_error
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.settings import GradeLoss
from rlhf_cli.types import Preference, Scores


def scores(*raw: float) -> Scores:
    values = torch.tensor(raw)
    return Scores(values, values, values[:, None])


def graded(*rows: list[float]) -> Scores:
    return Scores(torch.zeros(len(rows)), torch.zeros(len(rows)), torch.tensor(rows))


class Fixed:
    """Says what log-odds it is told to."""

    tokenizer = None

    def __init__(self, text_format: RewardFormat, odds: list[float]) -> None:
        self.format, self.odds = text_format, odds

    def log_odds(self, chosen: Scores, rejected: Scores) -> torch.Tensor:
        return torch.tensor(self.odds)


def test_an_error_in_both_orders_is_the_symmetrised_one_where_both_sum_to_one():
    p = expit(np.random.default_rng(0).normal(size=200))
    expected = expected_calibration_error(p, np.ones_like(p))
    assert study.two_sided_error(p, 1 - p) == pytest.approx(expected, abs=1e-12)


def test_an_error_in_both_orders_sees_what_goes_to_neither_side():
    # nobody can tell the two apart: 0.45 for each is wrong by 0.05, and one half for each is right
    assert study.two_sided_error(np.array([0.45]), np.array([0.45])) == pytest.approx(0.05)
    assert study.two_sided_error(np.array([0.5]), np.array([0.5])) == 0.0
    assert study.two_sided_error(np.array([1.0]), np.array([0.0])) == 0.0
    assert study.two_sided_error(np.array([0.0]), np.array([1.0])) == 1.0


def test_a_strict_probability_is_judged_as_it_was_trained_and_as_odds():
    strict = RewardFormat(4, 4, grade_loss=GradeLoss.strict.value, temperature=2.0)
    uniform = graded([0.0] * 10)
    found = study.calibration(Fixed(strict, [0.0]), uniform, uniform)
    assert found["ece/as_trained"] == pytest.approx(0.05) and found["ece/odds"] == 0.0
    assert found["undecided"] == pytest.approx(0.1)
    assert found["grade_entropy"] == pytest.approx(math.log(10))


def test_the_temperature_divides_the_odds():
    found = study.calibration(Fixed(RewardFormat(4, 4, temperature=2.0), [2.0]), scores(2.0), scores(0.0))
    assert found["ece/as_trained"] == found["ece/odds"] == pytest.approx(1 - expit(2.0))
    assert found["ece/calibrated"] == pytest.approx(1 - expit(1.0))
    assert "grade_entropy" not in found


def test_rank_and_accuracy_go_by_the_reward():
    pairs = [Preference("p", "bb", "a"), Preference("p", "ccc", "dddd")]
    chosen, rejected = scores(2.0, 30.0), scores(1.0, 400.0)
    assert study.accuracy(chosen, rejected) == 0.5
    assert study.accuracy(scores(1.0), scores(1.0)) == 0.5
    assert study.gold_rank(pairs, chosen, rejected, lambda prompt, text: len(text)) == pytest.approx(1.0)
    assert study.gold_rank(pairs, chosen, rejected, lambda prompt, text: -len(text)) == pytest.approx(-1.0)


def test_differences_are_paired_by_seed():
    seeds = [{"warm": {"x": 1.0 + s, "own": 0.0}, "ensemble": {"x": 0.5 + s}} for s in (0.0, 10.0, 100.0)]
    found = study.paired(seeds, "warm", "ensemble")
    assert found == {"x": Estimate(0.5, 0.5, 0.5, 3)}
    assert study.over_seeds(seeds, "ensemble")["x"].half_width > 100


def test_what_a_model_has_not_is_left_empty():
    text = study.markdown({0.25: {"warm": {"accuracy/test": Estimate(0.7, 0.6, 0.8, 5)}}})
    assert text.splitlines()[-1] == "| 25% | `warm` |  |  | 0.700 ± 0.100 |  |  |  |  |  |  |  |"


def test_tables_are_written_as_markdown_and_json(tmp_path: Path):
    one_seed = {0.0: [{"warm": {"accuracy/test": 0.75}, "ensemble": {"accuracy/test": 0.5}}]}
    study.write(tmp_path, one_seed, ["ensemble", "warm"], {"warm_ms": 2.0, "ensemble_ms": 8.0, "ratio": 4.0})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    values = json.loads((tmp_path / "table.json").read_text(), parse_constant=refuse)
    assert values["differences"]["0"]["warm - ensemble"]["accuracy/test"] == [0.25, None, None]
    assert values["seeds"]["0.0"][0]["warm"]["accuracy/test"] == 0.75
    assert "4.0 times as much" in (tmp_path / "table.md").read_text()


def test_cells_have_half_of_the_interval():
    assert cell(Estimate(1.0, 0.5, 1.5, 3), 2) == "1.00 ± 0.50"
    assert cell(Estimate(1.0, math.nan, math.nan, 1), 2) == "1.00"
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |\n"


def test_predictions_are_mixed_as_probabilities_where_there_are_grades():
    scalar, grades = RewardFormat(4, 4), RewardFormat(4, 4, grade_loss=GradeLoss.half_tie.value)
    one, other = torch.tensor([[1.0, 3.0]]).log(), torch.tensor([[1.0, 0.0]]).log()
    assert connectivity.mixed(scalar, [torch.tensor([[1.0]]), torch.tensor([[3.0]])], 0.25).tolist() == [[1.5]]
    assert connectivity.mixed(grades, [one, other], 0.5).exp()[0].tolist() == pytest.approx([0.625, 0.375])
    assert connectivity.mixed(grades, [one, other], 0.0).exp()[0].tolist() == pytest.approx([0.25, 0.75])


def test_ties_are_half_right():
    assert connectivity.right(torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0, 3.0])).tolist() == [1.0, 0.5, 0.0]


def test_lines_are_compared_on_the_same_resamples():
    rng = np.random.default_rng(1)
    weights = [(rng.random(50) < 0.7).astype(float) for _ in range(2)]
    found = {"weights": weights, "predictions": weights, "diagonal": [one - 0.1 for one in weights]}
    lines = connectivity.measured(found)
    assert [one.value for one in lines["weights"]] == pytest.approx([one.mean() for one in weights])
    assert all((one.lo, one.hi) == (0.0, 0.0) for one in lines["weights - predictions"])
    assert all((one.lo, one.hi) == pytest.approx((0.1, 0.1)) for one in lines["weights - diagonal"])


def test_rows_are_those_of_the_run_a_model_lies_in(tmp_path: Path):
    small = {"num_sft": 4, "num_pairs": 6, "num_validation": 2, "num_test": 3, "num_prompts": 20}
    config = {"data.name": "reviews", "data.label_temperature": 1.0, "data.seed": 3, "rm.name": "warm"}
    config |= {f"data.{name}": value for name, value in small.items()}
    (tmp_path / "run_config.json").write_text(json.dumps(config))
    data = reviews_of(tmp_path / "model" / "member-0")
    assert len(data.pairs) == 6 and len(data.pairs_test["ood"]) == 3
    (tmp_path / "run_config.json").write_text(json.dumps(config | {"data.seed": 4}))
    assert reviews_of(tmp_path).pairs != data.pairs
    (tmp_path / "run_config.json").write_text('{"data.name": "imdb"}')
    with pytest.raises(SystemExit, match="data=imdb; expected the embedded data"):
        reviews_of(tmp_path)
