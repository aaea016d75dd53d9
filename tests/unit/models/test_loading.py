from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures_models import (
    CPU,
    bert_tokenizer,
    bos_tokenizer,
    byte_tokenizer,
    distilbert,
    edit_json,
    gpt2_lm,
    tiny_lm,
    tiny_settings,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import (
    build_tiny,
    classifier_from_lm,
    eos_ids,
    fit_embeddings,
    load_backbone_as_classifier,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    max_positions,
    parameter_counts,
    resolve_path,
    save_model,
)
from rlhf_cli.models.settings import ModelSettings
from rlhf_cli.models.tokenizer import PAD_TOKEN

STORIES = Path(__file__).parents[4] / "shared" / "models" / "stories260k-hf"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    save_model(tiny_lm(), byte_tokenizer(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A model folder to be broken."""
    return shutil.copytree(saved, tmp_path / "model")


def logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str = "the film was good"
) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer(text)["input_ids"]])).logits


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def untouched_rng() -> Iterator[None]:
    """Fails the test that leaves torch's global generator in another state."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"


class TestBuild:
    def test_weights_are_a_function_of_the_seed(self, untouched_rng: None) -> None:
        first = build_tiny(tiny_settings(), byte_tokenizer(), 3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(99)
            assert same_weights(first, build_tiny(tiny_settings(), byte_tokenizer(), 3))
        assert not same_weights(first, build_tiny(tiny_settings(), byte_tokenizer(), 4))

    def test_sizes_come_from_the_settings(self) -> None:
        settings = ModelSettings(
            hidden_size=24, num_layers=3, num_heads=2, intermediate_size=40, vocab_size=300, max_positions=50
        )
        model = build_tiny(settings, byte_tokenizer(), 0)
        vocabulary = len(byte_tokenizer())
        block = 4 * 24 * 24 + 3 * 24 * 40 + 2 * 24
        expected = vocabulary * 24 + 3 * block + 24  # tied embeddings count once
        assert parameter_counts(model) == {"parameters/trainable": expected, "parameters/total": expected}
        assert max_positions(model) == 50
        assert eos_ids(model, byte_tokenizer()) == (byte_tokenizer().eos_token_id,)
        assert model.config.pad_token_id == byte_tokenizer().pad_token_id
        assert not model.training and model.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"hidden_size": 0}, "rm.model.hidden_size=0: expected a whole number >= 1"),
            ({"num_layers": -1}, "rm.model.num_layers=-1: expected a whole number >= 1"),
            ({"hidden_size": 18, "num_heads": 4}, "rm.model.hidden_size=18: expected a multiple of"),
            ({"vocab_size": 299}, "rm.model.vocab_size=299: expected at least 300"),
            ({"max_positions": 0}, "rm.model.max_positions=0: expected a whole number >= 1"),
        ],
    )
    def test_impossible_sizes_are_refused(self, change: dict[str, int], complaint: str) -> None:
        with pytest.raises(RequestError) as caught:
            replace(tiny_settings(), **change).check("rm.model")
        assert str(caught.value).startswith(complaint)


