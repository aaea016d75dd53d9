"""How completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    max_rows: int = 512  # rows decoded together
    top_k: int | None = None  # tokens that are drawn from: see `ops.sampling.truncated_logits`
    top_p: float | None = None
    max_tokens: int | None = (
        None  # tokens decoded together, prompts (once a row) and completions; None = any number
    )
