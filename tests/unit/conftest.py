"""Small models and tokenizers built from configs; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 24  # pad 0, eos 1, words t2..t23

ModelFactory = Callable[..., PreTrainedModel]


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One word one token: "t5 t7" is [5, 7]."""
    vocabulary = {"<|pad|>": 0, "<|eos|>": 1, **{f"t{i}": i for i in range(2, VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>")


@pytest.fixture
def make_llama() -> ModelFactory:
    """Rotary positions, no dropout."""

    def build(seed: int = 0) -> PreTrainedModel:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.4,  # large, so that distributions are far from uniform
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        return _seeded(LlamaForCausalLM, config, seed)

    return build


@pytest.fixture
def make_gpt2() -> ModelFactory:
    """Learned absolute positions, and dropout."""

    def build(seed: int = 0, dropout: float = 0.1) -> PreTrainedModel:
        config = GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=64,
            n_embd=16,
            n_layer=2,
            n_head=2,
            initializer_range=0.4,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        return _seeded(GPT2LMHeadModel, config, seed)

    return build


@pytest.fixture(params=["llama", "gpt2"])
def make_model(request: pytest.FixtureRequest) -> ModelFactory:
    """Each architecture in turn."""
    return request.getfixturevalue(f"make_{request.param}")


def _seeded(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()
