"""Frozen models in autocast's precision compute what autocast computes over float32 weights, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch
from fixtures_models import reward_model, tiny_lm
from fixtures_rewards import COMPLETIONS, PROMPTS
from torch import nn

from rlhf_cli.data.tokenise import collate
from rlhf_cli.models.causal import token_logprobs
from rlhf_cli.models.low_precision import hold_matrices_in

ROWS = collate([([5, 6, 7], [8, 9]), ([5, 6, 7], [10]), ([11], [12, 13, 14])], 0)


def test_a_language_model_has_the_same_logprobs() -> None:
    model = tiny_lm()
    low = copy.deepcopy(model)
    hold_matrices_in(low, torch.bfloat16)
    embeddings = low.get_input_embeddings().weight
    assert embeddings.dtype is torch.float32 and low.get_output_embeddings().weight.dtype is torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = (token_logprobs(one, ROWS).logprob for one in (model, low))
    assert torch.equal(found, wanted)
    assert not torch.equal(found, token_logprobs(model, ROWS).logprob), "the precision is another one"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "distilbert"])
def test_a_reward_model_gives_the_same_scores(kind: str) -> None:
    reward = reward_model(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = reward.score(PROMPTS, COMPLETIONS).raw
        hold_matrices_in(reward.model, torch.bfloat16)
        assert torch.equal(reward.score(PROMPTS, COMPLETIONS).raw, wanted)
    dtypes = {module.weight.dtype for module in reward.model.base_model.modules() if isinstance(module, nn.Linear)}
    assert dtypes <= {torch.bfloat16}


def test_without_autocast_nothing_changes() -> None:
    model = tiny_lm()
    hold_matrices_in(model, None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
