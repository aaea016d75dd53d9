"""The node `reward`: what is refused, and what counts as the plain reward model."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_cli.errors import RequestError
from rlhf_cli.rewards.term_settings import (
    CoherenceSettings,
    Normalize,
    RepetitionSettings,
    RewardRule,
    RewardSettings,
)

RULE = {"name": "good", "weight": 1.0, "words": ["good"]}


def rules(*changes: dict[str, Any]) -> RewardSettings:
    return RewardSettings(rules=[RewardRule(**{**RULE, **change}) for change in changes])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (RewardSettings(rm=float("nan")), "reward.rm=nan: expected a finite number"),
        (RewardSettings(length=float("inf")), "reward.length=inf: expected a finite number"),
        (RewardSettings(coherence=CoherenceSettings(float("inf"))), "reward.coherence.weight=inf"),
        (RewardSettings(repetition=RepetitionSettings(1.0, 0)), "reward.repetition.ngram=0: expected a whole"),
        (RewardSettings(rm=0.0), "reward.rm=0.0: expected a weight that is not 0"),
        (RewardSettings(normalize_samples=1), "reward.normalize_samples=1: expected a whole number >= 2"),
        (RewardSettings(clip=-1.0), "reward.clip=-1.0: expected a number > 0, or null"),
        (rules({}, {}), "reward.rules[1].name=good: expected a name that no other rule has"),
        (rules({"name": ""}), "reward.rules[0].name=: expected letters"),
        (rules({"name": "a/b"}), "reward.rules[0].name=a/b: expected letters"),
        (rules({"name": "std"}), "not the name of another term or metric"),
        (rules({"name": "coherence"}), "not the name of another term or metric"),
        (rules({"weight": float("nan")}), "reward.rules[0].weight=nan"),
        (rules({"words": []}), "reward.rules[0]=good: expected a pattern or words, not neither"),
        (rules({"pattern": "x"}), "reward.rules[0]=good: expected a pattern or words, not both"),
        (rules({"words": ["a", " "]}), "reward.rules[0].words="),
        (rules({"words": [], "pattern": "a("}), "(missing ), unterminated subpattern at position 1)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings: RewardSettings, told: str):
    with pytest.raises(RequestError) as error:
        settings.check()
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_defaults_are_the_plain_reward_model():
    settings = RewardSettings()
    settings.check()
    assert settings.is_plain and settings.changed() is None
    assert settings.weights() == {"rm": 1.0}


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        (RewardSettings(rm=0.5), ("reward.rm", 0.5, 1.0)),
        (RewardSettings(coherence=CoherenceSettings(0.1)), ("reward.coherence.weight", 0.1, 0.0)),
        (RewardSettings(normalize=Normalize.running), ("reward.normalize", "running", "none")),
        (RewardSettings(clip=3.0), ("reward.clip", 3.0, None)),
    ],
)
def test_anything_else_is_not(settings: RewardSettings, changed: tuple[str, Any, Any]):
    settings.check()
    assert not settings.is_plain
    assert settings.changed() == changed


def test_terms_without_weight_do_not_count():
    settings = rules({"weight": 0.0}, {"name": "bad", "weight": -2.0})
    settings.rm, settings.gold = 0.0, 1.0
    settings.check()
    assert settings.weights() == {"gold": 1.0, "bad": -2.0}
