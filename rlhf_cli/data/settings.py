"""Settings of the data sources: the part of the config that they read. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from rlhf_cli.errors import bad_value

if TYPE_CHECKING:
    from rlhf_cli.data.reviews import ReviewsSpec


@dataclass
class DataSettings:
    """What every source has."""

    name: str = ""
    max_prompt_tokens: int = 512  # longer prompts lose their beginning
    max_completion_tokens: int = 256  # longest completion, in training and sampling; longer ones are cut

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        for key in ("max_prompt_tokens", "max_completion_tokens"):
            if getattr(self, key) < 1:
                raise bad_value(f"data.{key}", getattr(self, key), "a whole number >= 1")


@dataclass
class ReviewsSettings(DataSettings):
    """The embedded corpus; see `rlhf_cli.data.reviews`."""

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
class JsonlSettings(DataSettings):
    """A user's own file of prompt / chosen / rejected."""

    path: str | None = None  # the file
    test_path: str | None = None  # test pairs; null = a share of `path`
    test_fraction: float = 0.1  # share of the prompts kept for the test, where test_path is null
    validation_fraction: float = 0.05  # share of the prompts that steer training

    def check(self) -> None:
        """Raises RequestError for impossible values."""
        super().check()
        if self.path is None:
            raise bad_value("data.path", None, "a .jsonl file with prompt, chosen and rejected")
        for key in ("test_fraction", "validation_fraction"):
            if not 0.0 < getattr(self, key) < 0.5:
                raise bad_value(f"data.{key}", getattr(self, key), "a number above 0 and below 0.5")
