"""Frozen models in the precision that autocast computes in: the same numbers without casting, half the memory."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# The layers whose products autocast computes in its own type, and whose weights it therefore casts.
CAST_BY_AUTOCAST = (nn.Linear, Conv1D)


@torch.no_grad()
def hold_matrices_in(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Keeps the matrices of a frozen model as autocast would make them at every call.

    What autocast leaves in float32 stays in it: embeddings, norms, and the head of a classifier, which is computed
    without autocast. An output layer that is tied to the embeddings gets a matrix of its own.

    Args:
        model: changed in place; neither trained nor saved from now on.
        dtype: autocast's; None = there is no autocast, and nothing changes.
    """
    if dtype is None:
        return
    head = model.get_output_embeddings()
    for module in (*model.base_model.modules(), *(() if head is None else (head,))):
        if isinstance(module, CAST_BY_AUTOCAST):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
