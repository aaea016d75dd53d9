"""Prompts to completions: prefill once per prompt, one cache row per sample, finished rows leave the batch."""

from __future__ import annotations

import functools
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import bad_value
from rlhf_cli.models.attention import takes_layouts
from rlhf_cli.models.causal import head_logits
from rlhf_cli.models.inference_copy import InferenceCopy, is_adapted
from rlhf_cli.models.loading import eos_ids
from rlhf_cli.models.packing import key_behind_the_head
from rlhf_cli.models.positions import max_positions
from rlhf_cli.models.vocabulary import tokens_only
from rlhf_cli.rollout.decoding import Decoding, DecodingShape, shape_of
from rlhf_cli.rollout.graphs import Capturing
from rlhf_cli.rollout.grouping import chunks, split_lengths
from rlhf_cli.rollout.noise import uniform_noise
from rlhf_cli.rollout.plain import decode_plain
from rlhf_cli.rollout.sampling import Sampling as Sampling  # importable from here too
from rlhf_cli.rollout.tuning import Tuning, tuning_for
from rlhf_cli.types import PromptBatch, Rollout

_log = logging.getLogger(__name__)

# Shapes whose cache and graphs are kept on a GPU, and the share of its memory that their caches may take between two
# rollouts, where a training step needs it, and beside a new one; on a CPU, where nothing is captured, none is kept.
_MAX_KEPT = 8
_KEPT_SHARE = 0.1


class Engine:
    """Samples from one model, whose weights may change between two rollouts.

    Under autocast, and where a LoRA adapter is in the model, it decodes with a copy (`InferenceCopy`) that is refreshed
    for each rollout. On a GPU, the cache and the graphs captured for it stay for the next rollout as well.
    """

    def __init__(self, model: PreTrainedModel, tuning: Tuning | None = None) -> None:
        """Where an argument does not say it.

        Args:
            model: causal language model in eval mode.
            tuning: sizes that change no token; None = what suits the model's device.
        """
        self._model = model
        self._tuning = tuning_for(model.device) if tuning is None else tuning
        self._copies: dict[torch.dtype | None, InferenceCopy] = {}
        self._kept: OrderedDict[DecodingShape, Decoding] = OrderedDict()
        self._capturing = Capturing(self._tuning.graphs and model.device.type == "cuda")
        self._addresses: tuple[int, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        """What it samples from."""
        return self._model

    @torch.no_grad()
    def generate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        samples_per_prompt: int,
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> Rollout:
        """Samples k completions per prompt; arguments, result and errors are those of `generate` below."""
        _check_room(self._model, batch, sampling)
        k = samples_per_prompt
        stop_ids = eos_ids(self._model, tokenizer)
        pad_id = int(tokenizer.pad_token_id)
        reason = why_plain(self._model)
        if reason is not None:
            _warn_once(f"{type(self._model).__name__} is decoded the slower way: {reason}")
        decoder = self._decoder() if reason is None else None
        tokens: list[list[int]] = []
        logprobs: list[Tensor] = []
        lengths = [len(ids) for ids in batch.ids]
        for part in chunks(lengths, k, sampling.max_new_tokens, sampling.max_rows, sampling.max_tokens):
            prompts = batch.ids[part]
            index = [i for i in batch.index[part] for _ in range(k)]
            sample = list(range(k)) * len(prompts)
            noise = torch.from_numpy(uniform_noise(seed, step, index, sample, sampling.max_new_tokens))
            if decoder is None:
                found = decode_plain(self._model, pad_id, prompts, k, sampling, noise, stop_ids)
            else:
                found = self._decode(decoder, prompts, k, sampling, noise, stop_ids)
            tokens.extend(found[0])
            logprobs.append(found[1].cpu())
        self._forget()
        return _rollout(self._model, tokenizer, batch, k, tokens, torch.cat(logprobs), stop_ids)

    def _decoder(self) -> PreTrainedModel:
        """What is decoded with: the model, or a copy with its present weights."""
        kind = self._model.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        decoder = self._model
        if dtype is not None or is_adapted(self._model):
            if dtype in self._copies:
                self._copies[dtype].refresh()
            else:
                self._copies[dtype] = InferenceCopy(self._model, dtype)
            decoder = self._copies[dtype].model
        addresses = tuple(tensor.data_ptr() for tensor in (*decoder.parameters(), *decoder.buffers()))
        if addresses != self._addresses:
            self._kept.clear()  # their graphs read the weights where these were
            self._addresses = addresses
        return decoder

    def _decode(
        self,
        decoder: PreTrainedModel,
        prompts: Sequence[tuple[int, ...]],
        k: int,
        sampling: Sampling,
        noise: Tensor,
        stop_ids: tuple[int, ...],
    ) -> tuple[list[list[int]], Tensor]:
        """Decodes k rows for each prompt; returns their tokens (the EOS included) and summed log-probs."""
        lengths = [len(ids) for ids in prompts]
        groups = split_lengths(lengths, self._tuning.group_bytes / _bytes_per_column(decoder, k))
        kind = decoder.device.type
        is_lower = kind != "cpu" and torch.is_autocast_enabled(kind)
        shape = shape_of(
            [[lengths[i] for i in group] for group in groups],
            k,
            sampling,
            stop_ids,
            torch.get_autocast_dtype(kind) if is_lower else torch.float32,
            self._tuning,
        )
        # Rows in the order of the groups, and back
        order = torch.tensor([i * k + sample for group in groups for i in group for sample in range(k)])
        with _casting_anew(kind), _any_kernels(kind):
            tokens, logprob = self._decoding(decoder, shape)(
                [[prompts[i] for i in group] for group in groups], noise[order]
            )
        back = order.argsort()
        rows = tokens.cpu()[back]
        ends = (rows >= 0).sum(-1).tolist()
        return [row[:end] for row, end in zip(rows.tolist(), ends, strict=True)], logprob.sum(-1).cpu()[back]

    def _decoding(self, decoder: PreTrainedModel, shape: DecodingShape) -> Decoding:
        """Memory of this shape: kept from an earlier rollout, or new."""
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        self._forget()  # before there is one more, so that two that are large are never there at once
        model, head = self._model, decoder.get_output_embeddings()
        made = Decoding(
            decoder,
            lambda hidden: tokens_only(model, head_logits(head, hidden)),
            shape,
            self._tuning,
            self._capturing,
        )
        if self._capturing.enabled:
            self._kept[shape] = made
        return made

    def _forget(self) -> None:
        """Lets go of the shapes that were not met for longest, where all of them are too much."""
        if not self._kept:
            return
        room = _KEPT_SHARE * torch.cuda.get_device_properties(self._model.device).total_memory
        while self._kept and (
            len(self._kept) > _MAX_KEPT or sum(one.cache_bytes() for one in self._kept.values()) > room
        ):
            self._kept.popitem(last=False)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    samples_per_prompt: int,
    sampling: Sampling,
    seed: int,
    step: int,
) -> Rollout:
    """Samples k completions per prompt, once; where that is done again and again, an `Engine` saves work.

    Args:
        model: causal language model in eval mode.
        tokenizer: its tokenizer.
        batch: P prompts.
        samples_per_prompt: k.
        sampling: temperature, lengths, rows at once.
        seed: of the run.
        step: number of the rollout. The noise of a token is a function of (seed, step, prompt index, sample,
            position) alone, see `rlhf_cli.rollout.noise`.

    Returns:
        P * k rows, prompt-major.

    Raises:
        RequestError: the longest prompt and the tokens asked for are more than the model has positions.
    """
    return Engine(model).generate(tokenizer, batch, samples_per_prompt, sampling, seed, step)


