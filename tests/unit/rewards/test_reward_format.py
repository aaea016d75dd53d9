"""What becomes of logits, and how that is kept with a model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, edit_json, reward_model
from fixtures_rewards import COMPLETIONS, GRADES, PROMPTS, graded_model

from rlhf_cli.errors import RequestError
from rlhf_cli.rewards.format import RewardFormat, read_format, store_format
from rlhf_cli.rewards.model import load_reward_model
from rlhf_cli.settings import GradeLoss
from rlhf_cli.types import Scores

SCALAR = RewardFormat(8, 8)
GRADED = RewardFormat(8, 8, grade_loss="half_tie")
# grades 1, 2, 3
ONE, OTHER = [0.1, 0.3, 0.6], [0.5, 0.5, 0.0]
LOGITS = torch.tensor([ONE, OTHER]).log() + torch.tensor([[7.0], [-3.0]])  # shifts change nothing


def scores(logits: torch.Tensor) -> Scores:
    return Scores(logits[:, 0], logits[:, 0], logits)


class TestRaw:
    def test_of_a_scalar_it_is_the_one_logit(self) -> None:
        logits = torch.tensor([[0.5], [-2.0]], dtype=torch.bfloat16)
        found = SCALAR.raw(logits)
        assert found.dtype == torch.float32 and found.tolist() == [0.5, -2.0]

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"read_out": "mean"}, [2.5, 1.5]),
            ({"read_out": "mean_std", "std_weight": 2.0}, [2.5 - 2 * math.sqrt(0.45), 1.5 - 2 * 0.5]),
            ({"read_out": "cvar", "cvar_alpha": 0.2}, [1.5, 1.0]),
            ({"read_out": "cvar", "cvar_alpha": 1.0}, [2.5, 1.5]),
            ({"read_out": "win_rate", "opponent": (0.0, 0.5, 0.5)}, [0.3 * 0.25 + 0.6 * 0.75, 0.5 * 0.25]),
        ],
        ids=["mean", "mean_std", "cvar", "cvar of all", "win_rate"],
    )
    def test_of_grades_it_is_what_is_read_out(self, changes: dict[str, object], expected: list[float]) -> None:
        assert replace(GRADED, **changes).raw(LOGITS).tolist() == pytest.approx(expected, abs=1e-5)

    def test_a_win_rate_without_an_opponent_yet_is_the_mean_grade(self) -> None:
        assert replace(GRADED, read_out="win_rate").raw(LOGITS).tolist() == pytest.approx([2.5, 1.5], abs=1e-5)

    def test_a_scalar_knows_no_read_out(self) -> None:
        logits = torch.tensor([[0.5], [-2.0]])
        odd = replace(SCALAR, read_out="win_rate", opponent=(1.0,), std_weight=9.0)
        assert torch.equal(odd.raw(logits), SCALAR.raw(logits))

    def test_standardised(self) -> None:
        assert replace(GRADED, mean=2.0, std=0.25).standardise(torch.tensor([2.5, 1.5])).tolist() == [2.0, -2.0]


class TestLogOdds:
    def test_of_scalars_they_are_the_difference(self) -> None:
        first, second = scores(torch.tensor([[0.5], [1.0]])), scores(torch.tensor([[-1.0], [3.0]]))
        assert SCALAR.log_odds(first, second).tolist() == [1.5, -2.0]

    @pytest.mark.parametrize("loss", list(GradeLoss))
    def test_of_grades_they_are_those_of_the_loss(self, loss: GradeLoss) -> None:
        wins = 0.5 * 0.3 + 1.0 * 0.6  # of ONE over OTHER
        loses = 0.5 * 0.1
        tie = 1 - wins - loses
        expected = (
            math.log((wins + tie / 2) / (loses + tie / 2))
            if loss is GradeLoss.half_tie
            else math.log(wins / loses)
        )
        found = replace(GRADED, grade_loss=loss.value).log_odds(scores(LOGITS[:1]), scores(LOGITS[1:]))
        assert float(found) == pytest.approx(expected, abs=1e-5)

    def test_neither_temperature_nor_scale_changes_them(self) -> None:
        first, second = scores(LOGITS[:1]), scores(LOGITS[1:])
        odd = replace(GRADED, temperature=4.0, mean=1.0, std=9.0, read_out="cvar")
        assert torch.equal(odd.log_odds(first, second), GRADED.log_odds(first, second))


class TestGradesSaved:
    def test_what_was_found_out_after_training_is_read_again(self, tmp_path: Path) -> None:
        reward = graded_model(read_out="win_rate")
        reward.save(tmp_path)
        opponent = [0.1, 0.2, 0.3, 0.25, 0.15]
        store_format(tmp_path, temperature=2.5, opponent=opponent, mean=0.5, std=0.25)
        loaded = load_reward_model("rm.path", str(tmp_path), CPU)
        assert loaded.format == replace(
            reward.format, temperature=2.5, opponent=tuple(opponent), mean=0.5, std=0.25
        )
        found = loaded.score(PROMPTS, COMPLETIONS)
        assert found.logits is not None and found.logits.shape == (5, GRADES)
        p, beaten = found.logits.softmax(-1), torch.tensor(opponent)
        expected = (p * (beaten.cumsum(0) - beaten / 2)).sum(-1)
        torch.testing.assert_close(found.raw, expected)
        torch.testing.assert_close(found.reward, (expected - 0.5) / 0.25)
        assert found.raw.std() > 0.01

    def test_a_temperature_alone_leaves_the_scale(self, tmp_path: Path) -> None:
        reward_model(mean=0.5, std=2.0).save(tmp_path)
        store_format(tmp_path, temperature=3.0)
        stored = load_reward_model("rm.path", str(tmp_path), CPU).format
        assert (stored.temperature, stored.mean, stored.std) == (3.0, 0.5, 2.0)

    @pytest.mark.parametrize("labels", [2, 10])
    def test_any_number_of_grades_loads(self, labels: int, tmp_path: Path) -> None:
        reward = graded_model(labels=labels)
        reward.save(tmp_path)
        loaded = load_reward_model("rm.path", str(tmp_path), CPU)
        assert loaded.model.config.num_labels == labels
        assert torch.equal(loaded.score(PROMPTS, COMPLETIONS).raw, reward.score(PROMPTS, COMPLETIONS).raw)

    @pytest.mark.parametrize(
        ("labels", "changes", "words"),
        [
            (GRADES, {"grade_loss": None}, "has 5 labels; a scalar reward model has one"),
            (1, {}, "has 1 label; a distributional reward model has one for each grade"),
            (GRADES, {"opponent": [0.5, 0.5]}, "rlhf_reward has 2 grades of the SFT model, not 5"),
            (
                GRADES,
                {"grade_loss": "tie"},
                "rlhf_reward has grade_loss tie, which is none of [None, 'strict', 'half_tie', 'renorm']",
            ),
            (
                GRADES,
                {"read_out": "max"},
                "rlhf_reward has read_out max, which is none of ['mean', 'mean_std', 'cvar', 'win_rate']",
            ),
            (
                GRADES,
                {"max_prompt_tokens": 200},
                "rlhf_reward has rows of up to 216 tokens, more than the model's 128 positions",
            ),
        ],
        ids=["no grades", "one grade", "opponent", "loss", "read-out", "length"],
    )
    def test_settings_that_the_model_cannot_have(
        self, labels: int, changes: dict[str, object], words: str, tmp_path: Path
    ) -> None:
        graded_model(labels=labels).save(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())["rlhf_reward"]
        edit_json(tmp_path / "config.json", rlhf_reward={**stored, **changes})
        with pytest.raises(RequestError) as caught:
            load_reward_model("rm.path", str(tmp_path), CPU)
        assert str(caught.value) == f"rm.path={tmp_path}: {words}"

    @pytest.mark.parametrize("scale", [{"std": 0.0}, {"std": math.nan}, {"mean": math.inf, "std": 1.0}])
    def test_a_scale_of_nothing_is_not_stored(self, scale: dict[str, float], tmp_path: Path) -> None:
        reward_model().save(tmp_path)
        before = (tmp_path / "config.json").read_bytes()
        with pytest.raises(RequestError, match=r"^rm\.standardize: "):
            store_format(tmp_path, temperature=2.0, **scale)
        assert (tmp_path / "config.json").read_bytes() == before


def test_a_format_is_read_as_it_was_written() -> None:
    written = RewardFormat(3, 4, False, True, "strict", "win_rate", 2.0, 0.5, (0.25, 0.75), 1.5, -1.0, 4.0)
    assert read_format("rm.path", "x", json.loads(json.dumps(asdict(written)))) == written


def test_reward_models_from_before_there_were_grades_are_scalar() -> None:
    found = read_format("rm.path", "x", {"max_prompt_tokens": 3, "max_completion_tokens": 4, "std": 2.0})
    assert found == RewardFormat(3, 4, std=2.0) and found.grade_loss is None and found.temperature == 1.0
