"""Log-probs of tokens from hidden states: the output layer and the softmax, a block of tokens at a time.

    log pi(y_t) = z_t[y_t] - logsumexp(z_t),   z_t = (W h_t + b) / temperature
    d log pi(y_t) / d z_t = onehot(y_t) - softmax(z_t)

The logits of a batch, [tokens, V] in float32, would be its largest tensor, and passes over it the largest part of a
small model's step. Blocks that stay in the processor's cache cost a fraction of that. For the gradient the
probabilities are kept where all of them are few, in the precision of the matrix products; of many they are computed
again, block by block, so that no more than `KEPT` of them exist at any time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf_cli.ops.output_layer import output_logits

# Logits of a block: 4 MiB in float32 on a CPU, where they should stay in the cache; enough work for a GPU otherwise.
_BLOCK = {"cpu": 1 << 20}
_BLOCK_ELSEWHERE = 1 << 26

# Tokens of a block, at least: every block reads the whole weight, and of a large vocabulary that takes longer than its
# products do where the block is small.
_LEAST_ROWS = 128

# Probabilities that are kept for the gradient.
KEPT = 1 << 26

# The logit of an id that is never drawn. Finite, because in an entropy or a KL 0 * inf is no number; exp of it is 0 at
# every temperature below 100.
NEVER = -1e4


def head_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float = 1.0,
    never: Tensor | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of tokens, and the entropies of the distributions that they are from.

    Under autocast the products are computed as it would compute them; all else is float32.

    Args:
        hidden: [C, H], the states that predict the tokens.
        weight: [V, H], of the output layer.
        bias: [V] or None.
        targets: int64 [C], the tokens.
        temperature: > 0, what the logits are divided by.
        never: int64 ids whose probability is 0; None = no such id.
        with_entropy: whether entropies are asked for; they cost two passes over the logits.

    Returns:
        log-probs float32 [C], with the gradient to hidden states, weight and bias; entropies float32 [C], nats,
        without one, or None.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # Off, because it would compute the entropy's products in its precision, too: sums over the vocabulary
    with torch.autocast(device, enabled=False):
        logprob, entropy = _HeadLogprobs.apply(
            hidden, weight, bias, targets, temperature, never, with_entropy, dtype
        )
    return logprob, entropy if with_entropy else None


class _HeadLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        never: Tensor | None,
        with_entropy: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        count, size = len(hidden), len(weight)
        states, matrix, offset = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        logprob = torch.empty(count, device=hidden.device)
        normaliser = torch.empty(count, device=hidden.device)
        entropy = torch.zeros(count if with_entropy else 0, device=hidden.device)
        has_gradient = any(ctx.needs_input_grad[:3])
        kept: list[Tensor] | None = [] if has_gradient and count * size <= KEPT else None
        for block in _blocks(count, size, hidden.device):
            logits = _logits(states[block], matrix, offset, temperature, never)
            peak = logits.amax(dim=-1, keepdim=True)
            chosen = logits.gather(-1, targets[block, None])[:, 0]
            # in place, where nobody asks for the logits afterwards
            weight_of = (logits - peak if with_entropy else logits.sub_(peak)).exp_()
            total = weight_of.sum(-1)
            normaliser[block] = log_normaliser = peak[:, 0] + total.log()
            logprob[block] = chosen - log_normaliser
            if with_entropy:
                # H = log Z - E[logit]; needs no tensor of log-probabilities
                entropy[block] = log_normaliser - logits.mul_(weight_of).sum(-1) / total
            if kept is not None:
                kept.append(weight_of.div_(total[:, None]).to(dtype))
            del logits, weight_of  # or they would be there beside those of the next block
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, never, *(kept or ()))
        ctx.temperature, ctx.dtype, ctx.is_kept = temperature, dtype, kept is not None
        ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 5
        if gradient is None:
            return (None, None, None, *nothing)
        hidden, weight, bias, targets, normaliser, never, *kept = ctx.saved_tensors
        count, size, dtype = len(hidden), len(weight), ctx.dtype
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        states, matrix = hidden.to(dtype), weight.to(dtype)
        offset = None if bias is None else bias.to(dtype)
        scale = gradient / ctx.temperature
        d_hidden = torch.empty_like(hidden) if for_hidden else None
        d_weight = torch.zeros_like(weight) if for_weight else None
        d_bias = torch.zeros_like(bias) if for_bias else None
        for number, block in enumerate(_blocks(count, size, hidden.device)):
            if ctx.is_kept:  # in float32 it is these very numbers, in place
                d_logits = kept[number].float()
            else:
                d_logits = _logits(states[block], matrix, offset, ctx.temperature, never)
                d_logits.sub_(normaliser[block, None]).exp_()
            d_logits.mul_(-scale[block, None])
            # each row is one token's: no two of them meet in an entry
            d_logits.scatter_add_(-1, targets[block, None], scale[block, None])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
            d_logits = d_logits.to(dtype)
            if d_hidden is not None:
                d_hidden[block] = d_logits @ matrix
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, states[block])
            del d_logits
        return (d_hidden, d_weight, d_bias, *nothing)


def _blocks(count: int, size: int, device: torch.device) -> list[slice]:
    rows = max(_LEAST_ROWS, _BLOCK.get(device.type, _BLOCK_ELSEWHERE) // size)
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of the total; without a tensor of its size where the product has it, too."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _logits(
    states: Tensor, matrix: Tensor, offset: Tensor | None, temperature: float, never: Tensor | None
) -> Tensor:
    """Float32 [c, V], divided by the temperature."""
    logits = output_logits(states, matrix, offset).float()
    if never is not None:
        logits.index_fill_(-1, never, NEVER)
    return logits if temperature == 1.0 else logits.div_(temperature)
