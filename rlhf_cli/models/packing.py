"""Rows without padding, a shared prompt there once: what a training or scoring pass of a decoder works on.

Rows that begin with the same prompt are a tree: the prompt is its stem, their completions are its branches; equal rows
are one branch, so that they have equal figures to the bit (a reward model's ties stay ties). All tokens of all trees
stand in one row of T tokens; a token sees its own stem and branch. For B prompts of p tokens with k completions of c
tokens each, T = B (p + k c), where padded rows have B k max(p + c): the work of everything but attention shrinks by
that ratio. Attention pads trees of like length to rectangles.

The figures are those of padded rows up to rounding. In training, dropout draws one mask for a shared prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from rlhf_cli.models.attention import ATTENTION, AttentionCall, states, takes_layouts
from rlhf_cli.models.positions import check_length, token_positions
from rlhf_cli.models.vocabulary import tokens_only
from rlhf_cli.ops.autograd import taken
from rlhf_cli.types import Sequences

# Trees whose attention is done together are at least this long, as a share of the longest of them.
_LIKE_LENGTH = 0.75

# Largest difference of a probe's hidden states, in units of their own standard deviation, that is rounding.
_ROUNDING = 1e-3

# What a model may do to its logits behind its output layer, by the key in its config, and the value that does nothing.
_BEHIND_THE_HEAD = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1}

_STEM = -1  # the branch of a prompt's tokens
_PAD = -2

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Rectangle:
    """Trees of like length: G of them, padded to M tokens on the right."""

    places: slice  # of the padded tokens, tree by tree, among those of all rectangles
    trees: int
    width: int
    position: Tensor  # int64 [G, M]
    branch: Tensor  # int64 [G, M], _STEM, the number of a completion, or _PAD
    is_chain: bool  # no tree has more than one branch: who sees whom is plain causality

    def sees(self, window: int | None) -> Tensor:
        """bool [G, 1, M, M]: whether the token of a line sees that of a column."""
        of, by = self.branch[:, None, :], self.branch[:, :, None]
        back = self.position[:, :, None] - self.position[:, None, :]
        visible = ((of == _STEM) | (of == by)) & (back >= 0)
        if window is not None:
            visible &= back < window
        # a token of padding sees itself, because a softmax over nothing is no number
        return (visible | torch.eye(self.width, dtype=torch.bool, device=visible.device))[:, None]


@dataclass
class TreeLayout:
    """A token sees the prompt and the completion that it belongs to, up to itself."""

    rectangles: Sequence[_Rectangle]
    token_of: Tensor  # int64 [S], the token at each place of the rectangles; any token where the place is padding
    place_of: Tensor  # int64 [T], the place of each token
    is_token: Tensor  # bool [S, 1]
    _masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)  # the same in every layer

    def attend(self, call: AttentionCall) -> Tensor:
        """Scaled dot-product attention of each rectangle; see `Layout`."""
        query, key, value = (self._padded(one) for one in (call.query, call.key, call.value))
        answers = []
        for number, rectangle in enumerate(self.rectangles):
            mask = self._mask(number, call.sliding_window)
            answer = functional.scaled_dot_product_attention(
                *(_trees(one, rectangle, call.query.shape[0]) for one in (query, key, value)),
                attn_mask=mask,
                dropout_p=call.dropout,
                is_causal=mask is None,
                scale=call.scaling,
            )
            answers.append(answer.transpose(1, 2).flatten(0, 1))  # [G * M, heads, D]
        everything = torch.cat(answers) if len(answers) > 1 else answers[0]
        return taken(everything, self.place_of, self.token_of, self.is_token[..., None])

    def _padded(self, states_of_heads: Tensor) -> Tensor:
        """[heads, T, D] to [S, heads, D], in the precision that attention will be computed in."""
        device = states_of_heads.device.type
        if torch.is_autocast_enabled(device):
            states_of_heads = states_of_heads.to(torch.get_autocast_dtype(device))
        return taken(states_of_heads.transpose(0, 1), self.token_of, self.place_of)

    def _mask(self, number: int, window: int | None) -> Tensor | None:
        rectangle = self.rectangles[number]
        if (number, window) not in self._masks:
            is_plain = rectangle.is_chain and (window is None or window >= rectangle.width)
            self._masks[number, window] = None if is_plain else rectangle.sees(window)
        return self._masks[number, window]


def _trees(padded: Tensor, rectangle: _Rectangle, num_heads: int) -> Tensor:
    """A rectangle's part of [S, key heads, D] as [G, heads, M, D]; what several queries share is repeated for them."""
    part = padded[rectangle.places].unflatten(0, (rectangle.trees, rectangle.width)).transpose(1, 2)
    share = num_heads // part.shape[1]
    return part if share == 1 else part.repeat_interleave(share, dim=1)


