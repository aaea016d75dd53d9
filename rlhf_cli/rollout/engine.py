"""Prompts to completions: prefill once per prompt, one cache row per sample, finished rows leave the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.data.tokenise import collate
from rlhf_cli.errors import bad_value
from rlhf_cli.models.loading import eos_ids
from rlhf_cli.models.positions import max_positions, token_positions
from rlhf_cli.ops.masks import is_eos
from rlhf_cli.ops.sampling import sample_token
from rlhf_cli.rollout.noise import uniform_noise
from rlhf_cli.types import PromptBatch, Rollout

# Finished rows are dropped when they are this share of the batch: copying the cache costs about one decode step.
_COMPACT_SHARE = 0.2


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    max_rows: int = 512  # rows decoded together
    top_k: int | None = None  # tokens that are drawn from: see `ops.sampling.truncated_logits`
    top_p: float | None = None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: PromptBatch,
    samples_per_prompt: int,
    sampling: Sampling,
    seed: int,
    step: int,
) -> Rollout:
    """Samples k completions per prompt.

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
    _check_room(model, batch, sampling)
    k = samples_per_prompt
    stop_ids = eos_ids(model, tokenizer)
    per_chunk = max(1, sampling.max_rows // k)
    tokens: list[list[int]] = []
    logprobs: list[Tensor] = []
    for start in range(0, len(batch.ids), per_chunk):
        stop = start + per_chunk
        index = [i for i in batch.index[start:stop] for _ in range(k)]
        sample = list(range(k)) * len(batch.ids[start:stop])
        noise = torch.from_numpy(uniform_noise(seed, step, index, sample, sampling.max_new_tokens))
        chunk, logprob = _decode(model, tokenizer, batch.ids[start:stop], k, sampling, noise, stop_ids)
        tokens.extend(chunk)
        logprobs.append(logprob)
    stop_set = set(stop_ids)
    finished = [bool(row) and row[-1] in stop_set for row in tokens]
    texts = tokenizer.batch_decode(
        [row[:-1] if done else row for row, done in zip(tokens, finished, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,  # the text is scored: it has to be what the tokens say
    )
    prompt_ids = [list(ids) for ids in batch.ids for _ in range(k)]
    pad_id = int(tokenizer.pad_token_id)
    return Rollout(
        sequences=collate(list(zip(prompt_ids, tokens, strict=True)), pad_id).to(model.device),
        prompts=tuple(prompt for prompt in batch.prompts for _ in range(k)),
        completions=tuple(texts),
        completion_ids=tuple(tuple(row) for row in tokens),
        prompt_index=torch.tensor(batch.index).repeat_interleave(k),
        sample_index=torch.arange(k).repeat(len(batch.ids)),
        truncated=torch.tensor([not done for done in finished]),
        sampled_logprob=torch.cat(logprobs).cpu(),
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


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: tuple[tuple[int, ...], ...],
    k: int,
    sampling: Sampling,
    noise: Tensor,
    stop_ids: tuple[int, ...],
) -> tuple[list[list[int]], Tensor]:
    """Decodes k rows for each prompt; returns their tokens (the EOS included) and summed log-probs."""
    device = model.device
    # Left padding puts every prompt's last token in the last column, where the first new token is predicted.
    prefix = collate([(list(ids), []) for ids in prompts], int(tokenizer.pad_token_id), side="left").to(device)
    attention = prefix.attention_mask.long()
    positions = token_positions(prefix.attention_mask)
    output = model(
        input_ids=prefix.ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=DynamicCache(config=model.config),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    cache.batch_repeat_interleave(k)
    logits = output.logits[:, -1].repeat_interleave(k, dim=0)
    attention = attention.repeat_interleave(k, dim=0)
    position = positions[:, -1].repeat_interleave(k, dim=0)
    noise = noise.to(device)

    num_rows = len(prompts) * k
    rows = torch.arange(num_rows, device=device)  # which result row each row of the batch belongs to
    active = torch.ones(num_rows, dtype=torch.bool, device=device)
    result = torch.zeros((num_rows, sampling.max_new_tokens), dtype=torch.long, device=device)
    lengths = torch.zeros(num_rows, dtype=torch.long, device=device)
    logprob_sum = torch.zeros(num_rows, device=device)
    for column in range(sampling.max_new_tokens):
        ids, logprob = sample_token(
            logits, noise[rows, column], sampling.temperature, sampling.top_k, sampling.top_p
        )
        result[rows[active], column] = ids[active]
        lengths[rows[active]] = column + 1
        logprob_sum[rows[active]] += logprob[active]
        active = active & ~is_eos(ids, stop_ids)
        num_active = int(active.sum())
        if num_active == 0 or column + 1 == sampling.max_new_tokens:
            break
        position = position + 1
        attention = torch.cat([attention, attention.new_ones((len(rows), 1))], dim=1)
        if num_active <= (1 - _COMPACT_SHARE) * len(rows):
            keep = active.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, ids, position, attention = rows[keep], ids[keep], position[keep], attention[keep]
            active = active[keep]
        output = model(
            input_ids=ids[:, None],
            attention_mask=attention,
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    return [row[:length] for row, length in zip(result.tolist(), lengths.tolist(), strict=True)], logprob_sum
