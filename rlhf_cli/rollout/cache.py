"""Keys and values of a group of rows in memory that stays where it is, and the attention of one new token a row.

Rows of a group have their prompts padded on the left to one width, so that a step writes the same column in all of
them. What a row does not see, padding and columns that are not written yet, is -inf in a mask of the group's own.
Everything a step does is in place and the same from step to step, but for the numbers in tensors: on a GPU it is
captured in a graph (`rlhf_cli.rollout.graphs`), and no step waits for the host.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlhf_cli.models.attention import AttentionCall


class RowGroup:
    """Rows that are decoded in one rectangle. Capacity C rows, S columns, the first n rows in use."""

    def __init__(self, capacity: int, num_columns: int, device: torch.device) -> None:
        """Nothing is in use before `begin`."""
        self.capacity = capacity
        self.num_columns = num_columns
        self.rows = torch.zeros(capacity, dtype=torch.long, device=device)  # their numbers in the results
        self.ids = torch.zeros(capacity, dtype=torch.long, device=device)  # the newest token
        self.positions = torch.zeros(capacity, dtype=torch.long, device=device)  # of that token in its text
        self.active = torch.zeros(capacity, dtype=torch.bool, device=device)  # False = finished
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # that the newest token is written to
        self.hidden = torch.ones(
            (capacity, num_columns), dtype=torch.bool, device=device
        )  # columns not to be seen
        self.num_rows = 0  # n
        self.num_seen = 0  # columns that attention looks at, the newest among them
        self._columns = torch.arange(num_columns, device=device)
        self._keys: dict[int, Tensor] = {}  # of a layer, [C, key heads, S, D]
        self._values: dict[int, Tensor] = {}
        self._masks: dict[tuple[int | None, int], Tensor] = {}

    def begin(self, rows: Tensor, positions: Tensor, real: Tensor) -> None:
        """Takes up C rows.

        Args:
            rows: int64 [C], their numbers in the results.
            positions: int64 [C], of the first token after the prompt.
            real: bool [C, W], True = a token of the prompt, padding on the left.
        """
        width = real.shape[1]
        self.rows.copy_(rows)
        self.positions.copy_(positions)
        self.active.fill_(True)
        self.column.fill_(width)
        self.hidden.fill_(True)
        self.hidden[:, :width].copy_(~real)
        self.num_rows, self.num_seen = self.capacity, width

    def write_prompts(self, layer: int, key: Tensor, value: Tensor, dtype: torch.dtype) -> None:
        """Puts a layer's keys and values of P prompts, [P, key heads, W, D], to each of a prompt's samples."""
        for store, new in ((self._keys, key), (self._values, value)):
            if layer not in store:
                num_heads, size = new.shape[1], new.shape[3]
                # Zeros, because what is not seen is multiplied by 0 all the same, and 0 * NaN is none
                shape = (self.capacity, num_heads, self.num_columns, size)
                store[layer] = torch.zeros(shape, dtype=dtype, device=new.device)
            by_prompt = store[layer].view(new.shape[0], -1, *store[layer].shape[1:])
            by_prompt[:, :, :, : new.shape[2]] = new[:, None]

    def cache_bytes(self) -> int:
        """Of the keys and values of all layers."""
        return sum(store.nbytes for store in (*self._keys.values(), *self._values.values()))

    def open_column(self) -> None:
        """From now on the newest token's column is seen."""
        # Those of the step before; one that could not be captured has left some that were never computed
        self._masks.clear()
        self.hidden.index_fill_(1, self.column, False)

    def attend(self, call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Writes a layer's keys and values of the newest tokens, and looks at all there are.

        Args:
            call: what is asked; its tensors are of all groups.
            query: [heads, n, D] of this group.
            key, value: [key heads, n, D].

        Returns:
            [n, heads, D].
        """
        keys, values = self._keys[call.layer][: self.num_rows], self._values[call.layer][: self.num_rows]
        for store, new in ((keys, key), (values, value)):
            store.index_copy_(2, self.column, new.transpose(0, 1).to(store.dtype)[:, :, None])
        num_heads, num_key_heads = query.shape[0], key.shape[0]
        # Query heads that share a key head are neighbours: they are that head's queries, and no key is repeated
        grouped = query.transpose(0, 1).reshape(self.num_rows, num_key_heads, num_heads // num_key_heads, -1)
        scale = 1 / math.sqrt(query.shape[-1]) if call.scaling is None else call.scaling
        answer = (attend_fused if query.is_cuda else attend_by_products)(
            grouped.to(keys.dtype),
            keys[:, :, : self.num_seen],
            values[:, :, : self.num_seen],
            self._mask(call.sliding_window, num_key_heads, keys),
            scale,
        )
        return answer.reshape(self.num_rows, num_heads, -1)

    def keep(self, count: int) -> None:
        """Makes the first `count` rows those that are not finished, and leaves the rest.

        Unfinished rows from the end move to the places of finished ones; nothing else is copied, and the host need not
        know which they are.

        Args:
            count: at least as many as are not finished, at most n.
        """
        num_moves = min(self.num_rows - count, count)
        if num_moves > 0:
            ended_first = self.active[:count].to(torch.uint8).argsort(stable=True)
            active_first = (~self.active[count : self.num_rows]).to(torch.uint8).argsort(stable=True)
            to, source = ended_first[:num_moves], active_first[:num_moves] + count
            # There are more places than rows to move: the others of these pairs copy a row onto itself
            source = torch.where(self.active[source], source, to)
            caches = [*self._keys.values(), *self._values.values()]
            used = [cache[:, :, : self.num_seen] for cache in caches]
            for tensor in (*used, self.hidden, self.rows, self.ids, self.positions, self.active):
                tensor.index_copy_(0, to, tensor.index_select(0, source))
        self.num_rows = count

    def advance(self) -> None:
        """Moves on to the next column."""
        self.positions.add_(1)
        self.column.add_(1)

    def _mask(self, window: int | None, num_key_heads: int, keys: Tensor) -> Tensor:
        """[n, key heads, 1, columns seen]: -inf where a row does not look, 0 elsewhere; made once a step."""
        mask = self._masks.get((window, num_key_heads))
        if mask is None:
            hidden = self.hidden[: self.num_rows, : self.num_seen]
            if window is not None:
                hidden = hidden | (self._columns[: self.num_seen] <= self.column - window)
            mask = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
            mask = mask.masked_fill_(hidden, -math.inf)[:, None, None].expand(-1, num_key_heads, -1, -1)
            if not keys.is_cuda:
                mask = mask.contiguous()  # read by every layer as one of n * key heads matrices
            self._masks[window, num_key_heads] = mask
        return mask


def attend_fused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention in one kernel. Shapes and result as in `attend_by_products`."""
    return scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)


def attend_by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """softmax(scale * query keys^T + mask) values; on a CPU, for one token a row, several times faster than if fused.

    Args:
        query: [n, key heads, R, D], R queries to each key head.
        keys: [n, key heads, S, D].
        values: [n, key heads, S, E].
        mask: [n, key heads, 1, S], added.
        scale: of the products.

    Returns:
        [n, key heads, R, E], in the dtype of the keys.
    """
    with torch.autocast(query.device.type, enabled=False):
        # One axis for rows and heads: a view, as each row's heads lie behind each other in memory
        scores = torch.baddbmm(mask.flatten(0, 1), query.flatten(0, 1), keys.flatten(0, 1).mT, alpha=scale)
        answer = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
    return answer.view(*query.shape[:3], values.shape[-1])
