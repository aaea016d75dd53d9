"""Settings of the data sources: the part of the config that they read. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

from rlhf_cli.errors import bad_value

if TYPE_CHECKING:
    from rlhf_cli.data.reviews import ReviewsSpec


@dataclass
class DataSettings:
    """What every source has."""

    evaluation_only: ClassVar[bool] = False  # True where a source has no rows to train on
    pairs_share_prompt: ClassVar[bool] = True  # False where the two texts of a pair continue nothing in common
    has_gold: ClassVar[bool] = False  # True where the source knows the true reward of any text

    name: str = ""
    max_prompt_tokens: int = 512  # longer prompts lose their beginning
    max_completion_tokens: int = 256  # longest completion, in training and sampling; longer ones are cut

    def longest_row(self) -> tuple[int, str]:
        """Tokens of the longest row that a model has to take, and the keys that say so."""
        total = self.max_prompt_tokens + self.max_completion_tokens
        return total, "data.max_prompt_tokens + data.max_completion_tokens"

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        for key in ("max_prompt_tokens", "max_completion_tokens"):
            if getattr(self, key) < 1:
                raise bad_value(f"data.{key}", getattr(self, key), "a whole number >= 1")


@dataclass
class ReviewsSettings(DataSettings):
    """The embedded corpus; see `rlhf_cli.data.reviews`."""

    has_gold: ClassVar[bool] = True

    seed: int = 0  # of the corpus itself
    num_sft: int = 4000
    num_pairs: int = 2000
    num_validation: int = 200
    num_test: int = 500
    num_prompts: int = 4000
    label_temperature: float = 1.0
    swap_rate: float = 0.0

    def spec(self) -> ReviewsSpec:
        """The corpus these settings ask for. Raises RequestError for impossible values."""
        from rlhf_cli.data.reviews import ReviewsSpec

        return ReviewsSpec(**{field.name: getattr(self, field.name) for field in fields(ReviewsSpec)})

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        self.spec()


@dataclass
class SourceSettings(DataSettings):
    """What every source of files or of the hub has."""

    path: str | None = None  # a file, or a folder with train.* and test.*; null = hub_id
    test_path: str | None = None  # test rows; null = the source's test split or, without one, a share of train
    hub_id: str | None = None  # dataset of the hub, read where path is null
    hub_revision: str | None = None  # branch or commit of it
    hub_folder: str | None = None  # folder of it
    limit: int | None = None  # rows read of each split; null = all
    test_fraction: float = 0.1  # share of the prompts kept for the test, where there is no test split
    validation_fraction: float = 0.05  # share of the training prompts that steer training
    max_validation: int | None = 512  # validation pairs, and rows of SFT's validation, that are used; null = all
    cache_dir: str = "outputs/cache/data"  # where rows are kept as Arrow files

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if self.path is None and self.hub_id is None:
            raise bad_value("data.path", None, "a .jsonl, .csv or .parquet file, or a folder with train and test")
        if self.path is None and self.test_path is not None:
            raise bad_value("data.test_path", self.test_path, "null, or data.path as well")
        for key in ("limit", "max_validation"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise bad_value(f"data.{key}", value, "a whole number >= 1, or null")
        for key in ("test_fraction", "validation_fraction"):
            if not 0.0 < getattr(self, key) < 0.5:
                raise bad_value(f"data.{key}", getattr(self, key), "a number above 0 and below 0.5")


class Chat(Enum):
    """How the turns of a chat become text."""

    auto = "auto"  # the tokenizer's chat template where it has one, else plain
    template = "template"  # a tokenizer without one is refused
    plain = "plain"  # "User:" and "Assistant:" paragraphs for every model


@dataclass
class ChatSettings(SourceSettings):
    """A source whose prompts are, or may be, turns of a chat."""

    chat: Chat = Chat.auto


@dataclass
class JsonlSettings(ChatSettings):
    """A user's own rows of prompt / chosen / rejected."""

    name: str = "jsonl"
    prompt_column: str = "prompt"
    chosen_column: str = "chosen"
    rejected_column: str = "rejected"
    margin_column: str = "margin"  # how much better chosen is; rows may lack it


