from pathlib import Path

import pytest
import torch
from fixtures_models import CPU, bert_tokenizer, bos_tokenizer, byte_tokenizer, distilbert, gpt2_lm, tiny_lm
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import RequestError
from rlhf_cli.models.adapters import ADAPTER_FOLDER, WithoutAdapter, save_trained
from rlhf_cli.models.causal import sequence_logits
from rlhf_cli.models.loading import classifier_from_lm, load_causal_lm, parameter_counts, save_model
from rlhf_cli.models.lora import Lora, add_lora, plain_weights
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.rewards.scoring import score_sequences

ROWS = [([5, 6, 7], [8, 9]), ([10], [11, 12, 13])]
LORA = PeftSettings(name="lora", r=2, alpha=8.0)

LANGUAGE_MODELS = {"llama": lambda: tiny_lm(3), "gpt2": lambda: gpt2_lm(byte_tokenizer(), 3)}


def moved(adapter: Lora, seed: int = 1) -> Lora:
    """As after training: an adapter that changes something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.handle.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapter


@torch.no_grad()
def logits(model: PreTrainedModel | WithoutAdapter) -> torch.Tensor:
    return sequence_logits(model, collate(ROWS, 0))


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_first_step_starts_from_the_model_to_the_bit(kind: str):
    model = LANGUAGE_MODELS[kind]()
    before = logits(model)
    add_lora("peft", model, LORA, "base", seed=0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_the_reference_is_the_model_with_its_adapter_off(kind: str):
    model = LANGUAGE_MODELS[kind]()
    before = logits(model)
    adapter = moved(add_lora("peft", model, LORA, "base", seed=0))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(adapter.off()), before)
    assert not torch.allclose(logits(model), before, atol=1e-3), "it is on again"
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_merging_gives_plain_weights_and_leaves_the_original(kind: str):
    model = LANGUAGE_MODELS[kind]()
    names = {name for name, _ in model.named_parameters()}
    adapter = moved(add_lora("peft", model, LORA, "base", seed=0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    whole = adapter.merged()
    assert {name for name, _ in whole.named_parameters()} == names
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_what_is_saved_loads_with_transformers_and_with_peft(kind: str, tmp_path: Path):
    save_model(LANGUAGE_MODELS[kind](), byte_tokenizer(), tmp_path / "base")
    model, tokenizer = load_causal_lm("sft.path", str(tmp_path / "base"), CPU)
    adapter = moved(add_lora("peft", model, LORA, str(tmp_path / "base"), seed=0))
    save_trained(model, tokenizer, tmp_path / "model", adapter)
    expected = logits(model)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=1e-5)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model" / ADAPTER_FOLDER, dtype=torch.float32)
    torch.testing.assert_close(logits(adapted), expected, atol=1e-5, rtol=1e-5)
    assert not list((tmp_path / "model").rglob("*.bin")), "nothing pickled"


def test_a_model_without_an_adapter_is_saved_as_it_is(tmp_path: Path):
    model = tiny_lm(3)
    save_trained(model, byte_tokenizer(), tmp_path, None)
    assert not (tmp_path / ADAPTER_FOLDER).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_a_classifiers_head_is_trained_with_the_adapter(kind: str):
    model = classifier_from_lm(tiny_lm(3), 4) if kind == "llama" else distilbert(bert_tokenizer(), 3)
    total = parameter_counts(model)["parameters/total"]
    adapter = moved(add_lora("rm.peft", model, LORA, "base", seed=0))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {"score"} if kind == "llama" else {"pre_classifier", "classifier"}
    assert {name.split(".")[0] for name in trainable if "lora_" not in name} == heads
    assert all("lora_" not in name for name in trainable if name.split(".")[0] in heads)
    assert any("lora_" in name for name in trainable)
    assert parameter_counts(model)["parameters/trainable"] < total
    rows = collate(ROWS, 0)
    torch.testing.assert_close(
        score_sequences(adapter.merged(), rows), score_sequences(model, rows), atol=1e-5, rtol=1e-5
    )


def test_the_adapter_is_a_function_of_its_seed():
    def weights(seed: int) -> list[torch.Tensor]:
        model = tiny_lm(3)
        add_lora("peft", model, LORA, "base", seed)
        return [p.detach() for name, p in model.named_parameters() if "lora_A" in name]

    state = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(weights(0), weights(0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(0), weights(1), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_layers_can_be_named():
    model = tiny_lm(3)
    add_lora("peft", model, PeftSettings(name="lora", r=3, target_modules=["q_proj"]), "base", 0)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted and all(".q_proj." in name for name in adapted)
    with pytest.raises(
        RequestError, match=r"^peft\.target_modules=\['c_attn'\]: expected names of layers of base"
    ):
        add_lora("peft", tiny_lm(3), PeftSettings(name="lora", target_modules=["c_attn"]), "base", 0)


def test_a_tokenizer_with_a_new_pad_token_and_an_adapter(tmp_path: Path):
    """The base as it was saved has fewer rows than the model that trained; the adapter does not need them."""
    tokenizer = bos_tokenizer()
    model = gpt2_lm(tokenizer, 3)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    loaded, with_pad = load_causal_lm("sft.path", str(tmp_path / "base"), CPU)
    adapter = moved(add_lora("peft", loaded, LORA, str(tmp_path / "base"), 0))
    save_trained(loaded, with_pad, tmp_path / "model", adapter)
    again, _ = load_causal_lm("sft.path", str(tmp_path / "model"), CPU)
    torch.testing.assert_close(logits(again), logits(loaded), atol=1e-5, rtol=1e-5)
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model" / ADAPTER_FOLDER, dtype=torch.float32)
    old = model.get_input_embeddings().weight.shape[0]
    torch.testing.assert_close(logits(adapted)[..., :old], logits(loaded)[..., :old], atol=1e-5, rtol=1e-5)


def test_an_adapter_on_a_matrix_that_is_the_output_too_is_refused():
    """Merged, it would change the output as well, which it did not while it was trained."""
    settings = PeftSettings(name="lora", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(RequestError, match=r"expected no model\.embed_tokens, which is tied to the output"):
        add_lora("peft", tiny_lm(3), settings, "base", 0)


def test_merging_needs_no_second_model_on_the_device(monkeypatch: pytest.MonkeyPatch):
    adapter = moved(add_lora("peft", tiny_lm(3), LORA, "base", seed=0))
    copied: list[torch.device] = []
    original = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        copied.append(torch.device(str(arguments[0])))
        return original(tensor, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("copied where it is"))
    whole = adapter.merged()
    assert len(copied) >= len(list(adapter.handle.parameters())) and set(copied) == {CPU}
    assert whole is not adapter.handle.get_base_model()


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_plain_weights_are_those_of_the_merged_model(kind: str):
    model = LANGUAGE_MODELS[kind]()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = moved(add_lora("peft", model, LORA, "base", seed=0))
    found, expected = plain_weights(model, adapter), dict(adapter.merged().named_parameters())
    assert found.keys() == expected.keys() == before.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=0)
    # the update of a matrix is B A, of the rank of the adapter; the rest stays
    changed = {name for name, weight in found.items() if not torch.equal(weight, before[name])}
    assert changed and all(name.endswith(".weight") for name in changed)
    for name in changed:
        update = found[name] - before[name]
        assert int(torch.linalg.matrix_rank(update, tol=1e-4)) == LORA.r and update.abs().max() > 0.1


def test_plain_weights_without_an_adapter_are_the_parameters_themselves():
    model = tiny_lm(3)
    found, own = plain_weights(model, None), dict(model.named_parameters())
    assert found.keys() == own.keys() and all(found[name] is own[name] for name in own)