@dataclass(frozen=True)
class Packing:
    """N rows as T tokens, and where to find in them what is asked for."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    layout: TreeLayout
    # int64 [C], for each completion token, row by row, the token that it is predicted from; none for a row's first one
    predictors: Tensor
    last: Tensor  # int64 [N], the last token of each row

    def __len__(self) -> int:
        return len(self.ids)


def pack(sequences: Sequences, hidden_size: int) -> Packing:
    """Lays rows out without padding, what precedes their completions there once for all rows that share it.

    Args:
        sequences: N rows; everything before a row's first completion token is its prompt.
        hidden_size: of the model, which decides when attention inside a tree costs more than a prompt saves.
    """
    device = sequences.ids.device
    rows = _rows(sequences)
    trees: dict[bytes, dict[bytes, int]] = {}  # of each prompt, the first row with each completion
    same_as: list[int] = []
    for number, (tokens, num_prompt, _) in enumerate(rows):
        branches_of = trees.setdefault(tokens[:num_prompt].tobytes(), {})
        same_as.append(branches_of.setdefault(tokens[num_prompt:].tobytes(), number))
    cut = [part for members in trees.values() for part in _cut(list(members.values()), rows, hidden_size)]

    places = np.full(
        (len(rows), sequences.ids.shape[1]), -1, dtype=np.int64
    )  # of a row's tokens, in the order of rows
    ids, positions, branches, lengths = list[Ints](), list[Ints](), list[Ints](), list[int]()
    start = 0
    for members in cut:
        first, num_prompt, _ = rows[members[0]]
        ids.append(first[:num_prompt])
        positions.append(np.arange(num_prompt))
        branches.append(np.full(num_prompt, _STEM))
        stem, start = start, start + num_prompt
        for branch, number in enumerate(members):
            tokens = rows[number][0]
            ids.append(tokens[num_prompt:])
            positions.append(np.arange(num_prompt, len(tokens)))
            branches.append(np.full(len(tokens) - num_prompt, branch))
            places[number, :num_prompt] = np.arange(stem, stem + num_prompt)
            places[number, num_prompt : len(tokens)] = np.arange(start, start + len(tokens) - num_prompt)
            start += len(tokens) - num_prompt
        lengths.append(start - stem)

    places = places[same_as]
    # What a reward model reads may begin with its completion, whose first token nothing predicts
    predictors = [places[number, counted[counted > 0] - 1] for number, (_, _, counted) in enumerate(rows)]
    last = [places[number, len(tokens) - 1] for number, (tokens, _, _) in enumerate(rows)]
    all_positions = np.concatenate(positions)
    layout = _layout(all_positions, np.concatenate(branches), lengths, device)
    return Packing(
        ids=torch.from_numpy(np.concatenate(ids)).to(device),
        positions=torch.from_numpy(all_positions).to(device),
        layout=layout,
        predictors=torch.from_numpy(np.concatenate(predictors)).to(device),
        last=torch.tensor(last, device=device),
    )


def _rows(sequences: Sequences) -> list[tuple[Ints, int, Ints]]:
    """Of each row: its tokens, how many of them precede the completion, and which ones are the completion's."""
    ids, real, counts = (
        one.cpu().numpy() for one in (sequences.ids, sequences.attention_mask, sequences.completion_mask)
    )
    rows = []
    for number in range(len(ids)):
        counted = np.flatnonzero(counts[number][real[number]])
        tokens = ids[number][real[number]]
        assert len(tokens), "a row has a token"
        rows.append((tokens, int(counted[0]) if len(counted) else len(tokens), counted))
    return rows


