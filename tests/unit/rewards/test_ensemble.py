"""Several reward models as one: what their mean is, how far they disagree, and how they are kept."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, byte_tokenizer, edit_json, reward_model, tiny_lm
from fixtures_rewards import COMPLETIONS, GRADES, PROMPTS, ensemble_of, graded_model, save_all

from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import save_model
from rlhf_cli.rewards.ensemble import EnsembleRewardModel, load_scorer, save_ensemble
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.stages.keys import file_digest

SCALARS = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [-4.0]]), torch.tensor([[5.0], [8.0]])]


@pytest.fixture(scope="module")
def scalars() -> list[RewardModel]:
    return [reward_model(seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def graded() -> list[RewardModel]:
    return [graded_model(seed=seed) for seed in range(3)]


class TestScalar:
    def test_the_score_is_the_mean_of_the_members(self, scalars: list[RewardModel]) -> None:
        each = torch.stack([one.score(PROMPTS, COMPLETIONS).raw for one in scalars])
        found = ensemble_of(scalars).score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(found.raw, each.mean(0), atol=1e-6, rtol=0)
        assert found.disagreement is not None
        torch.testing.assert_close(found.disagreement, each.std(0, correction=0), atol=1e-6, rtol=0)
        assert found.raw.std() > 0.01 and found.disagreement.min() > 0.01

    def test_disagreement_by_hand(self, scalars: list[RewardModel]) -> None:
        found = ensemble_of(scalars).of_logits(SCALARS)
        assert found.raw.tolist() == [3.0, 2.0]
        # about their mean, divided by their number: the members are all there are
        expected = [math.sqrt((4 + 0 + 4) / 3), math.sqrt((0 + 36 + 36) / 3)]
        assert found.disagreement is not None
        assert found.disagreement.tolist() == pytest.approx(expected)

    def test_members_that_differ_by_a_constant_agree(self, scalars: list[RewardModel]) -> None:
        first = torch.tensor([[1.0], [2.0]])
        apart = ensemble_of(scalars[:2]).of_logits([first, first + 4])
        centred = replace(ensemble_of(scalars[:2]), centres=[0.5, 4.5]).of_logits([first, first + 4])
        assert apart.disagreement is not None and centred.disagreement is not None
        assert apart.disagreement.tolist() == [2.0, 2.0]
        assert centred.disagreement.tolist() == [0.0, 0.0]
        assert torch.equal(apart.raw, centred.raw), "centring is for the disagreement alone"

    def test_the_penalty_lowers_the_score_by_the_disagreement(self, scalars: list[RewardModel]) -> None:
        free, punished = (ensemble_of(scalars, penalty, std=2.0, mean=1.0) for penalty in (0.0, 0.5))
        before, after = free.of_logits(SCALARS), punished.of_logits(SCALARS)
        spread = torch.tensor([math.sqrt(8 / 3), math.sqrt(24)])
        torch.testing.assert_close(after.raw, before.raw - 0.5 * spread)
        assert bool((after.raw < before.raw).all())
        torch.testing.assert_close(after.reward, (after.raw - 1.0) / 2.0)
        assert after.disagreement is not None
        torch.testing.assert_close(after.disagreement, spread)

    def test_a_member_of_wider_scores_does_not_disagree_by_that(self, scalars: list[RewardModel]) -> None:
        first = torch.tensor([[1.0], [2.0]])
        whole = replace(ensemble_of(scalars[:2], 0.5), centres=[1.5, 4.5], stds=[0.5, 1.5])
        found = whole.of_logits([first, 3 * first])
        assert found.disagreement is not None and found.disagreement.tolist() == [0.0, 0.0]
        apart = whole.of_logits([first, 3 * first.flip(0)])  # one std apart, about their mean
        assert apart.disagreement is not None and apart.disagreement.tolist() == [1.0, 1.0]
        assert apart.raw.tolist() == [3.5 - 0.5, 2.5 - 0.5], "less penalty times the mean std, 1, times 1"

    def test_what_a_pair_is_believed_to_be_knows_no_penalty(self, scalars: list[RewardModel]) -> None:
        one = ensemble_of(scalars, 5.0)
        scores = one.of_logits(SCALARS)
        first, second = (replace(scores, logits=scores.logits[i : i + 1]) for i in (0, 1))
        assert one.log_odds(first, second).tolist() == [1.0]

    def test_one_member_is_that_member(self, scalars: list[RewardModel]) -> None:
        alone, found = scalars[1].score(PROMPTS, COMPLETIONS), ensemble_of(scalars[1:2], 3.0)
        scores = found.score(PROMPTS, COMPLETIONS)
        assert torch.equal(scores.raw, alone.raw) and torch.equal(scores.reward, alone.reward)
        assert scores.disagreement is not None and not scores.disagreement.any()

    def test_a_cut_completion_has_no_eos_for_any_member(self, scalars: list[RewardModel]) -> None:
        finished = [True, False, True, False, True]
        each = torch.stack([one.score(PROMPTS, COMPLETIONS, finished).raw for one in scalars])
        found = ensemble_of(scalars).score(PROMPTS, COMPLETIONS, finished).raw
        torch.testing.assert_close(found, each.mean(0), atol=1e-6, rtol=0)
        assert not torch.allclose(found, ensemble_of(scalars).score(PROMPTS, COMPLETIONS).raw, atol=1e-3)

    def test_unequal_numbers_are_refused(self, scalars: list[RewardModel]) -> None:
        with pytest.raises(ValueError, match="zip"):
            ensemble_of(scalars).score(PROMPTS, COMPLETIONS[:2])

    def test_nothing_to_score(self, scalars: list[RewardModel]) -> None:
        assert ensemble_of(scalars).score([], []).raw.shape == (0,)


class TestGrades:
    @pytest.mark.parametrize(
        "read_out",
        [
            {"read_out": "mean"},
            {"read_out": "mean_std", "std_weight": 0.5},
            {"read_out": "cvar", "cvar_alpha": 0.3},
            {"read_out": "win_rate", "opponent": (0.1, 0.2, 0.3, 0.3, 0.1)},
        ],
        ids=lambda changes: changes["read_out"],
    )
    def test_the_mean_distribution_is_read_out(
        self, read_out: dict[str, object], graded: list[RewardModel]
    ) -> None:
        p = torch.stack([one.score(PROMPTS, COMPLETIONS).logits.softmax(-1) for one in graded]).mean(0)
        whole = ensemble_of(graded, **read_out)
        found = whole.score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(found.raw, whole.format.raw(p.log()), atol=1e-5, rtol=0)
        assert found.logits is not None
        torch.testing.assert_close(found.logits.softmax(-1), p, atol=1e-6, rtol=0)
        assert found.raw.std() > 0.01

    def test_the_mean_distribution_by_hand(self, graded: list[RewardModel]) -> None:
        certain = [torch.tensor([[0.0, -1e9, -1e9]]), torch.tensor([[-1e9, -1e9, 0.0]]) + 5]
        sure = ensemble_of(graded[:2], read_out="mean_std", std_weight=1.0).of_logits(certain)
        # grades 1 and 3, half each: a mean of 2, a deviation of 1; the members' own deviations are 0
        assert sure.raw.tolist() == pytest.approx([1.0])
        assert sure.disagreement is not None and sure.disagreement.tolist() == pytest.approx([1.0])

    def test_odds_are_those_of_the_mean_distributions(self, graded: list[RewardModel]) -> None:
        whole = ensemble_of(graded)
        chosen = whole.score(PROMPTS, COMPLETIONS)
        rejected = whole.score(PROMPTS, COMPLETIONS[::-1])
        p, q = (scores.logits.double().softmax(-1) for scores in (chosen, rejected))
        wins = torch.stack([(a[:, None] * b[None, :]).tril(-1).sum() for a, b in zip(p, q, strict=True)])
        ties = (p * q).sum(-1)
        probability = wins + ties / 2
        expected = (probability / (1 - probability)).log()
        torch.testing.assert_close(whole.log_odds(chosen, rejected).double(), expected, atol=1e-4, rtol=0)


@pytest.fixture
def saved(tmp_path: Path, scalars: list[RewardModel]) -> Path:
    """A run of two members, penalty and scale included."""
    whole = replace(
        ensemble_of(scalars[:2], 0.25, mean=0.5, std=2.0, temperature=1.5), centres=[0.25, -1.0], stds=[0.5, 2.0]
    )
    save_ensemble(tmp_path / "run" / "model", save_all(scalars[:2], tmp_path), whole)
    return tmp_path / "run" / "model"


class TestSaved:
    def test_it_comes_back_as_it_was(self, saved: Path, scalars: list[RewardModel]) -> None:
        loaded = load_scorer("rm.path", str(saved), CPU)
        assert isinstance(loaded, EnsembleRewardModel)
        assert (list(loaded.centres), list(loaded.stds), loaded.penalty) == ([0.25, -1.0], [0.5, 2.0], 0.25)
        assert loaded.format == RewardFormat(20, 16, mean=0.5, std=2.0, temperature=1.5)
        whole = replace(loaded, members=scalars[:2])
        one, other = loaded.score(PROMPTS, COMPLETIONS), whole.score(PROMPTS, COMPLETIONS)
        assert torch.equal(one.reward, other.reward) and torch.equal(one.disagreement, other.disagreement)
        assert loaded.tokenizer.get_vocab() == byte_tokenizer().get_vocab()

    def test_grades_and_their_read_out_come_back(self, tmp_path: Path, graded: list[RewardModel]) -> None:
        opponent = (0.1, 0.2, 0.3, 0.3, 0.1)
        whole = ensemble_of(graded, read_out="win_rate", opponent=opponent)
        save_ensemble(tmp_path / "model", save_all(graded, tmp_path), whole)
        loaded = load_scorer("rm.path", str(tmp_path / "model"), CPU)
        assert loaded.format == whole.format
        assert torch.equal(loaded.score(PROMPTS, COMPLETIONS).raw, whole.score(PROMPTS, COMPLETIONS).raw)

    def test_a_single_reward_model_is_loaded_too(self, tmp_path: Path) -> None:
        reward_model().save(tmp_path)
        assert isinstance(load_scorer("rm.path", str(tmp_path), CPU), RewardModel)

    def test_members_are_whole_reward_models(self, saved: Path) -> None:
        for name in ("member-0", "member-1"):
            assert isinstance(load_scorer("rm.path", str(saved / name), CPU), RewardModel)
        assert sorted(file.name for file in saved.iterdir()) == ["ensemble.json", "member-0", "member-1"]

    def test_a_scale_of_nothing_is_refused_before_anything_is_written(
        self, tmp_path: Path, scalars: list[RewardModel]
    ) -> None:
        with pytest.raises(RequestError, match=r"^rm\.standardize: "):
            save_ensemble(tmp_path / "model", save_all(scalars, tmp_path), ensemble_of(scalars, std=0.0))
        assert not (tmp_path / "model").exists()

    def test_the_digest_is_that_of_everything_in_it(self, saved: Path, tmp_path: Path) -> None:
        found = {file_digest(str(saved))}
        twin = shutil.copytree(saved, tmp_path / "twin")
        assert file_digest(str(twin)) in found
        for file in ("member-0/model.safetensors", "member-1/model.safetensors", "member-1/config.json"):
            content = (saved / file).read_bytes()
            (saved / file).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            found.add(file_digest(str(saved)))
        edit_json(saved / "ensemble.json", disagreement_penalty=0.5)
        found.add(file_digest(str(saved)))
        assert len(found) == 5
        (saved / "member-0" / "README.md").write_text("a card")
        assert file_digest(str(saved)) in found

    def test_members_that_change_places_are_another_artifact(self, saved: Path) -> None:
        before = file_digest(str(saved))
        (saved / "member-0").rename(saved / "x")
        (saved / "member-1").rename(saved / "member-0")
        (saved / "x").rename(saved / "member-1")
        assert file_digest(str(saved)) != before


class TestBroken:
    def refused(self, folder: Path) -> str:
        with pytest.raises(RequestError) as caught:
            load_scorer("rm.path", str(folder), CPU)
        line = str(caught.value)
        assert line.startswith(f"rm.path={folder}") and "\n" not in line
        return line

    @pytest.mark.parametrize("name", ["../one-0", "member-0/", "/etc", ".", "..", ""])
    def test_a_member_outside_its_folder(self, name: str, saved: Path) -> None:
        edit_json(saved / "ensemble.json", members=["member-0", name])
        assert "ensemble.json does not name its members" in self.refused(saved)

    def test_a_member_that_is_not_there(self, saved: Path) -> None:
        shutil.rmtree(saved / "member-1")
        assert "member-1" in self.refused(saved)

    @pytest.mark.parametrize(
        "changes", [{"centres": [0.0]}, {"stds": [1.0]}, {"members": ["member-0"]}, {"members": []}]
    )
    def test_other_numbers(self, changes: dict[str, object], saved: Path) -> None:
        edit_json(saved / "ensemble.json", **changes)
        assert "does not name its members, or not a centre and std for each" in self.refused(saved)

    @pytest.mark.parametrize("key", ["members", "centres", "stds", "disagreement_penalty", "rlhf_reward"])
    def test_a_key_that_is_not_there(self, key: str, saved: Path) -> None:
        index = json.loads((saved / "ensemble.json").read_text())
        del index[key]
        (saved / "ensemble.json").write_text(json.dumps(index))
        assert f"ensemble.json cannot be read (KeyError: '{key}')" in self.refused(saved)

    @pytest.mark.parametrize("changes", [{"members": 3}, {"centres": ["a", "b"]}, {"rlhf_reward": 1}])
    def test_values_of_another_type(self, changes: dict[str, object], saved: Path) -> None:
        edit_json(saved / "ensemble.json", **changes)
        assert "ensemble.json cannot be read (" in self.refused(saved)

    @pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null"])
    def test_a_file_that_is_none(self, text: str, saved: Path) -> None:
        (saved / "ensemble.json").write_text(text)
        assert "ensemble.json cannot be read (" in self.refused(saved)

    def test_settings_that_are_unknown(self, saved: Path) -> None:
        edit_json(saved / "ensemble.json", rlhf_reward={"max_prompt_tokens": 1, "template": "x"})
        assert "unknown rlhf_reward settings template" in self.refused(saved)

    def test_a_member_that_is_no_reward_model(self, saved: Path) -> None:
        shutil.rmtree(saved / "member-1")
        save_model(tiny_lm(), byte_tokenizer(), saved / "member-1")
        assert "member-1" in self.refused(saved)

    def test_a_member_of_another_kind(self, saved: Path) -> None:
        graded_model().save(saved / "member-1")
        assert f"member-1 has {GRADES} outputs, not 1" in self.refused(saved)

    def test_scalars_of_which_the_index_says_that_they_are_graded(self, saved: Path) -> None:
        stored = json.loads((saved / "ensemble.json").read_text())["rlhf_reward"]
        edit_json(saved / "ensemble.json", rlhf_reward={**stored, "grade_loss": "half_tie"})
        assert "member-0 has 1 outputs, not 2" in self.refused(saved)

    def test_an_opponent_over_other_grades(self, tmp_path: Path) -> None:
        members = [graded_model()]
        whole = ensemble_of(members, read_out="win_rate", opponent=(0.5, 0.25, 0.25))
        save_ensemble(tmp_path / "model", save_all(members, tmp_path), whole)
        assert f"member-0 has {GRADES} outputs, not 3" in self.refused(tmp_path / "model")

    def test_members_over_other_numbers_of_grades(self, tmp_path: Path) -> None:
        members = [graded_model(), graded_model(labels=GRADES + 1)]
        save_ensemble(tmp_path / "model", save_all(members, tmp_path), ensemble_of(members))
        assert f"member-1 has {GRADES + 1} outputs, not {GRADES}" in self.refused(tmp_path / "model")
