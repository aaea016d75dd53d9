from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fixtures_architectures import ALL, DECODERS
from fixtures_models import CPU, bert_tokenizer, distilbert, gpt2_lm, tiny_lm
from fixtures_models import byte_tokenizer as tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import RequestError
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.adapters import ADAPTER_FOLDER, save_trained
from rlhf_cli.models.bottleneck import Bottleneck, add_bottleneck, load_bottleneck
from rlhf_cli.models.causal import LanguageModel, sequence_logits, token_logprobs
from rlhf_cli.models.loading import (
    classifier_from_lm,
    load_backbone_as_classifier,
    load_causal_lm,
    load_classifier,
    parameter_counts,
)
from rlhf_cli.models.recompute import enable_recomputation, recomputing
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.models.vocabulary import tokens_only
from rlhf_cli.rewards.format import RewardFormat
from rlhf_cli.rewards.model import RewardModel
from rlhf_cli.rewards.scoring import score_sequences

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
WIDTH = 3
SETTINGS = {kind: PeftSettings(name="adapter", variant=kind, bottleneck=WIDTH) for kind in ("residual", "replace")}
SUPPORTED = ["GPT-2", "Llama", "GPT-NeoX", "Qwen2", "Mistral", "Gemma"]

each = pytest.mark.parametrize("name", SUPPORTED)
either = pytest.mark.parametrize("variant", SETTINGS)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def base(name: str, tmp_path: Path) -> Path:
    return DECODERS[name].write_lm(tmp_path / "base")


def loaded(base: Path) -> PreTrainedModel:
    return load_causal_lm("sft.path", str(base), CPU)[0]


def adapted(base: Path, variant: str = "residual") -> tuple[PreTrainedModel, Bottleneck]:
    model = loaded(base)
    return model, add_bottleneck("peft", model, SETTINGS[variant], str(base), seed=0)


@torch.no_grad()
def logits(model: LanguageModel) -> torch.Tensor:
    return sequence_logits(model, collate(ROWS, 0))


def log_likelihood(model: PreTrainedModel) -> torch.Tensor:
    return token_logprobs(model, collate(ROWS, 0)).sequence_logprob().mean()


def margin(model: PreTrainedModel) -> torch.Tensor:
    scores = score_sequences(model, collate(ROWS, 0))
    return scores[0] - scores[1]


def train(model: PreTrainedModel, objective: Callable[[PreTrainedModel], torch.Tensor] = log_likelihood) -> None:
    """A few steps of whatever is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(4):
        (-objective(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def owned(adapter: Bottleneck) -> set[int]:
    return {id(tensor) for tensor in adapter.tensors().values()}


@each
def test_the_first_step_starts_from_the_model_to_the_bit(base: Path):
    model, _ = adapted(base)
    assert torch.equal(logits(model), logits(loaded(base)))


@each
@either
def test_the_adapter_alone_learns(base: Path, variant: str):
    model, adapter = adapted(base, variant)
    log_likelihood(model).backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == owned(adapter)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == owned(adapter), "the inner layers too"


@each
@either
def test_what_is_saved_is_a_plain_model(base: Path, variant: str, tmp_path: Path):
    model, adapter = adapted(base, variant)
    start = logits(model)
    train(model)
    expected = logits(model)
    assert (expected - start).abs().max() > 0.1
    before = {name: p.clone() for name, p in model.named_parameters()}
    save_trained(model, load_causal_lm("sft.path", str(base), CPU)[1], tmp_path / "model", adapter)
    assert torch.equal(logits(model), expected), "it goes on as it was"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    plain, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    torch.testing.assert_close(tokens_only(model, logits(plain)), expected, **CLOSE)
    assert {n for n, _ in plain.named_parameters()} == {n for n, _ in loaded(base).named_parameters()}
    output_biases = sum(
        p.numel() for n, p in adapter.tensors().items() if n.endswith(("c_proj.bias", "4h_to_h.bias"))
    )
    added_to_another = output_biases if variant == "residual" else 0
    assert parameter_counts(model)["parameters/total"] == plain.num_parameters() + added_to_another
    assert not list((tmp_path / "model").rglob("*.bin")), "nothing pickled"


@each
@either
def test_the_reference_stays_the_model_as_it_was(base: Path, variant: str):
    before = logits(loaded(base))
    model, adapter = adapted(base, variant)
    reference = adapter.off()
    assert torch.equal(logits(reference), before)
    train(model)
    trained = logits(model)
    assert torch.equal(logits(reference), before)
    assert torch.equal(logits(model), trained), "it is on again"
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        reference()
    assert torch.equal(logits(model), trained), "and after an error"


@each
def test_replacing_starts_elsewhere(base: Path):
    model, adapter = adapted(base, "replace")
    assert not torch.allclose(logits(model), logits(loaded(base)), atol=1e-2)
    inner = [p for p in adapter.tensors().values() if p.dim() == 2]
    assert all(0.1 < float(p.detach().std()) < 0.3 for p in inner), "of the config's initializer_range, 0.2"
    assert not any(p.any() for p in adapter.tensors().values() if p.dim() == 1)


@each
@either
def test_the_adapter_alone_loads_onto_its_base_to_the_bit(base: Path, variant: str, tmp_path: Path):
    model, adapter = adapted(base, variant)
    train(model)
    adapter.save(tmp_path / ADAPTER_FOLDER)
    again = loaded(base)
    copy = load_bottleneck(again, tmp_path / ADAPTER_FOLDER)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(copy.off()), logits(adapter.off()))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    copy.save(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / ADAPTER_FOLDER / file.name).read_bytes()


def test_a_folder_of_another_model_or_of_no_adapter_is_refused(tmp_path: Path):
    gpt2 = gpt2_lm(tokenizer(), 3)
    add_bottleneck("peft", gpt2, SETTINGS["residual"], "its-base", 0).save(tmp_path / "adapter")
    model = tiny_lm(3)
    with pytest.raises(RequestError, match=r"adapter: an adapter of another model \(its-base\)"):
        load_bottleneck(model, tmp_path / "adapter")
    assert torch.equal(logits(model), logits(tiny_lm(3))), "left as it was"
    with pytest.raises(RequestError, match=r"^\S+: no bottleneck adapter \(FileNotFoundError"):
        load_bottleneck(model, tmp_path)
    write_json_atomic(tmp_path / "adapter" / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(RequestError, match=r"^\S+adapter: no bottleneck adapter \("):
        load_bottleneck(model, tmp_path / "adapter")


@either
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "GPT-NeoX"])
def test_recomputing_gives_the_same_gradients(base: Path, variant: str):
    def gradients(is_recomputed: bool) -> list[torch.Tensor]:
        model, adapter = adapted(base, variant)
        if is_recomputed:
            enable_recomputation("gradient_checkpointing", model)
        with recomputing(model):
            log_likelihood(model).backward()
        found = [tensor.grad for tensor in adapter.tensors().values()]
        assert any(bool(grad.any()) for grad in found if grad is not None)
        return [grad for grad in found if grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@either
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "GPT-NeoX"])
def test_a_reward_model_is_trained_with_its_head(base: Path, variant: str, tmp_path: Path):
    model, text = load_backbone_as_classifier("sft.path", str(base), CPU, 4)
    adapter = add_bottleneck("rm.peft", model, SETTINGS[variant], str(base), 0)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == owned(adapter) | {id(model.score.weight)}
    train(model, margin)
    RewardModel(model, text, RewardFormat(20, 16)).save(tmp_path / "model", adapter)
    again, _ = load_classifier("rm.path", str(tmp_path / "model"), CPU)
    rows = collate(ROWS, 0)
    torch.testing.assert_close(score_sequences(again, rows), score_sequences(model, rows), **CLOSE)
    assert again.config.num_labels == 1


def test_the_reference_has_no_dropout_where_the_policy_has():
    """The MLPs that were taken out are no longer reached by the model's train() and eval()."""
    model = gpt2_lm(tokenizer(), 3).train()
    adapter = add_bottleneck("peft", model, SETTINGS["replace"], "base", 0)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))
    assert torch.equal(logits(adapter.off()), logits(gpt2_lm(tokenizer(), 3)))