class TestRoundTrip:
    @pytest.mark.parametrize("make", [tiny_lm, lambda: gpt2_lm(byte_tokenizer())], ids=["llama", "gpt2"])
    def test_logits_are_equal_to_the_bit(
        self, make: Callable[[], PreTrainedModel], tmp_path: Path, untouched_rng: None
    ) -> None:
        model = make()
        save_model(model, byte_tokenizer(), tmp_path)
        loaded, tokenizer = load_causal_lm("sft.path", str(tmp_path), CPU)
        assert torch.equal(logits(loaded, tokenizer), logits(model, byte_tokenizer()))
        assert same_weights(loaded, model)
        assert not loaded.training and loaded.dtype == torch.float32

    def test_the_length_of_the_file_header_changes_nothing(self, tmp_path: Path) -> None:
        # weights in a mapped file are aligned by chance, and kernels round by alignment
        found = []
        for padding in (0, 8):
            folder = tmp_path / str(padding)
            save_model(gpt2_lm(byte_tokenizer()), byte_tokenizer(), folder)
            weights = folder / "model.safetensors"
            save_file(load_file(weights), weights, metadata={"format": "pt", "note": "x" * padding})
            model, tokenizer = load_causal_lm("sft.path", str(folder), CPU)
            assert all(tensor.data_ptr() % 64 == 0 for tensor in (*model.parameters(), *model.buffers()))
            assert model.lm_head.weight is model.get_input_embeddings().weight  # still tied
            found.append(logits(model, tokenizer))
        assert torch.equal(*found)

    def test_weights_are_stored_as_safetensors_alone(self, saved: Path) -> None:
        assert {file.suffix for file in saved.iterdir()} == {".json", ".safetensors"}

    def test_older_versions_read_the_tokenizer(self, saved: Path) -> None:
        """transformers 4 has no TokenizersBackend, and its fast tokenizers make token types unless told not to."""
        config = json.loads((saved / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert config["model_input_names"] == ["input_ids", "attention_mask"]
        assert AutoTokenizer.from_pretrained(saved).get_vocab() == byte_tokenizer().get_vocab()

    @pytest.mark.parametrize("kind", ["default", "llama3"])
    def test_older_versions_read_the_rotary_positions(self, tmp_path: Path, kind: str) -> None:
        """transformers 4 reads rope_theta and rope_scaling; 5 finds what it wrote, beside them."""
        of_llama3 = {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
        rope = {"rope_type": kind, "rope_theta": 500.0, **(of_llama3 if kind == "llama3" else {})}
        sizes = {"vocab_size": len(byte_tokenizer()), "hidden_size": 16, "intermediate_size": 32}
        config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, rope_parameters=rope)
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        save_model(model, byte_tokenizer(), tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["rope_theta"] == 500.0
        assert written.get("rope_scaling") == ({"rope_type": kind, **of_llama3} if kind == "llama3" else None)
        loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert loaded.config.rope_parameters == model.config.rope_parameters
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)

    def test_half_precision_weights_become_float32(self, tmp_path: Path) -> None:
        save_model(tiny_lm().to(torch.bfloat16), byte_tokenizer(), tmp_path)
        assert next(iter(load_file(tmp_path / "model.safetensors").values())).dtype == torch.bfloat16
        assert load_causal_lm("sft.path", str(tmp_path), CPU)[0].dtype == torch.float32

    def test_classifier(self, tmp_path: Path, untouched_rng: None) -> None:
        model = classifier_from_lm(tiny_lm(), 5)
        save_model(model, byte_tokenizer(), tmp_path)
        loaded, _ = load_classifier("rm.path", str(tmp_path), CPU)
        assert same_weights(loaded, model)
        assert not loaded.training


class TestResolve:
    def test_a_run_folder_stands_for_its_model(self, saved: Path, tmp_path: Path) -> None:
        shutil.copytree(saved, tmp_path / "run" / "model")
        assert resolve_path("sft.path", str(tmp_path / "run")) == str(tmp_path / "run" / "model")
        assert resolve_path("sft.path", str(tmp_path / "run" / "model")) == str(tmp_path / "run" / "model")

    def test_home_folder_is_expanded(self, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(saved.parent))
        assert resolve_path("sft.path", f"~/{saved.name}") == str(saved)

    def test_hub_ids_pass(self) -> None:
        assert resolve_path("model.path", "gpt2") == "gpt2"
        assert resolve_path("model.path", "HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        expected = f"sft.path={tmp_path}: expected a run folder with model/, or a model folder with config.json"
        with pytest.raises(RequestError) as caught:
            resolve_path("sft.path", str(tmp_path))
        assert str(caught.value) == expected

    @pytest.mark.parametrize("path", ["/no/such", "./gone", "../gone", "~/gone", "outputs/gone", "a/b/c"])
    def test_missing_folders(self, path: str) -> None:
        with pytest.raises(RequestError) as caught:
            resolve_path("rm.path", path)
        assert str(caught.value) == f"rm.path={path}: no such folder"

    def test_a_missing_folder_beside_others_is_no_hub_id(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "runs").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(RequestError, match=r"^rm\.path=runs/sft: no such folder$"):
            resolve_path("rm.path", "runs/sft")

    def test_a_file(self, saved: Path) -> None:
        with pytest.raises(RequestError, match="is a file; expected the folder of a run or of a model"):
            resolve_path("rm.path", str(saved / "config.json"))


class TestPad:
    @staticmethod
    def without_own_pad(folder: Path, pad: str | None, bias: bool = False) -> tuple[PreTrainedModel, Path]:
        tokenizer = bos_tokenizer()
        tokenizer.pad_token = pad
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=not bias,
            initializer_range=0.5,
        )
        model = LlamaForCausalLM(config).eval()
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return model, folder

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("pad", [None, "</s>"], ids=["no pad", "pad is EOS"])
    def test_it_gets_a_row_of_its_own(self, tmp_path: Path, pad: str | None, tied: bool) -> None:
        before, folder = self.without_own_pad(tmp_path, pad, bias=not tied)
        size = before.config.vocab_size
        state = torch.get_rng_state()
        model, tokenizer = load_causal_lm("model.path", str(folder), CPU)
        again, _ = load_causal_lm("model.path", str(folder), CPU)
        assert torch.equal(state, torch.get_rng_state())
        assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.eos_token) == (PAD_TOKEN, size, "</s>")
        assert model.config.pad_token_id == model.generation_config.pad_token_id == size
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert table.weight.shape[0] == size + 1
        assert same_weights(model, again)  # or a policy would differ from its reference at step 0
        # the other tokens keep their logits, and the new one stays improbable
        assert torch.equal(logits(model, tokenizer)[..., :size], logits(before, tokenizer))
        assert logits(model, tokenizer).softmax(-1)[..., size].max() <= 1 / size

    def test_low_logits_do_not_make_it_probable(self) -> None:
        # GPT-2's logits lie far below 0: a row drawn around 0 would take nearly all of the mass
        tokenizer = bos_tokenizer()
        model = gpt2_lm(tokenizer)
        model.transformer.ln_f.bias.data.fill_(20.0)
        model.get_input_embeddings().weight.data -= 0.3
        assert logits(model, tokenizer).max() < -30
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        fit_embeddings(model, tokenizer)
        assert logits(model, tokenizer).softmax(-1)[..., -1].max() <= 1 / (len(tokenizer) - 1)

    def test_a_bias_of_the_head_gets_an_entry(self) -> None:
        tokenizer = bos_tokenizer()
        model = gpt2_lm(tokenizer)
        model.config.tie_word_embeddings = False
        model.lm_head = torch.nn.Linear(16, len(tokenizer))
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        fit_embeddings(model, tokenizer)
        torch.testing.assert_close(model.lm_head.bias[-1], model.lm_head.bias[:-1].mean())

    def test_a_larger_table_stays_as_it_is(self) -> None:
        tokenizer = bos_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer) + 10,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = LlamaForCausalLM(config)
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        fit_embeddings(model, tokenizer)
        assert model.get_input_embeddings().weight.shape[0] == config.vocab_size == len(tokenizer) + 9
        assert model.config.pad_token_id == tokenizer.pad_token_id


