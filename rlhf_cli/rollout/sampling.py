"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    max_rows: int = 512  # rows decoded together
    max_tokens: int | None = (
        None  # tokens decoded together, prompts (once a row) and completions; None = any number
    )
