"""Bottleneck adapters on a block's MLP, for every stage.

    residual   MLP(x) + B(x)    B beside the MLP, its output layer zero: the first step starts from the model as it was
    replace    B(x)             B in the place of the MLP: the first step starts from another model

B has the form of the block's own MLP (activation, gate, biases) at an inner width of `peft.bottleneck`. Houlsby et al.
2019 (arXiv 1902.00751); beside the MLP rather than after it: He et al. 2021 (arXiv 2110.04366), "parallel adapter".
Departure: no scale and no plain ReLU, so that MLP + B is itself an MLP, with the inner columns of both. What a stage
saves is that wider (or, of `replace`, narrower) model, which transformers loads without any code from here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_cli.errors import RequestError, bad_value
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.adapters import WithoutAdapter, copy_on_cpu, portable
from rlhf_cli.models.settings import PeftSettings

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class _Form:
    """An MLP's layers by name, and the config's key of its inner width."""

    inner: tuple[str, ...]  # from the hidden size to the inner width; two where one is the gate of the other
    output: str
    width_key: str


_FORMS = (
    _Form(("c_fc",), "c_proj", "n_inner"),  # GPT-2
    _Form(("gate_proj", "up_proj"), "down_proj", "intermediate_size"),  # Llama, Qwen2, Mistral, Gemma
    _Form(("dense_h_to_4h",), "dense_4h_to_h", "intermediate_size"),  # GPT-NeoX
)
_NEEDED = "an adapter needs blocks as those of GPT-2, GPT-NeoX, Llama, Qwen2, Mistral or Gemma"


class Beside(nn.Module):
    """MLP(x) + B(x)."""

    def __init__(self, mlp: nn.Module, bottleneck: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.bottleneck = bottleneck

    def forward(self, hidden: Tensor) -> Tensor:
        """The sum of both; each has the dropout that the architecture's MLP has."""
        total: Tensor = self.mlp(hidden) + self.bottleneck(hidden)
        return total


@dataclass(frozen=True)
class _Place:
    """One block's MLP."""

    name: str  # in the model
    original: nn.Module
    bottleneck: nn.Module
    adapted: nn.Module  # what the model has there now


class Bottleneck:
    """The adapters of a model, one a block; see `Adapter`."""

    def __init__(
        self, model: PreTrainedModel, form: _Form, places: Sequence[_Place], settings: PeftSettings, base: str
    ) -> None:
        self._model = model
        self._form = form
        self._places = places
        self._settings = settings
        self._base = base

    def merged(self) -> PreTrainedModel:
        """A plain model on the CPU: `residual` with both inner widths in one MLP, `replace` with the adapter as MLP."""
        whole = copy_on_cpu(self._model)
        place = self._places[0]
        parts = [place.bottleneck] if self._replaces else [place.original, place.bottleneck]
        width = sum(_width(part, self._form) for part in parts)
        if not self._replaces:
            wide = _plain(whole, self._form, width)
            for place in self._places:
                both: Beside = whole.get_submodule(place.name)  # type: ignore[assignment]
                mlp = wide.get_submodule(place.name)
                mlp.load_state_dict(_joined(both.mlp, both.bottleneck, self._form), assign=True)
                whole.set_submodule(place.name, mlp.train(both.training))
        setattr(whole.config, self._form.width_key, width)  # the config of all its parts
        return whole

    def off(self) -> WithoutAdapter:
        """The model with its own MLPs, and without gradient."""
        return WithoutAdapter(self._model, self._original_mlps)

    def save(self, folder: Path) -> None:
        """Writes the adapter alone: its weights under the names of the MLPs', and what `load_bottleneck` needs."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
        config = {**self._settings.used(), "base_model_name_or_path": portable(self._base)}
        write_json_atomic(folder / _CONFIG, config)

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's weights by name."""
        return {
            f"{place.name}.{name}": tensor
            for place in self._places
            for name, tensor in place.bottleneck.named_parameters()
        }

    @property
    def _replaces(self) -> bool:
        return self._settings.variant == "replace"

    @contextmanager
    def _original_mlps(self) -> Iterator[None]:
        try:
            for place in self._places:
                self._model.set_submodule(place.name, place.original)
            yield
        finally:
            for place in self._places:
                self._model.set_submodule(place.name, place.adapted)