class TestClassifier:
    def test_from_a_language_model(self, untouched_rng: None) -> None:
        language_model = tiny_lm()
        model, same, other = (classifier_from_lm(language_model, seed) for seed in (1, 1, 2))
        assert same_weights(model, same)
        assert not torch.equal(model.score.weight, other.score.weight)
        assert same_weights(model.base_model, language_model.base_model)
        assert same_weights(other.base_model, language_model.base_model)
        assert (model.score.weight.shape, model.config.num_labels) == ((1, 16), 1)
        model.base_model.embed_tokens.weight.data.zero_()
        assert language_model.get_input_embeddings().weight.any()  # a copy, not a view

    def test_over_a_saved_backbone(self, saved: Path, untouched_rng: None) -> None:
        model, same, other = (
            load_backbone_as_classifier("sft.path", str(saved), CPU, seed)[0] for seed in (1, 1, 2)
        )
        assert same_weights(model, same)
        assert not torch.equal(model.score.weight, other.score.weight)
        assert same_weights(model.base_model, tiny_lm().base_model)
        assert (model.score.weight.shape, model.config.num_labels) == ((1, 16), 1)

    @pytest.mark.parametrize("num_labels", [1, 3])
    def test_the_head_of_a_classifier_does_not_stay(
        self, tmp_path: Path, num_labels: int, untouched_rng: None
    ) -> None:
        source = classifier_from_lm(tiny_lm(), 7)
        if num_labels == 3:
            source.score.weight = torch.nn.Parameter(source.score.weight.detach().expand(3, 16).clone())
            source.config.num_labels = 3
        save_model(source, byte_tokenizer(), tmp_path)
        model, same, other = (
            load_backbone_as_classifier("rm.model.path", str(tmp_path), CPU, seed)[0] for seed in (1, 1, 2)
        )
        assert model.score.weight.shape == (1, 16) and model.config.num_labels == 1
        assert same_weights(model, same)
        assert not torch.equal(model.score.weight, other.score.weight)
        assert not torch.equal(model.score.weight, source.score.weight[:1])
        assert same_weights(model.base_model, tiny_lm().base_model)

    def test_an_encoder(self, tmp_path: Path) -> None:
        tokenizer = bert_tokenizer()
        source = distilbert(tokenizer)
        save_model(source, tokenizer, tmp_path)
        model, _ = load_backbone_as_classifier("rm.model.path", str(tmp_path), CPU, 3)
        assert same_weights(model.base_model, source.base_model)
        assert not torch.equal(model.classifier.weight, source.classifier.weight)

    def test_a_backbone_without_all_weights(self, folder: Path) -> None:
        edit_json(folder / "config.json", num_hidden_layers=3)
        with pytest.raises(RequestError, match=r"no weights of the right shape for model\.layers\.2"):
            load_backbone_as_classifier("rm.model.path", str(folder), CPU, 0)


