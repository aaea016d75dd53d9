"""Pairs of a model's own samples: k completions of each prompt, ranked by a reward, every two of them a pair.

    pairs.jsonl   split, prompt, chosen, rejected, chosen_reward, rejected_reward, chosen_ids, rejected_ids

Equal rewards and equal completions are ties and make no pair. The ids are those that were sampled, the EOS among them
where there was one: read from its text again, a completion could have others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_cli.files import write_bytes_atomic
from rlhf_cli.train.run_folder import plain_prompt, read_jsonl
from rlhf_cli.types import Message, Prompt, Rollout

PAIRS_FILE = "pairs.jsonl"


@dataclass(frozen=True)
class SampledPair:
    """Two samples of one prompt."""

    split: str  # "train" | "validation"
    prompt: Prompt
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    chosen_ids: list[int]
    rejected_ids: list[int]


def ranked_pairs(split: str, rollout: Rollout, reward: Sequence[float]) -> list[SampledPair]:
    """All pairs of the samples of each prompt, without the ties.

    Args:
        split: what the pairs are for.
        rollout: k samples of each prompt.
        reward: of each of its rows, higher is better.
    """
    k, found = rollout.samples_per_prompt, list[SampledPair]()
    for first in range(0, len(rollout), k):
        for one, other in combinations(range(first, first + k), 2):
            if reward[one] == reward[other] or rollout.completion_ids[one] == rollout.completion_ids[other]:
                continue
            better, worse = (one, other) if reward[one] > reward[other] else (other, one)
            found.append(
                SampledPair(
                    split,
                    rollout.prompts[first],
                    rollout.completions[better],
                    rollout.completions[worse],
                    float(reward[better]),
                    float(reward[worse]),
                    list(rollout.completion_ids[better]),
                    list(rollout.completion_ids[worse]),
                )
            )
    return found


def as_json(pair: SampledPair) -> dict[str, Any]:
    """A line of the file."""
    return {**asdict(pair), "prompt": plain_prompt(pair.prompt)}


def from_json(row: dict[str, Any]) -> SampledPair:
    """The pair of a line."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
    return SampledPair(**{**row, "prompt": prompt})


def write_pairs(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes them all in one instant: what a kill leaves is no file, or a whole one."""
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_bytes_atomic(file, text.encode("utf-8", errors="replace"))


def read_pairs(file: Path) -> list[SampledPair]:
    """What `write_pairs` wrote."""
    return [from_json(row) for row in read_jsonl(file).rows]