def why_plain(model: PreTrainedModel) -> str | None:
    """Why a model is decoded the plain way, in words; None where it need not be."""
    if not takes_layouts(model) or model.get_output_embeddings() is None:
        return "its attention cannot be told who sees whom"
    key = key_behind_the_head(model)
    return None if key is None else f"its logits are changed behind the output layer ({key})"


def _casting_anew(kind: str) -> AbstractContextManager[object]:
    """Autocast, where it is on, without its memory of casts: a graph would read such a tensor when it is gone."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)


@contextmanager
def _any_kernels(kind: str) -> Iterator[None]:
    """On a GPU, without torch's replacements for kernels whose result depends on an order of writes.

    Here no two writes of a kernel meet, so that every kernel is deterministic; the replacements sort the indices first.
    """
    is_on, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if kind == "cpu" or not is_on:
        yield
        return
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=only_warns)


@functools.lru_cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _bytes_per_column(model: PreTrainedModel, k: int) -> float:
    """Keys and values that a layer reads for one column of one prompt's samples, about."""
    config = model.config.get_text_config()
    num_heads = config.num_attention_heads
    num_key_heads = getattr(config, "num_key_value_heads", None) or num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    itemsize = 4 if model.device.type == "cpu" else 2
    return 2.0 * k * num_key_heads * size * itemsize


def _rollout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    k: int,
    tokens: Sequence[Sequence[int]],
    logprob: Tensor,
    stop_ids: tuple[int, ...],
) -> Rollout:
    stop_set = set(stop_ids)
    finished = [bool(row) and row[-1] in stop_set for row in tokens]
    texts = tokenizer.batch_decode(
        [list(row[:-1] if done else row) for row, done in zip(tokens, finished, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,  # the text is scored: it has to be what the tokens say
    )
    prompt_ids = [list(ids) for ids in batch.ids for _ in range(k)]
    pad_id = int(tokenizer.pad_token_id)
    rows = [(prompt, list(row)) for prompt, row in zip(prompt_ids, tokens, strict=True)]
    return Rollout(
        sequences=collate(rows, pad_id).to(model.device),
        prompts=tuple(prompt for prompt in batch.prompts for _ in range(k)),
        completions=tuple(texts),
        completion_ids=tuple(tuple(row) for row in tokens),
        prompt_index=torch.tensor(batch.index).repeat_interleave(k),
        sample_index=torch.arange(k).repeat(len(batch.ids)),
        truncated=torch.tensor([not done for done in finished]),
        sampled_logprob=logprob,
        samples_per_prompt=k,
        tokenizer=tokenizer,
    )


def _check_room(model: PreTrainedModel, batch: PromptBatch, sampling: Sampling) -> None:
    limit = max_positions(model)
    longest = max((len(ids) for ids in batch.ids), default=0)
    if limit is not None and longest + sampling.max_new_tokens > limit:
        raise bad_value(
            "rollout.max_new_tokens",
            sampling.max_new_tokens,
            f"at most {limit - longest}: the model has {limit} positions, and a prompt has {longest} tokens",
        )
