"""Attention among tokens that stand in no rectangle: the model works on one row of tokens, a layout says who sees whom.

Everything in a decoder but attention acts on each token by itself. Where all tokens of a batch are laid out in one
row, without padding and with a shared prompt there once, that part of the work is done for real tokens alone; attention
is then the business of a `Layout`, which is also where a cache of keys and values lives. A model is switched to it
once, by `rlhf_cli.models.packing.enable_layouts`; called without a layout it goes on as it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# The name under which transformers finds it; it is not written into a saved config.
ATTENTION = "rlhf_layout"


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks. T tokens, in the order in which they were given to the model."""

    layer: int  # number of the layer
    query: Tensor  # [heads, T, D], positions already applied
    key: Tensor  # [key heads, T, D]; fewer than the query's where these share them
    value: Tensor  # [key heads, T, D]
    scaling: float | None  # of query . key; None = 1 / sqrt(D)
    dropout: float  # probability, 0 in eval mode
    sliding_window: int | None  # how many positions back a token sees, itself included; None = all


class Layout(Protocol):
    """Who sees whom among the tokens of a forward pass."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Answers of a layer, [T, heads, D], in the order of the queries."""
        ...


def takes_layouts(model: object) -> bool:
    """Whether `states` may be asked of this model."""
    config = getattr(model, "config", None)
    return getattr(config, "_attn_implementation", None) == ATTENTION


def states(model: PreTrainedModel, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
    """The backbone's last hidden states.

    Args:
        model: one that `takes_layouts`; its head, where it has one, is not called.
        ids: int64 [T].
        positions: int64 [T], of each token in its own text.
        layout: who sees whom.

    Returns:
        [T, H]; gradients flow where they are enabled.
    """
    # transformers returns a mask of four dimensions as it is, instead of making one; nobody reads it
    unread = torch.empty((1, 1, 0, 0), device=ids.device)
    answer = model.base_model(
        input_ids=ids[None],
        position_ids=positions[None],
        attention_mask=unread,
        use_cache=False,
        layout=layout,
    )
    hidden: Tensor = answer.last_hidden_state[0]
    return hidden


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [N, heads, T, D] -> [N, T, heads, D]."""
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    window = options.get("sliding_window")
    return layout.attend(AttentionCall(layer, query[0], key[0], value[0], scaling, dropout, window))[None], None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
