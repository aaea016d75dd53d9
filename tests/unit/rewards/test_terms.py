"""Each reward term against values worked by hand, and their weighted sum."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures_models import byte_tokenizer, gpt2_lm, tiny_lm

from rlhf_cli.data.tokenise import encode_completion, encode_prompt
from rlhf_cli.rewards.repetition import ngrams, repetition_rate
from rlhf_cli.rewards.term_settings import Count, RewardRule
from rlhf_cli.rewards.terms import (
    Judge,
    RewardSum,
    gold_rewards,
    length_penalty,
    mean_logprobs,
    missing_eos_penalty,
    repetition_penalty,
    rule_matches,
)
from rlhf_cli.types import Rollout, Scores, Sequences

EOS = 1


def rollout_of(
    texts: list[str],
    ids: list[list[int]] | None = None,
    prompts: list[str] | None = None,
    cut: tuple[int, ...] = (),
) -> Rollout:
    """Completions after one token of prompt each; token ids default to those of the words, an EOS at the end."""
    words = sorted({word for text in texts for word in text.split()})
    found = ids or [[words.index(word) + 2 for word in text.split()] + [EOS] for text in texts]
    width = 1 + max(map(len, found))
    rows = torch.tensor([[2, *row, *[0] * (width - 1 - len(row))] for row in found])
    attention = torch.tensor([[column <= len(row) for column in range(width)] for row in found])
    counts = attention & (torch.arange(width) > 0)
    n = len(texts)
    return Rollout(
        Sequences(rows, attention, counts),
        tuple(prompts or ["p"] * n),
        tuple(texts),
        tuple(map(tuple, found)),
        torch.arange(n),
        torch.zeros(n, dtype=torch.long),
        torch.tensor([i in cut for i in range(n)]),
        torch.zeros(n),
        1,
    )


def test_length_is_a_share_of_the_longest_there_can_be():
    texts = rollout_of(["a", "a b c", "a b c d e f g"])
    assert length_penalty(texts, 8).tolist() == [-0.25, -0.5, -1.0]


def test_a_cut_completion_costs_one():
    values = missing_eos_penalty(rollout_of(["a", "b", "c"], cut=(1,))).tolist()
    assert values == [0.0, -1.0, 0.0]
    assert [math.copysign(1, value) for value in values] == [1, -1, 1], "no -0.0 among the samples"


def test_ngrams_in_order():
    assert ngrams("abcd", 2) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert ngrams("a", 2) == []
    with pytest.raises(ValueError, match="n=0"):
        ngrams("ab", 0)


def test_repetition_counts_what_occurred_before():
    assert repetition_rate("aaaa", 1) == 0.75
    assert repetition_rate("abab", 2) == pytest.approx(1 / 3)  # ab ba ab
    assert repetition_rate("abcd", 1) == 0
    assert repetition_rate("ab", 3) == 0


def test_repetition_is_of_tokens():
    # 5 5 5 5 E: the pairs 55 55 55 5E are 2 of 4 different; 5 6 7 E has no repetition; one token has no pair
    rollout = rollout_of(["x", "y", "z"], [[5, 5, 5, 5, EOS], [5, 6, 7, EOS], [EOS]])
    assert repetition_penalty(rollout, 2).tolist() == [-0.5, 0.0, 0.0]
    assert repetition_penalty(rollout, 1).tolist() == pytest.approx([-0.6, 0.0, 0.0])


def test_the_gold_reward_is_the_datas():
    rollout = rollout_of(["a", "bb"], prompts=["xx", "y"])
    assert gold_rewards(lambda prompt, text: 10.0 * len(prompt) + len(text), rollout).tolist() == [21.0, 12.0]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"words": ["good"]}, [1, 0, 0, 0]),
        ({"words": ["good"], "count": Count.each}, [2, 0, 0, 0]),
        ({"words": ["good"], "ignore_case": True}, [1, 1, 0, 0]),
        ({"words": ["good", "goods"], "count": Count.each}, [2, 0, 1, 0]),
        ({"words": ["thank you!"]}, [0, 0, 0, 1]),
        ({"words": ["c++"]}, [0, 0, 1, 0]),
        ({"pattern": r"go+d", "count": Count.each}, [2, 0, 2, 0]),
        ({"pattern": r"(?m)^\w+ you", "ignore_case": True}, [0, 0, 0, 1]),
        ({"pattern": r"\d+", "count": Count.each}, [0, 2, 0, 0]),
    ],
)
def test_a_rule_finds_words_or_a_pattern(rule: dict[str, Any], expected: list[int]):
    made = RewardRule(name="r", weight=1.0, **rule)
    made.check("reward.rules[0]")
    texts = rollout_of(["good, and good", "GOOD 12 34", "goods ungood c++", "well\nThank you! thank you!"])
    assert rule_matches(made.compiled(), texts, made.count is Count.each).tolist() == expected


class Table(torch.nn.Module):
    """A language model whose next token depends on the last one alone."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


