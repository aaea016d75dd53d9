"""Low-rank adapters through PEFT, for every stage.

    W x + (alpha / r) B A x,   A random, B zero: the first step starts from the model as it was

Hu et al. 2021 (arXiv 2106.09685), eq. 3. What a stage saves is merged into plain weights, so that the next stage (and
anything else) loads it without PEFT and adds an adapter of its own; the adapter alone lies beside it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.errors import bad_value
from rlhf_cli.models.adapters import WithoutAdapter, copy_on_cpu, portable
from rlhf_cli.models.settings import PeftSettings


class Lora:
    """The adapter of a model; see `Adapter`."""

    def __init__(self, handle: PeftModel) -> None:
        self.handle = handle  # PEFT's own

    def merged(self) -> PreTrainedModel:
        """A copy of the model, on the CPU, with the adapter added into its weights; the original stays as it is."""
        # Not merged in place and taken out again: W + BA - BA is not W to the bit.
        whole: PreTrainedModel = copy_on_cpu(self.handle).merge_and_unload()
        return whole

    def off(self) -> WithoutAdapter:
        """The model without its adapter, and without gradient."""
        return WithoutAdapter(self.handle.get_base_model(), self.handle.disable_adapter)

    def save(self, folder: Path) -> None:
        """Writes the adapter alone, as PEFT loads it."""
        self.handle.save_pretrained(str(folder), save_embedding_layers=False)


def add_lora(key: str, model: PreTrainedModel, settings: PeftSettings, base: str, seed: int) -> Lora:
    """Puts an adapter into `model`, in place, and freezes the rest; a classifier's head stays trainable.

    Args:
        key: of the settings, for errors.
        model: causal language model or sequence classifier.
        settings: rank, scale, dropout, which layers.
        base: folder or hub id that `model` was loaded from, kept in the adapter's config.
        seed: the adapter's weights are a function of it.

    Returns:
        The adapter; `model` itself goes on being what is called and trained.

    Raises:
        RequestError: the model has no layer of a name in `target_modules`.
    """
    backbone = f"{model.base_model_prefix}."
    is_language_model = model.get_output_embeddings() is not None
    head = [name for name, _ in model.named_modules() if name and not f"{name}.".startswith(backbone)]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=head or None,
        task_type=TaskType.CAUSAL_LM if is_language_model else None,
        fan_in_fan_out=_is_transposed(model),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of older names of transformers
                handle: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise bad_value(
                f"{key}.target_modules", settings.target_modules, f"names of layers of {base} ({error})"
            ) from error
    _refuse_tied(key, model, settings)
    for name, parameter in model.named_parameters():
        if not is_language_model and not name.startswith(backbone):
            parameter.requires_grad_(True)
    handle.peft_config["default"].base_model_name_or_path = portable(base)
    return Lora(handle)


def _refuse_tied(key: str, model: PreTrainedModel, settings: PeftSettings) -> None:
    """Raises RequestError where an adapter sits on the output's matrix as well: merged, it would be in both."""
    output = model.get_output_embeddings()
    for name, module in model.named_modules():
        if output is not None and isinstance(module, BaseTunerLayer) and module is not output:
            weight = getattr(module.get_base_layer(), "weight", None)
            if weight is not None and weight is getattr(output, "weight", None):
                raise bad_value(
                    f"{key}.target_modules", settings.target_modules, f"no {name}, which is tied to the output"
                )


@torch.no_grad()
def plain_weights(model: PreTrainedModel, adapter: Lora | None) -> dict[str, Tensor]:
    """The model's parameters under the names of a plain model, an adapter added into the matrices it is on.

    What an average of weights is made of: that of A and B on their own would not be that of B A.
    """
    if adapter is None:
        return dict(model.named_parameters())
    adapted = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    weights = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".base_layer.")
        if owner in adapted:
            delta = adapted[owner].get_delta_weight("default") if leaf == "weight" else 0.0
            weights[f"{owner}.{leaf}"] = parameter + delta
        elif not any(name.startswith(f"{place}.") for place in adapted):
            weights[name] = parameter
    return weights


def _is_transposed(model: PreTrainedModel) -> bool:
    """GPT-2 keeps its matrices transposed, in layers of its own kind."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())
