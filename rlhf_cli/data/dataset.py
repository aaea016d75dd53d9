"""What every source of data gives: rows for each stage, split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf_cli.types import Example, Preference, Prompt

GoldReward = Callable[[Prompt, str], float]


@dataclass(frozen=True)
class Dataset:
    """Rows of one source. Validation rows steer training; test rows are only ever evaluated on."""

    name: str
    sft: Sequence[Example]
    sft_validation: Sequence[Example]
    pairs: Sequence[Preference]
    pairs_validation: Sequence[Preference]
    pairs_test: Mapping[str, Sequence[Preference]]  # by name: "test", and "ood" where the source has one
    prompts: Sequence[Prompt]  # what policies are rolled out on in training
    prompts_validation: Sequence[Prompt]
    prompts_test: Mapping[str, Sequence[Prompt]]
    max_prompt_tokens: int
    max_completion_tokens: int
    gold: GoldReward | None = None  # the true reward, where the source knows it


def rows_digest(*parts: Sequence[Example] | Sequence[Preference] | Sequence[Prompt]) -> str:
    """Digest of rows; changes exactly when a row, or the order of the rows, does."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for row in part:
            digest.update(repr(row).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()
