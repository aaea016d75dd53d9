"""Rows without padding, a shared prompt once, have the figures of padded rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_architectures import DECODERS, ENCODERS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import RequestError
from rlhf_cli.models import packing
from rlhf_cli.models.attention import ATTENTION, takes_layouts
from rlhf_cli.models.causal import full_kls, token_logprobs
from rlhf_cli.models.critic import SeparateCritic
from rlhf_cli.models.loading import classifier_from_lm
from rlhf_cli.models.packing import enable_layouts, ideal_branches, like_lengths, pack
from rlhf_cli.models.recompute import enable_recomputation, recomputing
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.types import Sequences

VOCABULARY = 40
LONG, SHORT, LONE = [5, 6, 7, 8, 9, 5, 6, 7, 8, 30, 31, 32], [11, 12], [13]
# prompts that are shared and not, next to each other and apart, of very different lengths; one completion a token long
ROWS = [
    (LONG, [20, 21, 22]),
    (SHORT, [23]),
    (LONG, [24, 25, 26, 27, 28]),
    (LONE, [29, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 20]),
    (SHORT, [30, 31, 32, 33]),
    (SHORT, [23]),
    (LONG, [20, 21, 22]),
]
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "llama": {"num_key_value_heads": 2},
    "llama-gqa": {"num_key_value_heads": 1},
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 1},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "opt": {"word_embed_proj_dim": 16, "ffn_dim": 32},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 3},
}


def language_model(family: str, **more: Any) -> PreTrainedModel:
    """Untrained, of 2 layers, its biases and norms away from their starts."""
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "max_position_embeddings": 64,
    }
    config = AutoConfig.for_model(family.split("-")[0], **{**sizes, **FAMILIES.get(family, {}), **more})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.eval()


def both(family: str, **more: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model, called with padding and on packed rows."""
    padded = language_model(family, **more)
    packed = copy.deepcopy(padded)
    assert enable_layouts(packed) and not takes_layouts(padded)
    return padded, packed


