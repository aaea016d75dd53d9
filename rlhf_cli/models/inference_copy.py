"""A model to sample from, with the weights of one that is trained: matrices in autocast's type, an adapter merged in.

Under autocast every matrix product casts its weights anew; decoding, which reads all weights for a handful of tokens,
would spend its time on that. The copy holds what autocast would make of them, so its numbers are those of autocast over
the float32 weights, to the bit. What autocast leaves as it is (embeddings, norms) is not copied but shared.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_cli.models.low_precision import CAST_BY_AUTOCAST


class InferenceCopy:
    """A twin of a model for decoding. Its tensors stay where they are, however often it is refreshed."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None) -> None:
        """Where an argument does not say it.

        Args:
            model: in eval mode; may have a LoRA adapter in it, which is merged in the twin.
            dtype: of linear layers, autocast's; None = that of the model.
        """
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self._merged: list[tuple[Any, Tensor]] = []  # a layer with an adapter, and what both come to in the twin
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        adapted = {id(plain): layer for plain, layer in self._take_adapters_out(model)}
        for module in list(self.model.modules()):
            lower = dtype if isinstance(module, CAST_BY_AUTOCAST) else None
            for name, parameter in list(module.named_parameters(recurse=False)):
                is_merged = id(module) in adapted and name == "weight"
                if not is_merged and lower is None:
                    continue  # shared
                own = torch.empty_like(parameter, dtype=lower or parameter.dtype, requires_grad=False)
                setattr(module, name, nn.Parameter(own, requires_grad=False))
                if is_merged:
                    self._merged.append((adapted[id(module)], own))
                else:
                    self._targets.append(own)
                    self._sources.append(parameter.detach())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the model's present weights, in place."""
        if self._targets:
            torch._foreach_copy_(self._targets, self._sources)
        for layer, target in self._merged:
            with torch.autocast(target.device.type, enabled=False):
                target.copy_(layer.get_base_layer().weight + layer.get_delta_weight("default"))

    def _take_adapters_out(self, model: PreTrainedModel) -> list[tuple[nn.Module, Any]]:
        """Puts plain layers in the place of those with an adapter; returns each with the model's own adapted layer."""
        found: list[tuple[nn.Module, Any]] = []
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                owner, _, leaf = name.rpartition(".")
                twin: Any = self.model.get_submodule(name)
                plain = twin.get_base_layer()
                setattr(self.model.get_submodule(owner), leaf, plain)
                found.append((plain, layer))
        return found


def is_adapted(model: nn.Module) -> bool:
    """Whether a LoRA adapter is in the model."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())
