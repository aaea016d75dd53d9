"""Node `reward`: what a policy is rewarded by, as a weighted sum of terms. Imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from rlhf_cli.errors import bad_value


class Normalize(Enum):
    """What the sum is scaled by, to mean 0 and standard deviation 1."""

    none = "none"
    sft_samples = "sft_samples"  # samples of the SFT model, once
    running = "running"  # all samples that the policy was trained on so far


class Count(Enum):
    """What a rule gives where it matches."""

    any = "any"  # 1, however often
    each = "each"  # 1 for every match; matches do not overlap


# What else there is under `reward/` among the metrics.
_TAKEN = frozenset({"mean", "std", "raw_mean", "shaped_mean", "best_mean", "clipped", "disagreement"})
_TAKEN |= {"norm_mean", "norm_std"}


@dataclass
class RewardRule:
    """A text pattern: an item of `reward.rules`."""

    name: str = ""  # of its metric, reward/<name>
    weight: float = 0.0
    pattern: str | None = None  # a regular expression of Python's re, searched for anywhere in the completion
    words: list[str] = field(default_factory=list)  # instead of a pattern: keywords, as whole words
    count: Count = Count.any
    ignore_case: bool = False

    def compiled(self) -> re.Pattern[str]:
        """What is searched for. Raises re.error for a pattern that is none."""
        flags = re.IGNORECASE if self.ignore_case else 0
        if self.pattern is not None:
            return re.compile(self.pattern, flags)
        # not \b, which is no edge beside a keyword's own punctuation
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self.words))})(?!\w)", flags)

    def check(self, where: str) -> None:
        """Raises RequestError for impossible values; `where` is the key prefix."""
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name) or self.name in _TAKEN | set(TERMS):
            raise bad_value(
                f"{where}.name", self.name, "letters, digits, _ and -, and not the name of another term or metric"
            )
        _check_weight(f"{where}.weight", self.weight)
        if (self.pattern is None) == (not self.words):
            both = "neither" if self.pattern is None else "both"
            raise bad_value(where, self.name, f"a pattern or words, not {both}")
        if not all(word.strip() for word in self.words):
            raise bad_value(f"{where}.words", self.words, "words that are not empty")
        try:
            self.compiled()
        except re.error as error:
            raise bad_value(f"{where}.pattern", self.pattern, f"a regular expression ({error})") from None


@dataclass
class CoherenceSettings:
    """How likely a frozen language model finds the completion."""

    weight: float = 0.0
    path: str | None = None  # run folder, model folder or hub id; null = the SFT model


@dataclass
class RepetitionSettings:
    """How much of the completion has been there before."""

    weight: float = 0.0
    ngram: int = 3  # tokens


@dataclass
class RewardSettings:
    """Node `reward`. A term without weight is not computed."""

    rm: float = 1.0
    gold: float = 0.0
    length: float = 0.0
    missing_eos: float = 0.0
    coherence: CoherenceSettings = field(default_factory=CoherenceSettings)
    repetition: RepetitionSettings = field(default_factory=RepetitionSettings)
    rules: list[RewardRule] = field(default_factory=list)
    normalize: Normalize = Normalize.none
    normalize_samples: int = 256
    clip: float | None = None

    def weights(self) -> dict[str, float]:
        """Of the terms that count, by name, in the order they are added in."""
        every = {
            "rm": self.rm,
            "gold": self.gold,
            "length": self.length,
            "missing_eos": self.missing_eos,
            "coherence": self.coherence.weight,
            "repetition": self.repetition.weight,
            **{rule.name: rule.weight for rule in self.rules},
        }
        return {name: weight for name, weight in every.items() if weight}

    @property
    def is_plain(self) -> bool:
        """Whether the reward is the reward model's and nothing else."""
        return self.weights() == {"rm": 1.0} and self.normalize is Normalize.none and self.clip is None

    def changed(self) -> tuple[str, Any, Any] | None:
        """A key that is not at its default, its value and the default; None where all are."""
        return _changed(self, RewardSettings(), "reward")

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        for name in ("rm", "gold", "length", "missing_eos"):
            _check_weight(f"reward.{name}", getattr(self, name))
        for name, settings in (("coherence", self.coherence), ("repetition", self.repetition)):
            _check_weight(f"reward.{name}.weight", settings.weight)
        if self.repetition.ngram < 1:
            raise bad_value("reward.repetition.ngram", self.repetition.ngram, "a whole number >= 1")
        names: list[str] = []
        for number, rule in enumerate(self.rules):
            where = f"reward.rules[{number}]"
            rule.check(where)
            if rule.name in names:
                raise bad_value(f"{where}.name", rule.name, "a name that no other rule has")
            names.append(rule.name)
        if not self.weights():
            raise bad_value("reward.rm", self.rm, "a weight that is not 0, here or at another term of reward")
        if self.normalize_samples < 2:
            raise bad_value("reward.normalize_samples", self.normalize_samples, "a whole number >= 2")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise bad_value("reward.clip", self.clip, "a number > 0, or null")


# The terms that need no rule.
TERMS = ("rm", "gold", "length", "missing_eos", "coherence", "repetition")


def _check_weight(key: str, weight: float) -> None:
    if not math.isfinite(weight):
        raise bad_value(key, weight, "a finite number")


def _changed(node: Any, default: Any, key: str) -> tuple[str, Any, Any] | None:
    for one in fields(node):
        value, usual, where = getattr(node, one.name), getattr(default, one.name), f"{key}.{one.name}"
        if isinstance(value, CoherenceSettings | RepetitionSettings):
            found = _changed(value, usual, where)
            if found is not None:
                return found
        elif value != usual:
            plain = [item.value if isinstance(item, Enum) else item for item in (value, usual)]
            return where, plain[0], plain[1]
    return None
