"""Gradient checkpointing: a layer's activations are computed again in the backward pass instead of being kept.

Chen et al. 2016 (arXiv 1604.06174), one checkpoint per transformer layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_cli.errors import RequestError


def enable_recomputation(key: str, model: PreTrainedModel) -> None:
    """Lets the model's layers recompute in their backward pass, inside `recomputing`.

    Raises:
        RequestError: this kind of model cannot.
    """
    # The reentrant form needs inputs with a gradient, which a model with frozen embeddings has not. transformers gives
    # them one whatever the form, and the backward pass would then go through all that is frozen below.
    options = {"use_reentrant": False}
    try:
        if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases of transformers
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise RequestError(f"{key}=true: {type(model).__name__} cannot recompute activations ({error})") from error
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()


@contextmanager
def recomputing(model: nn.Module) -> Iterator[None]:
    """Inside, layers that were enabled recompute, also in eval mode.

    transformers recomputes in train mode only, and drops the cache of a model that decodes in it. Policies train in
    eval mode, because dropout has to stay off: here the layers alone are switched, and what they drop out themselves.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and not module.training
    ]
    rates: list[tuple[nn.Module, str, Any]] = [
        (layer, name, rate)
        for layer in layers
        for name, rate in vars(layer).items()
        if "dropout" in name and isinstance(rate, float)
    ]
    try:
        for layer in layers:
            layer.training = True  # not train(), which reaches the modules inside
        for layer, name, _ in rates:
            setattr(layer, name, 0.0)
        yield
    finally:
        for layer in layers:
            layer.training = False
        for layer, name, rate in rates:
            setattr(layer, name, rate)
