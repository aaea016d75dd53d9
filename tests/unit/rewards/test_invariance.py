"""A score is of its text alone: neither the rows beside it nor what fills them up changes it, of any reward model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from fixtures_rewards import COMPLETIONS, GRADES, PROMPTS, any_model, ensemble_of, with_lora

from rlhf_cli.data.tokenise import collate
from rlhf_cli.rewards import scoring as module
from rlhf_cli.rewards.model import RewardModel, Scorer
from rlhf_cli.runs.merged_reward import averaged

ATOL = 1e-5


def single(kind: str, labels: int, peft: str, seed: int = 0) -> RewardModel:
    """One whose tokenizer is its own, so that a test may change it."""
    reward = any_model(kind, labels, seed)
    reward.tokenizer = copy.deepcopy(reward.tokenizer)
    if peft == "lora":
        with_lora(reward, seed + 1)
    return reward


def members(kind: str, labels: int, peft: str) -> list[RewardModel]:
    """Three of them; those with an adapter are merged, as they are when they are saved."""
    found = [any_model(kind, labels, seed) for seed in range(3)]
    tokenizer = copy.deepcopy(found[0].tokenizer)
    for seed, one in enumerate(found):
        one.tokenizer = tokenizer
        if peft == "lora":
            one.model = with_lora(one, seed + 1).merged()
    return found


def warm(kind: str, labels: int, peft: str) -> RewardModel:
    """The mean of their weights."""
    return averaged(members(kind, labels, peft))


def ensemble(kind: str, labels: int, peft: str) -> Scorer:
    """Their mean prediction, less their disagreement."""
    return ensemble_of(members(kind, labels, peft), 0.5)


FORMS: dict[str, Callable[[str, int, str], Scorer]] = {"single": single, "warm": warm, "ensemble": ensemble}

CASES = [
    *((form, kind, labels, "none") for form in FORMS for kind in ("llama", "gpt2") for labels in (1, GRADES)),
    *((form, kind, labels, "lora") for form in FORMS for kind, labels in (("llama", GRADES), ("gpt2", 1))),
    *(("single", "distilbert", labels, "none") for labels in (1, GRADES)),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def scorer(request: pytest.FixtureRequest) -> Scorer:
    form, kind, labels, peft = request.param
    return FORMS[form](kind, labels, peft)


@pytest.fixture(scope="module")
def expected(scorer: Scorer) -> torch.Tensor:
    """Every text by itself, without any padding."""
    found = torch.cat([scorer.score([p], [c]).raw for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert found.std() > 0.01, "the scores tell the texts apart"
    return found


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 128])
def test_the_size_of_a_batch(scorer: Scorer, expected: torch.Tensor, size: int):
    close(scorer.score(PROMPTS, COMPLETIONS, batch_size=size).raw, expected)


@pytest.mark.parametrize("order", [[3, 0, 4, 2, 1], [4, 3, 2, 1, 0], [0, 0, 3, 3, 3]])
def test_the_order_of_the_rows(scorer: Scorer, expected: torch.Tensor, order: Sequence[int]):
    found = scorer.score([PROMPTS[i] for i in order], [COMPLETIONS[i] for i in order], batch_size=2).raw
    close(found, expected[order])


@pytest.mark.parametrize("length", [None, 50])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_side_of_the_padding_and_its_length(
    scorer: Scorer, expected: torch.Tensor, side: str, length: int | None, monkeypatch: pytest.MonkeyPatch
):
    def padded(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> object:
        padded.calls += 1
        return collate(rows, pad_id, side, length)

    padded.calls = 0
    monkeypatch.setattr(module, "collate", padded)
    close(scorer.score(PROMPTS, COMPLETIONS).raw, expected)
    assert padded.calls > 0


def test_a_pad_token_that_is_the_end_or_a_word(scorer: Scorer, expected: torch.Tensor):
    tokenizer = scorer.tokenizer
    before = tokenizer.pad_token_id
    words = [tokenizer("film", add_special_tokens=False)["input_ids"][0], tokenizer.eos_token_id]
    models = [one.model for one in getattr(scorer, "members", [scorer])]
    try:
        for pad_id in (word for word in words if word is not None):
            tokenizer.pad_token_id = pad_id
            for model in models:
                model.config.pad_token_id = pad_id
            close(scorer.score(PROMPTS, COMPLETIONS).raw, expected)
    finally:
        tokenizer.pad_token_id = before
        for model in models:
            model.config.pad_token_id = before
