"""The pass over the prompts: all in one row of tokens, without padding, each once however many samples it has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_cli.models.attention import AttentionCall
from rlhf_cli.rollout.cache import RowGroup


@dataclass(frozen=True)
class PromptGrid:
    """P prompts of one group, padded on the left to the longest of them, W tokens."""

    token: Tensor  # int64 [P, W], where the token is in the row of all prompts; any where there is none
    real: Tensor  # bool [P, W], True = a token
    place: Tensor  # int64 [tokens], of each token in the flat grid, in the order of that row


@dataclass(frozen=True)
class PackedPrompts:
    """T tokens of all prompts behind each other, group by group."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    last: Tensor  # int64 [P], where each prompt ends
    grids: tuple[PromptGrid, ...]  # one a group


def pack_prompts(groups: Sequence[Sequence[Sequence[int]]], device: torch.device) -> PackedPrompts:
    """Lays out the prompts' ids.

    >>> packed = pack_prompts([[[7], [8, 9]]], torch.device("cpu"))
    >>> packed.ids.tolist(), packed.positions.tolist(), packed.last.tolist()
    ([7, 8, 9], [0, 0, 1], [0, 2])
    >>> packed.grids[0].real.tolist(), packed.grids[0].place.tolist()
    ([[False, True], [True, True]], [1, 2, 3])
    """
    ids: list[int] = []
    positions: list[int] = []
    last: list[int] = []
    grids = []
    for prompts in groups:
        width = max(len(prompt) for prompt in prompts)
        token = torch.zeros((len(prompts), width), dtype=torch.long)
        real = torch.zeros((len(prompts), width), dtype=torch.bool)
        place: list[int] = []
        for i, prompt in enumerate(prompts):
            begin, padding = len(ids), width - len(prompt)
            token[i, padding:] = torch.arange(begin, begin + len(prompt))
            real[i, padding:] = True
            place.extend(range(i * width + padding, (i + 1) * width))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            last.append(len(ids) - 1)
        grids.append(PromptGrid(token.to(device), real.to(device), torch.tensor(place, device=device)))
    return PackedPrompts(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(last, device=device),
        tuple(grids),
    )


class PrefillLayout:
    """A prompt's tokens see those before them; what they leave behind goes to the cache of each of its samples."""

    def __init__(self, packed: PackedPrompts, groups: Sequence[RowGroup], dtype: torch.dtype | None) -> None:
        """Where an argument does not say it.

        Args:
            groups: of rows, one for each of the prompts' grids.
            dtype: of the cache; None = that of the keys.
        """
        self._parts = list(zip(packed.grids, groups, strict=True))
        self._dtype = dtype
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Layout`."""
        answers = []
        num_shared = call.query.shape[0] // call.key.shape[0]
        for number, (grid, group) in enumerate(self._parts):
            query, key, value = (
                one[:, grid.token].transpose(0, 1) for one in (call.query, call.key, call.value)
            )  # [P, heads, W, D]
            group.write_prompts(call.layer, key, value, self._dtype or key.dtype)
            if num_shared > 1:
                key, value = key.repeat_interleave(num_shared, 1), value.repeat_interleave(num_shared, 1)
            # Under autocast a fused kernel takes all three in one type
            answer = scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=self._mask(number, grid.real, call.sliding_window),
                scale=1 / math.sqrt(query.shape[-1]) if call.scaling is None else call.scaling,
            )
            answers.append(answer.transpose(1, 2).flatten(0, 1)[grid.place])
        return answers[0] if len(answers) == 1 else torch.cat(answers)

    def _mask(self, number: int, real: Tensor, window: int | None) -> Tensor:
        """bool [P, 1, W, W]: query x key, True = looks."""
        mask = self._masks.get((number, window))
        if mask is None:
            columns = torch.arange(real.shape[1], device=real.device)
            back = columns[:, None] - columns
            sees = (back >= 0) if window is None else (back >= 0) & (back < window)
            # Padding sees itself: a softmax over nothing is none
            mask = ((sees & real[:, None]) | (back == 0))[:, None]
            self._masks[number, window] = mask
        return mask