class Attribute(Enum):
    """What responses are ranked by."""

    helpfulness = "helpfulness"
    correctness = "correctness"
    coherence = "coherence"
    complexity = "complexity"
    verbosity = "verbosity"
    weighted = "weighted"


@dataclass
class AttributeWeights:
    """Weights of a sum of the five attributes."""

    helpfulness: float = 0.65
    correctness: float = 0.8
    coherence: float = 0.45
    complexity: float = 0.55
    verbosity: float = -0.4


@dataclass
class HelpSteer2Settings(ChatSettings):
    """See `rlhf_cli.data.helpsteer2`."""

    name: str = "helpsteer2"
    attribute: Attribute = Attribute.helpfulness
    weights: AttributeWeights = field(default_factory=AttributeWeights)

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        values = {item.name: getattr(self.weights, item.name) for item in fields(self.weights)}
        for key, value in values.items():
            if not math.isfinite(value):
                raise bad_value(f"data.weights.{key}", value, "a finite number")
        if self.attribute is Attribute.weighted and not any(values.values()):
            raise bad_value("data.weights", "all zero", "at least one weight that is not 0")


@dataclass
class HhRlhfSettings(ChatSettings):
    """See `rlhf_cli.data.hh_rlhf`."""

    name: str = "hh-rlhf"
    subsets: list[str] = field(default_factory=lambda: ["harmless-base", "helpful-base"])
    single_turn_only: bool = False

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if not self.subsets or any(name in ("", ".", "..") or "/" in name for name in self.subsets):
            raise bad_value("data.subsets", self.subsets, "names of sub-folders, at least one")
        if len(set(self.subsets)) < len(self.subsets):
            raise bad_value("data.subsets", self.subsets, "each sub-folder once")


@dataclass
class TldrSettings(SourceSettings):
    """See `rlhf_cli.data.tldr`."""

    name: str = "tldr"


@dataclass
class RewardBenchSettings(ChatSettings):
    """See `rlhf_cli.data.rewardbench`."""

    evaluation_only: ClassVar[bool] = True

    name: str = "rewardbench"
    max_validation: int | None = None  # not read


@dataclass
class ImdbSettings(SourceSettings):
    """See `rlhf_cli.data.imdb`."""

    pairs_share_prompt: ClassVar[bool] = False

    name: str = "imdb"
    max_validation: int | None = None  # not read: pairs are as many as num_validation_pairs
    seed: int = 0  # of the pairs and of the prompts' lengths
    pairs_per_epoch: int = 4096  # (positive, negative) draws
    num_validation_pairs: int = 256
    num_test_pairs: int = 1000
    min_prompt_tokens: int = 5  # a prompt is the first n tokens of a review, n drawn for each review
    max_drawn_tokens: int = 15
    test_prompt_tokens: int | None = 17  # of every test prompt; null = drawn as in training
    max_sft_tokens: int = 240  # whole reviews, for supervised fine-tuning

    def longest_row(self) -> tuple[int, str]:
        """Tokens of the longest row that a model has to take, and the keys that say so."""
        review = self.max_sft_tokens + 1, "data.max_sft_tokens + 1"  # a token to begin with
        return max(super().longest_row(), review)

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        for key in (
            "pairs_per_epoch",
            "num_validation_pairs",
            "num_test_pairs",
            "min_prompt_tokens",
            "max_sft_tokens",
        ):
            if getattr(self, key) < 1:
                raise bad_value(f"data.{key}", getattr(self, key), "a whole number >= 1")
        if not 0 <= self.seed < 2**63:
            raise bad_value("data.seed", self.seed, "a whole number >= 0, below 2^63")
        if self.max_drawn_tokens < self.min_prompt_tokens:
            raise bad_value(
                "data.max_drawn_tokens",
                self.max_drawn_tokens,
                f"at least data.min_prompt_tokens={self.min_prompt_tokens}",
            )
        for key in ("max_drawn_tokens", "test_prompt_tokens"):
            value = getattr(self, key)
            if value is not None and not 1 <= value < self.max_prompt_tokens:  # one is left for a BOS token
                raise bad_value(
                    f"data.{key}", value, f"at least 1 and below data.max_prompt_tokens={self.max_prompt_tokens}"
                )