def gradients(model: PreTrainedModel, sequences: Sequences) -> dict[str, torch.Tensor]:
    """Of a weighted sum of log-probs: each token has a weight of its own."""
    logprob = token_logprobs(model, sequences, 0.7).logprob
    weights = torch.linspace(-1, 1, logprob.numel()).reshape(logprob.shape)
    (weights * logprob).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_entropies_and_gradients_are_those_of_padded_rows(family: str, side: str) -> None:
    padded, packed = both(family)
    rows = collate(ROWS, 0, side)
    wanted, found = (token_logprobs(model, rows, 0.7) for model in (padded, packed))
    assert torch.equal(found.mask, wanted.mask) and found.entropy is not None and wanted.entropy is not None
    torch.testing.assert_close(found.logprob, wanted.logprob, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.entropy, wanted.entropy, atol=1e-5, rtol=0)
    expected = gradients(padded, rows)
    for name, gradient in gradients(packed, rows).items():
        torch.testing.assert_close(
            gradient, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("branches", [1, 2, 100])
def test_however_many_completions_share_a_prompt(branches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "ideal_branches", lambda *_: branches)
    padded, packed = both("llama")
    rows = collate(ROWS, 0)
    torch.testing.assert_close(
        token_logprobs(packed, rows).logprob, token_logprobs(padded, rows).logprob, atol=1e-5, rtol=0
    )


def test_a_shared_prompt_is_there_once() -> None:
    rows = collate([(list(range(3, 13)), [20 + i, 30]) for i in range(4)], 0)
    assert len(pack(rows, hidden_size=64)) == 10 + 4 * 2
    assert len(pack(collate(ROWS, 0), hidden_size=10**6)) == 12 + 2 + 1 + sum(
        len(completion) for _, completion in ROWS[:5]
    )


def test_equal_rows_have_equal_figures_to_the_bit() -> None:
    model = classifier_from_lm(language_model("llama"), seed=1)
    rows = collate(
        [(LONG, [20, 21]), (LONG, [22, 23, 24]), (LONG, [20, 21]), (SHORT, [20, 21]), (SHORT, [20, 21])], 0
    )
    scores = score_sequences(model, rows)[:, 0].tolist()
    assert scores[0] == scores[2] and scores[3] == scores[4] and len(set(scores)) == 3
    assert len(pack(rows, hidden_size=10**6)) == 12 + 2 + 3 + 2 + 2


def test_rows_that_differ_in_their_prompt_alone_do_not_share_it() -> None:
    padded, packed = both("llama")
    rows = collate([([5, 6, 7], [9]), ([5, 6, 8], [9]), ([5, 6], [7, 9])], 0)
    torch.testing.assert_close(
        token_logprobs(packed, rows).logprob, token_logprobs(padded, rows).logprob, atol=1e-5, rtol=0
    )


def test_kl_and_values_are_those_of_padded_rows() -> None:
    padded, packed = both("llama")
    rows = collate(ROWS, 0)
    other = language_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(0.7)
    wanted = full_kls(padded, other, rows, 1.0, 3)
    again = copy.deepcopy(other)
    enable_layouts(again)
    assert wanted.min() > 0
    torch.testing.assert_close(full_kls(packed, again, rows, 1.0, 3), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full_kls(packed, other, rows, 1.0, 3), wanted, atol=1e-5, rtol=1e-5)
    critics = [SeparateCritic(classifier_from_lm(padded, seed=1)) for _ in range(2)]
    critics[0].backbone.set_attn_implementation("sdpa")
    for critic in critics:
        torch.nn.init.ones_(critic.head.linear.weight)
    assert takes_layouts(critics[1].backbone) and not takes_layouts(critics[0].backbone)
    values, others = critics[0](rows), critics[1](rows)
    assert values.abs().max() > 0
    torch.testing.assert_close(others, values, atol=1e-5, rtol=1e-5)


def test_scores_are_read_at_the_last_token_of_each_row() -> None:
    packed = classifier_from_lm(language_model("llama"), seed=1)
    padded = copy.deepcopy(packed)
    padded.set_attn_implementation("sdpa")
    rows = collate([*ROWS, ([5, 6, 7], []), ([], [8, 9]), ([], [8, 9, 10])], 0)  # labelled texts have no prompt
    assert takes_layouts(packed) and not takes_layouts(padded)
    torch.testing.assert_close(score_sequences(packed, rows), score_sequences(padded, rows), atol=1e-5, rtol=0)


def test_recomputed_activations_have_the_same_gradients() -> None:
    _, packed = both("llama")
    again = copy.deepcopy(packed)
    enable_recomputation("x", again)
    rows = collate(ROWS, 0)
    wanted = gradients(packed, rows)
    with recomputing(again):
        found = gradients(again, rows)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_dropout_acts_in_training_alone() -> None:
    _, packed = both("gpt2", attn_pdrop=0.5, embd_pdrop=0.0, resid_pdrop=0.0)
    rows = collate(ROWS, 0)
    still = token_logprobs(packed, rows).logprob
    packed.train()
    assert not torch.allclose(token_logprobs(packed, rows).logprob, still, atol=1e-3)


def test_in_bfloat16_as_close_as_padded_rows_are() -> None:
    padded, packed = both("llama")
    rows = collate(ROWS, 0)
    exact = token_logprobs(padded, rows).logprob
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [float((token_logprobs(model, rows).logprob - exact).abs().mean()) for model in (padded, packed)]
    assert 0 < errors[1] < 2 * errors[0]


def test_a_row_longer_than_the_positions_is_refused() -> None:
    _, packed = both("llama", max_position_embeddings=16)
    with pytest.raises(RequestError, match="17 tokens is longer than the 16 positions"):
        token_logprobs(packed, collate([(list(range(3, 19)), [3])], 0))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("bloom", {"n_layer": 2, "n_head": 2}),  # positions from the attention mask
        ("gemma2", {"head_dim": 8, "num_key_value_heads": 1}),  # scores and logits are capped
        (
            "gemma2",
            {"head_dim": 8, "num_key_value_heads": 1, "attn_logit_softcapping": None},
        ),  # logits alone, if large
        ("cohere", {"logit_scale": 0.25, "num_key_value_heads": 1}),  # logits are more than a product
        ("mamba", {"state_size": 4}),  # no attention
    ],
)
def test_what_does_not_work_on_one_row_of_tokens_is_left_as_it_is(family: str, more: dict[str, Any]) -> None:
    model = language_model(family, **more)
    before = model.config._attn_implementation
    rows = collate(ROWS, 0)
    wanted = token_logprobs(model, rows).logprob
    assert not enable_layouts(model) and not takes_layouts(model)
    assert model.config._attn_implementation == before
    assert torch.equal(token_logprobs(model, rows).logprob, wanted)


def test_encoders_see_in_both_directions_and_are_left_as_they_are() -> None:
    for architecture in ENCODERS.values():
        config = architecture.config(architecture.tokenizer())
        assert not enable_layouts(AutoModelForSequenceClassification.from_config(config))


def test_all_decoders_of_the_table_work_on_packed_rows() -> None:
    for architecture in DECODERS.values():
        config = architecture.config(architecture.tokenizer())
        assert enable_layouts(AutoModelForCausalLM.from_config(config)), architecture.model_type


def test_a_saved_model_does_not_know_of_it(tmp_path: Path) -> None:
    _, packed = both("llama")
    packed.save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_like_lengths_are_together() -> None:
    lengths = [100, 40, 75, 74, 30, 99]
    groups = like_lengths(lengths)
    assert sorted(i for group in groups for i in group) == list(range(6))
    assert all(min(lengths[i] for i in group) >= 0.75 * max(lengths[i] for i in group) for group in groups)
    assert ideal_branches(1, 1000.0, 64) == 1