def test_coherence_is_the_mean_log_probability_of_the_completions_tokens():
    # after 2: 3 has probability 3/4; after 3: EOS has 1/2, 2 and 3 a quarter
    table = Table([[0.0] * 4, [0.0] * 4, [-99.0, -99.0, 0.0, math.log(3)], [-99.0, math.log(2), 0.0, 0.0]])
    rollout = rollout_of(["b", "b a b", "b b"], [[3, EOS], [3, 2, 3, EOS], [3, 3]], cut=(2,))
    expected = [
        (math.log(3 / 4) + math.log(1 / 2)) / 2,
        (math.log(3 / 4) + math.log(1 / 4) + math.log(3 / 4) + math.log(1 / 2)) / 4,
        (math.log(3 / 4) + math.log(1 / 4)) / 2,
    ]
    for size in (1, 2, 3):
        assert mean_logprobs(table, rollout.sequences, size).tolist() == pytest.approx(expected, abs=1e-6)
    assert Judge(table, 2)(rollout).tolist() == pytest.approx(expected, abs=1e-6)


@torch.no_grad()
def _alone(model: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([[*prompt, *completion]])
    logprob = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    steps = range(len(prompt), len(prompt) + len(completion))
    return sum(float(logprob[t - 1, ids[0, t]]) for t in steps) / len(completion)


def test_another_model_judges_the_text_with_its_own_tokenizer():
    model, tokenizer = tiny_lm().eval(), byte_tokenizer()
    rollout = rollout_of(
        ["was good", "x y", ""], [[3, 4, EOS], [5, 6], [7]], ["the film ", "a ", "funny "], cut=(1, 2)
    )
    judge = Judge(model, 2, tokenizer, 24, 16)
    expected = []
    for prompt, text, eos in zip(rollout.prompts, rollout.completions, (True, False, True), strict=True):
        ids = encode_completion(tokenizer, text, 16, append_eos=eos)
        assert ids, "a text of nothing is judged by its end"
        expected.append(_alone(model, encode_prompt(tokenizer, prompt, 24), ids))
    found = judge(rollout)
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    other = Judge(gpt2_lm(byte_tokenizer()).eval(), 3, tokenizer, 24, 16)(rollout)
    assert not torch.allclose(other, found, atol=0.01), "another model has another opinion"


def test_the_sum_is_weighted_and_keeps_its_terms():
    def model(rollout: Rollout) -> Scores:
        raw = torch.tensor([3.0, 5.0])
        return Scores(reward=raw - 4, raw=raw, disagreement=torch.tensor([0.1, 0.2]))

    rollout = rollout_of(["a", "a b c"], cut=(1,))
    terms = {"length": partial(length_penalty, max_new_tokens=4), "missing_eos": missing_eos_penalty}
    weights = {"rm": 2.0, "length": 0.5, "missing_eos": 3.0}
    scores = RewardSum(weights, terms, model)(rollout)
    assert scores.reward.tolist() == [-2 - 0.25, 2 - 0.5 - 3]
    assert scores.raw.tolist() == [3.0, 5.0] and scores.disagreement is not None
    assert {name: term.tolist() for name, term in scores.terms.items()} == {
        "rm": [-1.0, 1.0],
        "length": [-0.5, -1.0],
        "missing_eos": [0.0, -1.0],
    }
    without = RewardSum({"missing_eos": -2.0}, {"missing_eos": missing_eos_penalty})(rollout)
    assert without.reward.tolist() == without.raw.tolist() == [0.0, 2.0]
    assert list(without.terms) == ["missing_eos"]