def _cut(members: Sequence[int], rows: Sequence[tuple[Ints, int, Ints]], hidden_size: int) -> list[Sequence[int]]:
    """Rows that share a prompt in trees of not too many branches: the branches of a tree see nothing of each other, and
    attention is computed and thrown away between them."""
    num_prompt = rows[members[0]][1]
    completion = max(1.0, float(np.mean([len(rows[number][0]) - num_prompt for number in members])))
    size = ideal_branches(num_prompt, completion, hidden_size)
    count = math.ceil(len(members) / size)
    return [members[len(members) * i // count : len(members) * (i + 1) // count] for i in range(count)]


def ideal_branches(num_prompt: int, completion: float, hidden_size: int) -> int:
    """How many completions should share a prompt of p tokens: what costs the least work for each of them.

    A tree of m branches of c tokens costs about a (p + m c) outside attention and 4 H (p + m c)^2 in it, a = 24 H^2
    FLOPs a token for a block of the usual shape. Per branch this is least at m = sqrt(p a / 4H + p^2) / c; attention
    reaches about half the speed of a matrix product, which halves a.

    >>> ideal_branches(16, 32.0, 256), ideal_branches(512, 32.0, 256), ideal_branches(4, 400.0, 64)
    (3, 25, 1)
    """
    return max(1, int(math.sqrt(num_prompt * 3 * hidden_size + num_prompt**2) / completion))


def like_lengths(lengths: Sequence[int], share: float = _LIKE_LENGTH) -> list[list[int]]:
    """Numbers of what is of like length: every group's shortest has at least `share` of its longest.

    >>> like_lengths([10, 3, 9, 2, 4], share=0.6)
    [[0, 2], [4, 1], [3]]
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[number] >= share * lengths[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _layout(positions: Ints, branches: Ints, lengths: Sequence[int], device: torch.device) -> TreeLayout:
    starts = np.concatenate([[0], np.cumsum(lengths)])
    rectangles, tokens_of = list[_Rectangle](), list[Ints]()
    begin = 0
    for group in like_lengths(lengths):
        width = lengths[group[0]]
        column = np.arange(width)
        filled = column < np.array([[lengths[tree]] for tree in group])  # [G, M]
        token_of = np.where(filled, starts[group][:, None] + column, 0)
        branch = np.where(filled, branches[token_of], _PAD)
        rectangles.append(
            _Rectangle(
                slice(begin, begin + branch.size),
                len(group),
                width,
                torch.from_numpy(np.where(filled, positions[token_of], 0)).to(device),
                torch.from_numpy(branch).to(device),
                is_chain=int(branch.max()) <= 0,
            )
        )
        begin += branch.size
        tokens_of.append(np.where(filled, token_of, -1).ravel())
    token_of = np.concatenate(tokens_of)
    is_token = token_of >= 0
    place_of = np.empty(len(positions), dtype=np.int64)
    place_of[token_of[is_token]] = np.flatnonzero(is_token)
    return TreeLayout(
        rectangles,
        torch.from_numpy(np.where(is_token, token_of, 0)).to(device),
        torch.from_numpy(place_of).to(device),
        torch.from_numpy(is_token[:, None]).to(device),
    )


def packed_states(model: PreTrainedModel, sequences: Sequences) -> tuple[Tensor, Packing]:
    """The backbone's last hidden states of N rows, [T, H], and where each is found.

    Raises:
        RequestError: a row has more tokens than the model has positions.
    """
    check_length(model, sequences)
    packing = pack(sequences, model.config.get_text_config().hidden_size)
    return states(model, packing.ids, packing.positions, packing.layout), packing


@torch.no_grad()
def enable_layouts(model: PreTrainedModel) -> bool:
    """Lets `states` be asked of a decoder, where it answers as it does for padded rows; True where it does.

    Asked once and both ways, because nothing that a model says of itself tells whether all of it works on one row of
    tokens: positions made of an attention mask, recurrent layers or a head that does more than multiply do not.
    """
    if takes_layouts(model):
        return True
    config = model.config.get_text_config()
    can = getattr(model, "_supports_attention_backend", False) and model._can_set_attn_implementation()
    if not can or not getattr(config, "is_causal", True) or getattr(config, "attn_logit_softcapping", None):
        return False
    if key_behind_the_head(model) is not None:
        return False
    before, training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation(ATTENTION)
    try:
        agrees = _agrees(model)
    except Exception:  # whatever a model that was not made for this ends in: it is asked with padding then
        agrees = False
    if not agrees:
        model.set_attn_implementation(before)
    model.train(training)
    return agrees


def key_behind_the_head(model: PreTrainedModel) -> str | None:
    """The config's key that says of logits that they are more than a product; None where no known one does.

    Asking the model is not enough: logits that are capped are hardly changed as long as they are small.
    """
    config = model.config.get_text_config()
    keys = _BEHIND_THE_HEAD.items()
    return next((key for key, nothing in keys if getattr(config, key, nothing) not in (None, nothing)), None)


def _agrees(model: PreTrainedModel) -> bool:
    """Whether three short rows, two of one prompt, have the same states and logits packed as padded."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = model.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (3, 7), generator=generator)
    ids[1, :3] = ids[0, :3]
    column = torch.arange(7)
    real = column < torch.tensor([[7], [6], [5]])
    rows = Sequences(ids, real, real & (column >= 3)).to(device)
    hidden, packing = packed_states(model, rows)
    answer = model.base_model(
        input_ids=rows.ids,
        attention_mask=rows.attention_mask.long(),
        position_ids=token_positions(rows.attention_mask),
        use_cache=False,
    )
    if hidden.shape[-1] != answer.last_hidden_state.shape[-1]:
        return False
    wanted = answer.last_hidden_state[:, :-1][rows.completion_mask[:, 1:]]
    if not _close(hidden[packing.predictors], wanted):
        return False
    head = model.get_output_embeddings()
    if head is None:
        return True
    whole = model(
        input_ids=rows.ids,
        attention_mask=rows.attention_mask.long(),
        position_ids=token_positions(rows.attention_mask),
        use_cache=False,
    )
    return _close(tokens_only(model, head(wanted)), whole.logits[:, :-1][rows.completion_mask[:, 1:]])


def _close(found: Tensor, wanted: Tensor) -> bool:
    spread = float(wanted.float().std())
    return bool((found.float() - wanted.float()).abs().max() <= _ROUNDING * spread)
