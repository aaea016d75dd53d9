"""Decoding as transformers has it, for models that take no layout: padded prompts, a cache that grows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf_cli.data.tokenise import collate
from rlhf_cli.models.positions import token_positions
from rlhf_cli.ops.masks import is_eos
from rlhf_cli.ops.sampling import sample_token
from rlhf_cli.rollout.sampling import Sampling

# Finished rows are dropped when they are this share of the batch: copying the cache costs about one decode step.
_COMPACT_SHARE = 0.2


def decode_plain(
    model: PreTrainedModel,
    pad_id: int,
    prompts: tuple[tuple[int, ...], ...],
    k: int,
    sampling: Sampling,
    noise: Tensor,
    stop_ids: tuple[int, ...],
) -> tuple[list[list[int]], Tensor]:
    """Decodes k rows for each prompt; returns their tokens (the EOS included) and summed log-probs."""
    device = model.device
    # Left padding puts every prompt's last token in the last column, where the first new token is predicted.
    prefix = collate([(list(ids), []) for ids in prompts], pad_id, side="left").to(device)
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