def test_the_adapter_is_a_function_of_its_seed():
    def weights(seed: int) -> list[torch.Tensor]:
        adapter = add_bottleneck("peft", tiny_lm(3), SETTINGS["residual"], "base", seed)
        adapter.merged()
        return [p.detach() for name, p in adapter.tensors().items() if "down_proj" not in name]

    state = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


@either
def test_parameters_are_counted_once(variant: str):
    model = tiny_lm(3)
    total = parameter_counts(model)["parameters/total"]
    mlps = 2 * 3 * 16 * 32
    add_bottleneck("peft", model, SETTINGS[variant], "base", 0)
    added = 2 * 3 * 16 * WIDTH
    expected = total + added - (mlps if variant == "replace" else 0)
    assert parameter_counts(model) == {"parameters/trainable": added, "parameters/total": expected}


def test_what_has_no_mlp_of_a_known_form_is_refused(tmp_path: Path):
    opt = loaded(DECODERS["OPT"].write_lm(tmp_path / "opt"))
    needed = "an adapter needs blocks as those of GPT-2, GPT-NeoX, Llama, Qwen2, Mistral or Gemma"
    for key, model, kind in (
        ("peft", opt, "opt"),
        ("rm.peft", distilbert(bert_tokenizer(), 3), "distilbert"),
        ("rm.peft", classifier_from_lm(opt, 4), "opt"),
    ):
        before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        with pytest.raises(RequestError) as refused:
            add_bottleneck(key, model, SETTINGS["residual"], "base", 0)
        expected = (
            f"{key}.name=adapter: expected none, lora or last_layer for a model of type {kind}, because {needed}"
        )
        assert str(refused.value) == expected
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
    assert {*ALL} - {*SUPPORTED} == {"OPT", "DistilBERT", "BERT", "RoBERTa"}, (
        "what is new is in one list or the other"
    )


def test_a_model_whose_blocks_differ_in_width_is_refused():
    """No key of the config could say what is saved."""
    model = tiny_lm(3)
    narrow = type(model.model.layers[0].mlp)(
        type(model.config)(**{**model.config.to_dict(), "intermediate_size": 8})
    )
    model.model.layers[1].mlp = narrow
    with pytest.raises(RequestError, match=r"^peft\.name=adapter: expected none, lora or last_layer"):
        add_bottleneck("peft", model, SETTINGS["residual"], "base", 0)
