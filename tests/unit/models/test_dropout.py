"""One rate for every dropout that a backbone has, whatever it is called there."""

from __future__ import annotations

import copy

import pytest
import torch
from fixtures_models import byte_tokenizer, gpt2_lm, reward_model, tiny_lm
from torch import nn
from transformers import BertConfig, BertModel

from rlhf_cli.errors import RequestError
from rlhf_cli.models.dropout import set_dropout

IDS = torch.arange(12).reshape(1, 12)


def differ(model: nn.Module) -> bool:
    """Whether two passes of training differ: something is dropped."""
    model.train()
    with torch.no_grad():
        one, other = (model(IDS)[0] for _ in range(2))
    model.eval()
    return not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["gpt2", "distilbert", "bert"])
def test_every_dropout_gets_the_rate(kind: str) -> None:
    if kind == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        model: nn.Module = BertModel(BertConfig(vocab_size=20, **sizes))
    else:
        model = gpt2_lm(byte_tokenizer()) if kind == "gpt2" else reward_model(kind).model
    set_dropout("rm.dropout", model, 0.25)
    rates = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.25}
    assert differ(model)
    set_dropout("rm.dropout", model, 0.0)
    assert not differ(model)


def test_a_rate_inside_a_fused_kernel_is_set_too() -> None:
    model = tiny_lm()
    assert not differ(model)
    set_dropout("rm.dropout", model, 0.5)
    assert differ(model)
    assert {module.attention_dropout for module in model.modules() if hasattr(module, "attention_dropout")} == {
        0.5
    }
    assert not [module for module in model.modules() if isinstance(module, nn.Dropout)], "there is nothing else"


def test_neither_config_nor_weights_nor_evaluation_change() -> None:
    model = gpt2_lm(byte_tokenizer())
    before = copy.deepcopy(model)
    set_dropout("rm.dropout", model, 0.5)
    assert model.config.to_dict() == before.config.to_dict()
    with torch.no_grad():
        assert torch.equal(model.eval()(IDS).logits, before.eval()(IDS).logits)


def test_a_model_without_any_is_refused_unless_it_is_to_have_none() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    set_dropout("rm.dropout", model, 0.0)
    with pytest.raises(RequestError) as caught:
        set_dropout("rm.dropout", model, 0.1)
    assert str(caught.value) == "rm.dropout=0.1: expected 0 or null, because Sequential has no dropout"
