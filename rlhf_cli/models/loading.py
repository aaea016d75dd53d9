"""Loading and building models: plain Hugging Face folders in and out, safetensors only, no remote code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_cli.errors import RequestError, bad_value
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.packing import enable_layouts
from rlhf_cli.models.positions import max_positions as max_positions  # importable from here too
from rlhf_cli.models.settings import INDEX_FILE, ModelSettings
from rlhf_cli.models.tokenizer import ensure_pad_token
from rlhf_cli.models.vocabulary import never_without_token

# Of torch's own allocations on a CPU, in bytes.
_ALIGNMENT = 64


def resolve_path(key: str, path: str) -> str:
    """The folder or hub id that `path` stands for: a run folder gives its model/.

    Raises:
        RequestError: a folder without a model in it, or a path that does not exist.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        for candidate in (folder / "model", folder):
            if any((candidate / name).is_file() for name in ("config.json", INDEX_FILE)):
                return str(candidate)
        raise bad_value(key, path, "a run folder with model/, or a model folder with config.json")
    if folder.exists():
        raise RequestError(f"{key}={path}: is a file; expected the folder of a run or of a model")
    looks_local = path.startswith(("/", ".", "~", "outputs/")) or path.count("/") > 1
    if looks_local or ("/" in path and folder.parent.is_dir()):
        raise RequestError(f"{key}={path}: no such folder")
    return path


