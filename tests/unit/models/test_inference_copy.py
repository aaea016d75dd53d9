"""A copy for decoding computes what the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures_architectures import DECODERS
from fixtures_models import byte_tokenizer, gpt2_lm, seeded, tiny_lm
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.models.inference_copy import InferenceCopy, is_adapted
from rlhf_cli.models.lora import add_lora
from rlhf_cli.models.settings import PeftSettings

IDS = torch.tensor([[3, 9, 27, 81, 17, 5]])
BF16 = torch.bfloat16


def _lm(name: str) -> PreTrainedModel:
    architecture = DECODERS[name]
    config = architecture.config(architecture.tokenizer())
    model: PreTrainedModel = seeded(AutoModelForCausalLM.from_config, config, 1)
    return model


def _with_lora(model: PreTrainedModel, targets: Any = "all-linear") -> PreTrainedModel:
    settings = PeftSettings(name="lora", r=3, alpha=5, target_modules=targets)
    add_lora("peft", model, settings, "base", seed=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@torch.no_grad()
def _logits(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Tensor:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("name", list(DECODERS))
def test_in_a_lower_precision_it_is_autocast_to_the_bit(name: str) -> None:
    model = _lm(name)
    twin = InferenceCopy(model, BF16).model
    expected = _logits(model, BF16)
    assert expected.dtype == BF16 and not torch.equal(expected.float(), _logits(model))
    assert torch.equal(_logits(twin, BF16), expected)
    assert twin.get_output_embeddings().weight.dtype == BF16
    assert twin.get_input_embeddings().weight is model.get_input_embeddings().weight  # shared, float32
    assert model.get_output_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: gpt2_lm(byte_tokenizer()), lambda: _lm("Llama"), lambda: _lm("OPT")])
def test_an_adapter_is_merged(make: Any) -> None:
    model = _with_lora(make())
    with_adapter = _logits(model)
    copied = InferenceCopy(model, None)
    assert is_adapted(model) and not is_adapted(copied.model)
    torch.testing.assert_close(_logits(copied.model), with_adapter, rtol=0, atol=1e-5)
    assert torch.equal(_logits(model), with_adapter)
    assert not any("lora" in name for name, _ in copied.model.named_parameters())
    lower = InferenceCopy(model, BF16).model
    torch.testing.assert_close(_logits(lower, BF16).float(), with_adapter, rtol=0, atol=0.1)


@pytest.mark.parametrize("dtype", [None, BF16])
@pytest.mark.parametrize("adapted", [False, True])
def test_it_is_refreshed_in_place(adapted: bool, dtype: torch.dtype | None) -> None:
    model = _with_lora(tiny_lm()) if adapted else tiny_lm()
    copied = InferenceCopy(model, dtype)
    before = _logits(copied.model, dtype)
    places = [tensor.data_ptr() for tensor in copied.model.parameters()]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
    copied.refresh()
    assert [tensor.data_ptr() for tensor in copied.model.parameters()] == places
    after = _logits(copied.model, dtype)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, _logits(InferenceCopy(model, dtype).model, dtype), rtol=0, atol=0)
    if not adapted:
        assert torch.equal(after, _logits(model, dtype))


def test_refreshing_under_autocast_merges_in_full_precision() -> None:
    model = _with_lora(tiny_lm())
    copied = InferenceCopy(model, None)
    expected = _logits(copied.model)
    with torch.autocast("cpu", dtype=BF16):
        copied.refresh()
    assert torch.equal(_logits(copied.model), expected)
