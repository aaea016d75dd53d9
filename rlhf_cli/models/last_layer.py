"""Training the last transformer block and the head alone, the rest frozen: no adapter, and no weights of its own.

A language model's head is its output layer; where that is the table of the input embeddings too, it stays as it is. A
classifier's head is all that lies outside its backbone. A norm after the last block belongs to the frozen part.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rlhf_cli.errors import bad_value


def freeze_below_last_layer(key: str, model: PreTrainedModel) -> None:
    """Leaves trainable, of `model`, its last block and its head.

    Args:
        key: of the settings, for errors.
        model: causal language model or sequence classifier; changed in place.

    Raises:
        RequestError: the model's blocks cannot be told from its other parts.
    """
    block = _last_block(model)
    if block is None:
        kind = model.config.model_type
        raise bad_value(
            f"{key}.name",
            "last_layer",
            f"none or lora for a model of type {kind}, because its blocks are not in one list",
        )
    model.requires_grad_(False)
    block.requires_grad_(True)
    output = model.get_output_embeddings()
    if output is not None:
        output.requires_grad_(not has_tied_head(model))
        return
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            parameter.requires_grad_(True)


def has_tied_head(model: PreTrainedModel) -> bool:
    """Whether a language model's output layer is the table of its input embeddings."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def _last_block(model: PreTrainedModel) -> nn.Module | None:
    """Of the backbone's list of `num_hidden_layers` blocks; None where it has no such list, or several."""
    number = getattr(model.config, "num_hidden_layers", None)
    lists = {
        name: module for name, module in model.base_model.named_modules() if isinstance(module, nn.ModuleList)
    }
    # What lies inside a block may have as many entries.
    outer = [
        module
        for name, module in lists.items()
        if len(module) == number and not any(name.startswith(f"{other}.") for other in lists)
    ]
    return outer[0][-1] if len(outer) == 1 else None