def load_tokenizer(key: str, path: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder or hub id, with a pad token of its own."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises anything, a bare Exception from Rust included
        raise _unusable(key, path, "its tokenizer", error) from error
    ensure_pad_token(tokenizer)
    return tokenizer


def load_causal_lm(key: str, path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 with its tokenizer, in eval mode (dropout off).

    Raises:
        RequestError: the path holds no causal language model, or one without all of its weights.
    """
    tokenizer = load_tokenizer(key, path)
    _require_causal(key, path)
    model, missing = _from_pretrained(AutoModelForCausalLM, key, path)
    _require_weights(key, path, missing)
    fit_embeddings(model, tokenizer)
    never_without_token(model, tokenizer)
    return _ready(model, device), tokenizer


def load_classifier(key: str, path: str, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A trained sequence classifier in float32 with its tokenizer, in eval mode.

    Raises:
        RequestError: the path holds no sequence classifier, or one without all of its weights.
    """
    tokenizer = load_tokenizer(key, path)
    model, missing = _from_pretrained(AutoModelForSequenceClassification, key, path)
    _require_weights(key, path, missing)
    fit_embeddings(model, tokenizer)
    return _ready(model, device), tokenizer


def load_backbone_as_classifier(
    key: str, path: str, device: torch.device, seed: int, num_labels: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The backbone of any model under a new head, which is a pure function of `seed` and of the number of labels.

    Raises:
        RequestError: the path holds no model with a classifier form, or one without all of its backbone's weights.
    """
    tokenizer = load_tokenizer(key, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, missing = _from_pretrained(AutoModelForSequenceClassification, key, path, num_labels=num_labels)
        backbone = f"{model.base_model_prefix}."
        _require_weights(key, path, [name for name in missing if name.startswith(backbone)])
        if any(not name.startswith(backbone) and name not in missing for name, _ in model.named_parameters()):
            _replace_head(model, seed)  # the path is a classifier itself: its head does not stay
        fit_embeddings(model, tokenizer)
    return _ready(model, device), tokenizer


def classifier_from_lm(language_model: PreTrainedModel, seed: int, num_labels: int = 1) -> PreTrainedModel:
    """A classifier over a copy of a language model's backbone; the head a function of `seed` and the labels."""
    values = language_model.config.to_dict()
    for name in ("id2label", "label2id"):  # of two labels, where the config has any
        values.pop(name, None)
    config = type(language_model.config).from_dict({**values, "num_labels": num_labels})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    return _ready(model, language_model.device)


def build_tiny(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A small Llama from its sizes, its weights a pure function of `seed`."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=settings.hidden_size**-0.5,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return _ready(model, torch.device("cpu"))


def _ready(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """On its device, in eval mode, working on packed rows where it can."""
    model.to(device).eval()
    enable_layouts(model)
    return model


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives the model the tokenizer's pad id and a row for every token (a larger table stays as it is).

    New rows are the mean of the old ones, so two loads of a model are equal, and a policy hardly ever samples the new
    token: its logit is the mean of the old logits, hence its probability at most 1/V (Jensen). A random row has a
    logit near 0, which in GPT-2 is far above all others.
    """
    num_old = model.get_input_embeddings().weight.shape[0]
    if num_old < len(tokenizer):
        with torch.random.fork_rng(devices=[]):  # the rows are drawn before they are set
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in () if layer is None else (layer.weight, getattr(layer, "bias", None)):
                if values is not None:
                    values.data[num_old:] = values.data[:num_old].mean(0)
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All ids that end a completion: the generation config's (chat models have several) and the tokenizer's."""
    found: list[int] = []
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config):
        value: Any = getattr(source, "eos_token_id", None)
        if value is not None:
            found.extend(value if isinstance(value, Sequence) else [value])
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(sorted(set(found)))


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a plain Hugging Face folder: safetensors, config, tokenizer, and how the base model was meant to sample.

    The generation config names every id that ends a completion here, so that other programs stop there too.
    """
    generation = model.generation_config if model.can_generate() else None
    if generation is None:
        model.save_pretrained(folder)
    else:
        stops = eos_ids(model, tokenizer)
        known = generation.eos_token_id
        first = list(known) if isinstance(known, Sequence) else [] if known is None else [known]
        stops = (*first, *(i for i in stops if i not in first))
        generation.eos_token_id = stops[0] if len(stops) == 1 else list(stops) or None
        # transformers refuses to save the contradictions that some published configs have (a temperature where
        # sampling is off), once pad is changed. They are the base model's to keep, and no reason to lose a run.
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = generation
        generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    _for_older_versions(folder, tokenizer)


def _for_older_versions(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """What transformers 5 writes in a new way or leaves unsaid, as 4 reads it; 5 reads both.

    The fast tokenizers' name and the tensors that they make; the base of rotary positions, without which 4 would take
    its default and compute something else.
    """
    file = folder / "tokenizer_config.json"
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        named = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": list(tokenizer.model_input_names),
        }
        write_json_atomic(file, {**settings, **named})
    file = folder / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        added = {"rope_theta": rope.pop("rope_theta")}
        if rope.get("rope_type", "default") != "default":
            added["rope_scaling"] = rope
        write_json_atomic(file, {**config, **added})


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Trainable and total parameters of what the model computes with; tied weights count once."""
    parameters = list(model.parameters())
    return {
        "parameters/trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters/total": sum(p.numel() for p in parameters),
    }


def _from_pretrained(auto_class: Any, key: str, path: str, **extra: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its weights that the path does not have (or has in another shape)."""
    try:
        model, info = auto_class.from_pretrained(
            path,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # named below; the error of transformers points to a report in its log
            **extra,
        )
    except Exception as error:  # a broken config or file raises anything: TypeError, KeyError, SafetensorError
        raise _unusable(key, path, "it", error) from error
    _align(model)
    return model, sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})


def _align(model: PreTrainedModel) -> None:
    """Moves weights that lie in the mapped file into memory of torch's own alignment.

    Where they lie in the file depends on the length of its header, and kernels round differently for it: the same
    weights, loaded from two files, would give logits that differ in the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _require_causal(key: str, path: str) -> None:
    """Refuses what is no language model before its weights are read.

    Some encoders (BERT, RoBERTa) have a class for text generation. It loads with a warning, and every token then
    sees the ones that follow it.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise _unusable(key, path, "it", error) from error
    where = f"{key}={path}: is"
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise RequestError(f"{where} a sequence classifier (a reward model); expected a language model")
    expected = "expected a causal language model, such as GPT-2 or Llama"
    if config.is_encoder_decoder:
        raise RequestError(f"{where} an encoder-decoder ({config.model_type}); {expected}")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise RequestError(
            f"{where} an encoder ({config.model_type}), whose tokens see what follows them; {expected} "
            "(it can be the backbone of a reward model: model@rm.model=pretrained rm.model.path=...)"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RequestError(f"{where} of type {config.model_type}; {expected}")


def _require_weights(key: str, path: str, missing: Sequence[str]) -> None:
    """transformers fills in random weights and warns; a result would look like a model and be none."""
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RequestError(
            f"{key}={path}: cannot be loaded (no weights of the right shape for {missing[0]}{more})"
        )


def _replace_head(model: PreTrainedModel, seed: int) -> None:
    """Puts a head in place that is a function of the config and `seed`."""
    torch.manual_seed(seed)
    fresh = dict(type(model)(model.config).named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            parameter.data.copy_(fresh[name].data)


def _unusable(key: str, path: str, what: str, error: Exception) -> RequestError:
    reason = " ".join(str(error).split())
    return RequestError(f"{key}={path}: {what} cannot be loaded ({type(error).__name__}: {reason[:300]})")