def add_bottleneck(key: str, model: PreTrainedModel, settings: PeftSettings, base: str, seed: int) -> Bottleneck:
    """Puts an adapter on every block of `model`, in place, and freezes the rest; a classifier's head stays trainable.

    The MLPs that `replace` takes out stay in memory, as the reference of a policy needs them; they are no longer
    among the model's parameters.

    Args:
        key: of the settings, for errors.
        model: causal language model or sequence classifier.
        settings: variant and inner width.
        base: folder or hub id that `model` was loaded from, kept in the adapter's config.
        seed: the adapter's weights are a function of it.

    Returns:
        The adapter; `model` itself goes on being what is called and trained.

    Raises:
        RequestError: the model's blocks have no MLP of a known form.
    """
    found = _mlps(model)
    if found is None:
        kind = model.config.model_type
        raise bad_value(
            f"{key}.name", settings.name, f"none, lora or last_layer for a model of type {kind}, because {_NEEDED}"
        )
    form, names = found
    narrow = _plain(model, form, settings.bottleneck)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    places = []
    for name in names:
        original, bottleneck = model.get_submodule(name), narrow.get_submodule(name)
        weight = next(original.parameters())
        _initialise(bottleneck, form, settings, model.config.initializer_range, generator)
        bottleneck.to(weight.device, weight.dtype).train(original.training)
        adapted = bottleneck
        if settings.variant == "residual":
            adapted = Beside(original, bottleneck).train(original.training)
        else:
            original.eval()  # it is no longer reached by the model's train()
        model.set_submodule(name, adapted)
        places.append(_Place(name, original, bottleneck, adapted))
    if model.get_output_embeddings() is None:
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{model.base_model_prefix}."):
                parameter.requires_grad_(True)
    return Bottleneck(model, form, places, settings, base)


def load_bottleneck(model: PreTrainedModel, folder: Path) -> Bottleneck:
    """Puts a saved adapter onto the model that it was trained on, in place: together they are what was saved, bitwise.

    Args:
        model: loaded from the base that adapter_config.json names.
        folder: what `Bottleneck.save` wrote, model/adapter of a run.

    Raises:
        RequestError: the folder holds no such adapter, or one of another model.
    """
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        base = config.pop("base_model_name_or_path")
        settings = PeftSettings(**config)
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RequestError(f"{folder}: no bottleneck adapter ({type(error).__name__}: {error})") from error
    if settings.name != "adapter":
        raise RequestError(f"{folder}: no bottleneck adapter (its name is {settings.name})")
    settings.check(f"{folder}: peft")
    found = _mlps(model)
    expected = {} if found is None else _shapes(model, *found, settings.bottleneck)
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise RequestError(f"{folder}: an adapter of another model ({base}), it does not fit this one")
    adapter = add_bottleneck("peft", model, settings, base, seed=0)
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            tensor.copy_(tensors[name])
    return adapter


def _mlps(model: PreTrainedModel) -> tuple[_Form, list[str]] | None:
    """The form of the model's MLPs and their names, one a block; None where they are of no known form."""
    for form in _FORMS:
        layers = {*form.inner, form.output}
        names = [name for name, module in model.named_modules() if _layers(module) == layers]
        if names and len(names) == model.config.num_hidden_layers and hasattr(model.config, form.width_key):
            # Not every model builds its MLPs from this key, nor all of them alike
            widths = {_width(model.get_submodule(name), form) for name in names}
            width = widths.pop()
            wider = _plain(model, form, width + 1)
            if not widths and all(_width(wider.get_submodule(name), form) == width + 1 for name in names):
                return form, names
    return None


def _layers(module: nn.Module) -> set[str]:
    """Names of what inside a module has parameters."""
    return {name.rpartition(".")[0] for name, _ in module.named_parameters()}


def _width(mlp: nn.Module, form: _Form) -> int:
    layer = mlp.get_submodule(form.output)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[_inner_axis(layer, is_output=True)]


def _inner_axis(layer: nn.Module, is_output: bool) -> int:
    """Of a layer's weight: [out, in] in a linear layer, [in, out] in GPT-2's."""
    return int(is_output != isinstance(layer, Conv1D))


def _plain(model: PreTrainedModel, form: _Form, width: int) -> PreTrainedModel:
    """The architecture with MLPs of another width, as transformers builds it, without memory for its weights."""
    config = copy.deepcopy(model.config)
    setattr(config, form.width_key, width)
    with torch.device("meta"):
        return type(model)(config)


def _shapes(model: PreTrainedModel, form: _Form, names: Sequence[str], width: int) -> dict[str, torch.Size]:
    """Of an adapter's weights, by name."""
    narrow = _plain(model, form, width)
    return {
        f"{name}.{inside}": tensor.shape
        for name in names
        for inside, tensor in narrow.get_submodule(name).named_parameters()
    }


def _initialise(
    mlp: nn.Module, form: _Form, settings: PeftSettings, std: float, generator: torch.Generator
) -> None:
    """Normal weights and no biases; beside another MLP, an output layer of zeros."""
    is_silent = settings.variant == "residual"
    mlp.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            if parameter.dim() == 1 or (is_silent and name.startswith(f"{form.output}.")):
                parameter.zero_()
            else:
                parameter.normal_(0.0, std, generator=generator)
            parameter.requires_grad_(True)


def _joined(mlp: nn.Module, bottleneck: nn.Module, form: _Form) -> Mapping[str, Tensor]:
    """Weights of the MLP that computes the sum of two: inner columns side by side, output biases added."""
    joined: dict[str, Tensor] = {}
    other = dict(bottleneck.named_parameters())
    for name, parameter in mlp.named_parameters():
        layer, _, kind = name.rpartition(".")
        pair = (parameter.detach(), other[name].detach())
        if kind == "weight":
            axis = _inner_axis(mlp.get_submodule(layer), is_output=layer == form.output)
            joined[name] = torch.cat(pair, axis)
        else:
            joined[name] = pair[0] + pair[1] if layer == form.output else torch.cat(pair)
    return joined
