"""What every kind of adapter can do, so that training and saving know no kind by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.loading import save_model

# Inside a saved model's folder: the adapter alone, which is loaded on top of the base.
ADAPTER_FOLDER = "adapter"

_Module = TypeVar("_Module", bound=nn.Module)


class Adapter(Protocol):
    """A few trainable weights inside a frozen model, which itself goes on being what is called and trained."""

    def merged(self) -> PreTrainedModel:
        """A plain model that computes the same, on the CPU; the original stays as it is."""
        ...

    def off(self) -> LanguageModel:
        """The model without its adapter, and without gradient: the reference of a policy."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the adapter alone."""
        ...


class WithoutAdapter:
    """The model with its adapter off: the reference of a policy, without a second copy of the weights."""

    def __init__(self, model: nn.Module, switched_off: Callable[[], AbstractContextManager[Any]]) -> None:
        self._model = model
        self._switched_off = switched_off

    def __call__(self, **inputs: Any) -> Any:
        """A forward pass without gradient."""
        with torch.no_grad(), self._switched_off():
            return self._model(**inputs)

    @contextmanager
    def inside(self) -> Iterator[nn.Module]:
        """The model itself, with its adapter off and without gradient as long as the context lasts."""
        with torch.no_grad(), self._switched_off():
            yield self._model


def save_trained(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, adapter: Adapter | None
) -> None:
    """Writes a plain Hugging Face folder; an adapter is merged into it, and lies in adapter/ by itself."""
    save_model(model if adapter is None else adapter.merged(), tokenizer, folder)
    if adapter is not None:
        adapter.save(folder / ADAPTER_FOLDER)


def copy_on_cpu(module: _Module) -> _Module:
    """A copy on the CPU: a model that fits its device thanks to the adapter may not fit there twice."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        twin = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(module, memo)


def portable(base: str) -> str:
    """A folder by its full name: the adapter is loaded from other working folders, too."""
    return str(Path(base).absolute()) if Path(base).is_dir() else base
