from __future__ import annotations

from pathlib import Path

import torch

from rlhf_cli.train.sampled_pairs import as_json, from_json, ranked_pairs, read_pairs, write_pairs
from rlhf_cli.types import Message, Prompt, Rollout, Sequences

CHAT: Prompt = (Message("user", "hi\u2028 there"), Message("assistant", "\U0001f600"), Message("user", "?"))


def rollout(prompts: list[Prompt], completions: list[str], k: int) -> Rollout:
    n, nothing = len(completions), torch.zeros(len(completions), 1, dtype=torch.long)
    return Rollout(
        sequences=Sequences(nothing, nothing.bool(), nothing.bool()),
        prompts=tuple(prompt for prompt in prompts for _ in range(k)),
        completions=tuple(completions),
        completion_ids=tuple(tuple(map(ord, text)) for text in completions),
        prompt_index=torch.zeros(n),
        sample_index=torch.zeros(n),
        truncated=torch.zeros(n, dtype=torch.bool),
        sampled_logprob=torch.zeros(n),
        samples_per_prompt=k,
    )


def test_every_two_samples_of_a_prompt_are_a_pair_unless_they_tie():
    rolled = rollout(["p", CHAT], ["a", "b", "c", "d", "e", "e"], 3)
    pairs = ranked_pairs("train", rolled, [1.0, 3.0, 2.0, 0.5, 0.5, 0.25])
    found = [(pair.prompt, pair.chosen, pair.rejected, pair.chosen_reward, pair.rejected_reward) for pair in pairs]
    assert found == [
        ("p", "b", "a", 3.0, 1.0),
        ("p", "c", "a", 2.0, 1.0),
        ("p", "b", "c", 3.0, 2.0),
        # of the second prompt d and the first e have one reward, and the two e are one completion
        (CHAT, "d", "e", 0.5, 0.25),
    ]
    assert pairs[0].chosen_ids == [ord("b")] and pairs[0].rejected_ids == [ord("a")]


def test_all_ties_make_no_pair():
    assert ranked_pairs("train", rollout(["p"], ["a", "b", "c"], 3), [1.0] * 3) == []


def test_what_is_written_is_read(tmp_path: Path):
    texts = ['"\n', "\u2028", "\U0001f600", ""]
    pairs = ranked_pairs("validation", rollout(["\t", CHAT], texts, 2), [0.1, 0.3, 1e-12, -5.0])
    assert len(pairs) == 2
    write_pairs(tmp_path / "pairs.jsonl", [as_json(pair) for pair in pairs])
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs == [from_json(as_json(pair)) for pair in pairs]
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]