def test_all_tokens_that_end_a_completion_are_found() -> None:
    model = tiny_lm()
    model.generation_config.eos_token_id = [7, 5]
    model.config.eos_token_id = 9
    assert eos_ids(model, byte_tokenizer()) == (1, 5, 7, 9)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    assert eos_ids(model, byte_tokenizer()) == (1,)


def test_positions_of_every_kind_of_model() -> None:
    assert max_positions(gpt2_lm(byte_tokenizer())) == 128
    assert max_positions(tiny_lm()) == 128
    without = SimpleNamespace(config=SimpleNamespace())
    assert max_positions(without) is None


def test_frozen_parameters_are_counted_apart() -> None:
    model = tiny_lm()
    total = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    embedding.requires_grad_(False)
    counts = parameter_counts(model)
    assert counts == {"parameters/trainable": total - embedding.numel(), "parameters/total": total}


@pytest.mark.skipif(
    not STORIES.is_dir(), reason=f"a trained model from outside the repository is not at {STORIES}"
)
def test_a_trained_model_from_elsewhere(tmp_path: Path) -> None:
    model, tokenizer = load_causal_lm("model.path", str(STORIES), CPU)
    assert eos_ids(model, tokenizer) == (1, 2)
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == model.config.vocab_size == 512
    prompt = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    told = tokenizer.decode(
        model.generate(prompt, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True
    )
    assert told.startswith("Once upon a time, there was a little girl named")
    save_model(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, AutoTokenizer.from_pretrained(tmp_path)), logits(model, tokenizer))
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_a_tokenizer_alone(saved: Path) -> None:
    assert load_tokenizer("sft.path", str(saved)).get_vocab() == byte_tokenizer().get_vocab()
