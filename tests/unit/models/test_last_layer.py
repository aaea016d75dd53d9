"""Training the last block and the head alone, for each architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_architectures import ALL, DECODERS, ENCODERS
from fixtures_models import byte_tokenizer, gpt2_lm, seeded, tiny_lm
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_cli import build
from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import RequestError
from rlhf_cli.models.causal import token_logprobs
from rlhf_cli.models.last_layer import freeze_below_last_layer, has_tied_head
from rlhf_cli.models.loading import parameter_counts
from rlhf_cli.models.recompute import enable_recomputation, recomputing
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rewards.scoring import score_sequences
from rlhf_cli.runs.common import prepare
from rlhf_cli.settings import TrainSettings

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]

# Of two blocks
LAST_BLOCK = {
    "GPT-2": "transformer.h.1",
    "Llama": "model.layers.1",
    "GPT-NeoX": "gpt_neox.layers.1",
    "Qwen2": "model.layers.1",
    "Gemma": "model.layers.1",
    "OPT": "model.decoder.layers.1",
    "Mistral": "model.layers.1",
    "DistilBERT": "distilbert.transformer.layer.1",
    "BERT": "bert.encoder.layer.1",
    "RoBERTa": "roberta.encoder.layer.1",
}
CLASSIFIER_HEADS = {
    "DistilBERT": {"pre_classifier", "classifier"},
    "BERT": {"classifier"},
    "RoBERTa": {"classifier"},
}
OUTPUTS = {name: {"lm_head"} for name in ("Llama", "Mistral", "GPT-NeoX")}  # of those that are not tied


def made(name: str, auto_class: Any, **more: Any) -> PreTrainedModel:
    """In eval mode: dropout off."""
    architecture = ALL[name]
    return seeded(auto_class.from_config, architecture.config(architecture.tokenizer(), **more), 1).eval()


def lm(name: str) -> PreTrainedModel:
    return made(name, AutoModelForCausalLM)


def classifier(name: str) -> PreTrainedModel:
    return made(name, AutoModelForSequenceClassification, num_labels=1)


def result(model: PreTrainedModel) -> Tensor:
    """What is trained: log-probs, or scores."""
    rows = collate(ROWS, 1)
    if model.get_output_embeddings() is None:
        return score_sequences(model, rows)
    return token_logprobs(model, rows).sequence_logprob()


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def inside(model: PreTrainedModel, places: set[str]) -> set[str]:
    """Names of the parameters in these parts, which all have some."""
    names = {name for name, _ in model.named_parameters()}
    assert all(any(name.startswith(f"{place}.") for name in names) for place in places)
    return {name for name in names if name.startswith(tuple(f"{place}." for place in places))}


@pytest.mark.parametrize("name", DECODERS)
def test_of_a_policy_the_last_block_is_trained_and_the_output_where_it_is_its_own(name: str):
    model = lm(name)
    freeze_below_last_layer("peft", model)
    assert has_tied_head(model) == (name not in OUTPUTS)
    assert trained(model) == inside(model, {LAST_BLOCK[name], *OUTPUTS.get(name, ())})


@pytest.mark.parametrize("name", ALL)
def test_of_a_classifier_the_last_block_and_all_outside_the_backbone_are_trained(name: str):
    model = classifier(name)
    freeze_below_last_layer("rm.peft", model)
    assert trained(model) == inside(model, {LAST_BLOCK[name], *CLASSIFIER_HEADS.get(name, {"score"})})


def counted(model: PreTrainedModel, block: str) -> list[None]:
    """Grows with every time that a block is computed."""
    calls: list[None] = []
    part = next(iter(model.get_submodule(block).children()))  # a checkpoint goes round the block's own hooks
    part.register_forward_hook(lambda *_: calls.append(None))
    return calls


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "make"), [*((n, lm) for n in DECODERS), *((n, classifier) for n in ALL)])
def test_gradients_are_those_of_the_whole_model_and_nothing_is_kept_below(name: str, make: Any, recompute: bool):
    whole = make(name)
    result(whole).sum().backward()
    expected = {key: parameter.grad for key, parameter in whole.named_parameters()}

    model = make(name)
    freeze_below_last_layer("peft", model)
    if recompute:
        enable_recomputation("gradient_checkpointing", model)
    needs_graph: list[bool] = []
    model.get_submodule(LAST_BLOCK[name]).register_forward_pre_hook(
        lambda _, args, kwargs: needs_graph.append((args[0] if args else kwargs["hidden_states"]).requires_grad),
        with_kwargs=True,
    )
    calls = {place: counted(model, place) for place in (LAST_BLOCK[name], f"{LAST_BLOCK[name][:-1]}0")}
    with recomputing(model):
        value = result(model)
        value.sum().backward()
    assert needs_graph == [False]
    assert [len(found) for found in calls.values()] == [1 + recompute, 1], "only what is trained is computed again"
    torch.testing.assert_close(value, result(whole))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and expected[key] is not None
            torch.testing.assert_close(parameter.grad, expected[key])
        else:
            assert parameter.grad is None
    assert (
        sum(float(parameter.grad.abs().sum()) for parameter in model.parameters() if parameter.requires_grad) > 0
    )


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_stays_as_it_is(name: str):
    model = classifier(name).train()
    freeze_below_last_layer("rm.peft", model)
    assert all(module.training for module in model.modules())


def test_blocks_that_are_not_in_one_list_are_one_line():
    config = AlbertConfig(
        vocab_size=100, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=1
    )
    model = seeded(AlbertForSequenceClassification, config, 0)
    match = r"^rm\.peft\.name=last_layer: expected none or lora for a model of type albert, because its blocks"
    with pytest.raises(RequestError, match=match):
        freeze_below_last_layer("rm.peft", model)
    assert all(parameter.requires_grad for parameter in model.parameters()), "refused before anything is changed"


def test_a_list_inside_the_blocks_is_not_taken_for_them():
    model = tiny_lm(3)
    for block in model.model.layers:
        block.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in model.model.layers)
    freeze_below_last_layer("peft", model)
    last = len(model.model.layers) - 1
    assert trained(model) == inside(model, {f"model.layers.{last}"})


class Messages:
    """A recorder's."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(
    ("make", "base", "said"),
    [
        (lambda: gpt2_lm(byte_tokenizer()), "base", "peft=last_layer: the last block alone is trained"),
        (lambda: lm("Llama"), "base", None),
        (lambda: classifier("Llama"), "base", None),
        (lambda: gpt2_lm(byte_tokenizer()), None, "peft=last_layer: all weights are trained"),
    ],
)
def test_a_run_says_what_is_not_as_the_name_says(make: Any, base: str | None, said: str | None):
    recorder, model = Messages(), make()
    assert prepare(recorder, "peft", PeftSettings(name="last_layer"), TrainSettings(), model, base, 0) is None  # type: ignore[arg-type]
    assert len(recorder.lines) == (said is not None)
    assert all(line.startswith(said) for line in recorder.lines if said)
    counts = parameter_counts(model)
    assert (counts["parameters/trainable"] == counts["parameters/total"]) == (base is None)


def test_a_frozen_model_is_saved_and_loaded_as_any_other(tmp_path: Path):
    model = lm("GPT-2")
    build.adapter("peft", PeftSettings(name="last_layer"), model, "base", 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(result(again), result(model), rtol=0, atol=0)
