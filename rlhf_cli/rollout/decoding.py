"""Decoding by layout: one prefill of all prompts, then steps in place on tensors that stay where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_cli.models.attention import AttentionCall, states
from rlhf_cli.ops.masks import is_eos
from rlhf_cli.ops.sampling import sample_token
from rlhf_cli.rollout.cache import RowGroup
from rlhf_cli.rollout.graphs import Capturing, LateCounts, StepGraphs
from rlhf_cli.rollout.grouping import round_up, rows_to_keep
from rlhf_cli.rollout.prefill import PrefillLayout, pack_prompts
from rlhf_cli.rollout.sampling import Sampling
from rlhf_cli.rollout.tuning import Tuning

# From hidden states [N, H] to logits [N, V].
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecodingShape:
    """All that a step depends on besides the contents of tensors and how many rows and columns are in use."""

    groups: tuple[tuple[int, int], ...]  # rows and columns of each
    samples_per_prompt: int  # k
    sampling: Sampling  # T = max_new_tokens
    stop_ids: tuple[int, ...]
    cache_dtype: torch.dtype | None  # None = that of the keys


def shape_of(
    lengths: Sequence[Sequence[int]],
    samples_per_prompt: int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    cache_dtype: torch.dtype | None,
    tuning: Tuning,
) -> DecodingShape:
    """The shape for groups of prompts of these lengths."""
    groups = tuple(
        (len(group) * samples_per_prompt, round_up(max(group) + sampling.max_new_tokens, tuning.column_multiple))
        for group in lengths
    )
    return DecodingShape(groups, samples_per_prompt, sampling, stop_ids, cache_dtype)


class Decoding:
    """Decodes R rows: the cache, the state of each row, and what comes out; serves again for prompts of its shape."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        shape: DecodingShape,
        tuning: Tuning,
        capturing: Capturing,
    ) -> None:
        """Where an argument does not say it.

        Args:
            model: that `takes_layouts`.
            head: its logits, of hidden states; nothing that follows it is left out.
            capturing: whether steps are captured, shared by all that decode with one model.
        """
        device = model.device
        num_rows = sum(rows for rows, _ in shape.groups)
        self._model = model
        self._head = head
        self._shape = shape
        self._tuning = tuning
        self._graphs = StepGraphs(capturing)
        self._groups = [RowGroup(rows, columns, device) for rows, columns in shape.groups]
        self._noise = torch.zeros((num_rows, shape.sampling.max_new_tokens), device=device)
        self._tokens = torch.zeros(
            (num_rows, shape.sampling.max_new_tokens), dtype=torch.long, device=device
        )  # -1 = none
        self._logprob = torch.zeros((num_rows, shape.sampling.max_new_tokens), device=device)
        self._place = torch.zeros(1, dtype=torch.long, device=device)  # of the next token in its completion
        self._counts = torch.zeros(len(shape.groups), dtype=torch.long, device=device)  # of unfinished rows

    def __call__(self, groups: Sequence[Sequence[Sequence[int]]], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Samples k completions for each prompt.

        Args:
            groups: ids of the prompts, in the groups of the shape.
            noise: float32 [R, T] in [0, 1), of the rows in the order of the groups.

        Returns:
            tokens int64 [R, T], -1 after a row's end; their log-probs float32 [R, T], 0 there.
        """
        counts = LateCounts(len(self._groups), self._tuning.lag, self._counts.device)
        self._prefill(groups, noise)
        counts.note(self._counts)
        for place in range(1, self._shape.sampling.max_new_tokens):
            active = counts.read()
            if active is not None:
                if not any(active):
                    break
                self._drop_finished(active)
            for group, prompts in zip(self._groups, groups, strict=True):
                seen = round_up(max(map(len, prompts)) + place, self._tuning.column_multiple)
                group.num_seen = min(seen, group.num_columns)
            in_use = tuple((group.num_rows, group.num_seen if group.num_rows else 0) for group in self._groups)
            self._graphs.run(in_use, self.step)
            counts.note(self._counts)
        return self._tokens, self._logprob

    def cache_bytes(self) -> int:
        """Of the keys and values that it holds."""
        return sum(group.cache_bytes() for group in self._groups)

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Layout`: one new token a row, group by group."""
        answers = []
        begin = 0
        for group in self._in_use():
            part = slice(begin, begin + group.num_rows)
            answers.append(group.attend(call, call.query[:, part], call.key[:, part], call.value[:, part]))
            begin = part.stop
        return _joined(answers)

    def step(self) -> None:
        """The newest tokens into the model, the next ones out of it. In place, without host synchronisation."""
        in_use = self._in_use()
        for group in in_use:
            group.open_column()
        ids = _joined([group.ids[: group.num_rows] for group in in_use])
        positions = _joined([group.positions[: group.num_rows] for group in in_use])
        self._accept(self._head(states(self._model, ids, positions, self)))
        for group in in_use:
            group.advance()

    def _prefill(self, groups: Sequence[Sequence[Sequence[int]]], noise: Tensor) -> None:
        """Reads the prompts and draws the first token of every row."""
        device, k = self._counts.device, self._shape.samples_per_prompt
        self._noise.copy_(noise)
        self._tokens.fill_(-1)
        self._logprob.zero_()
        self._place.zero_()
        packed = pack_prompts(groups, device)
        begin = 0
        for group, prompts, grid in zip(self._groups, groups, packed.grids, strict=True):
            rows = torch.arange(begin, begin + group.capacity, device=device)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
            group.begin(rows, lengths.repeat_interleave(k), grid.real.repeat_interleave(k, 0))
            begin += group.capacity
        layout = PrefillLayout(packed, self._groups, self._shape.cache_dtype)
        hidden = states(self._model, packed.ids, packed.positions, layout)
        self._accept(self._head(hidden[packed.last]).repeat_interleave(k, 0))

    def _accept(self, logits: Tensor) -> None:
        """Draws the next token of the rows in use, and keeps it where the row is not finished."""
        in_use = self._in_use()
        rows = _joined([group.rows[: group.num_rows] for group in in_use])
        active = _joined([group.active[: group.num_rows] for group in in_use])
        how = self._shape.sampling
        noise = self._noise[rows, self._place]
        ids, logprob = sample_token(logits, noise, how.temperature, how.top_k, how.top_p)
        self._tokens[rows, self._place] = torch.where(active, ids, -1)
        self._logprob[rows, self._place] = torch.where(active, logprob, 0.0)
        active = active & ~is_eos(ids, self._shape.stop_ids)
        begin = 0
        for number, group in enumerate(self._groups):
            part = slice(begin, begin + group.num_rows)
            group.ids[: group.num_rows].copy_(ids[part])
            group.active[: group.num_rows].copy_(active[part])
            self._counts[number] = active[part].sum()
            begin = part.stop
        self._place.add_(1)

    def _drop_finished(self, num_active: Sequence[int]) -> None:
        """Finished rows leave where that makes a smaller shape; there may be fewer unfinished ones than said."""
        for group, active in zip(self._groups, num_active, strict=True):
            count = rows_to_keep(active, group.capacity, self._tuning.finished_share, self._tuning.row_multiple)
            if count < group.num_rows:
                group.keep(count)

    def _in_use(self) -> list[RowGroup]:
        return [group for group in self._groups if group.num_rows > 0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """What the groups have, behind each other; without a copy where there is one group."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
