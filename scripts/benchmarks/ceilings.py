"""What the machine can do, and what the work needs: matrix products and copies measured, FLOPs and bytes counted.

FLOPs are those that the work cannot do without, whatever a program computes beside them: 2 per weight of a matrix and
token in a forward pass, three times that where a backward pass follows. A prompt counts once, however many completions
follow it. Embedding look-ups, attention scores (short rows: a few percent), softmax and padding count nothing. The
output matrix counts where a token is predicted. An RLOO step needs: the prompts once, every new token once while
sampling; all tokens through the reward model and the reference; a training pass. (A second log-prob pass of the policy
is not needed: it samples and learns as one distribution.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from turns import Clock, times
from workload import Sizes, make_pairs, make_prompts


def matmul_gflops(device: torch.device, dtype: torch.dtype, clock: Clock, size: int, runs: int) -> float:
    """Of the product of two square matrices, smaller ones where it would take a CPU more than a second; the fastest."""
    while device.type == "cpu" and size > 256 and 2 * size**3 / 1e9 > max(0.1, _rate(device, dtype, clock, 256)):
        size //= 2
    return max(_rate(device, dtype, clock, size) for _ in range(runs))


def _rate(device: torch.device, dtype: torch.dtype, clock: Clock, size: int) -> float:
    """1e9 FLOP/s of one product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(times(lambda: a @ b, clock, 1, 2)) / 1e9


def copy_gb_per_s(device: torch.device, clock: Clock, num_bytes: int, runs: int) -> float:
    """Bytes read and bytes written, in 1e9 per second; the fastest run."""
    source = torch.zeros(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(times(lambda: target.copy_(source), clock, 2, runs)) / 1e9


def measure_ceilings(device: torch.device, clock: Clock, is_quick: bool) -> dict[str, float]:
    """Both, in the precisions that are trained in."""
    is_cuda = device.type == "cuda"
    size = 128 if is_quick else 8192 if is_cuda else 1024
    num_bytes = 2**22 if is_quick else 2**30 if is_cuda else 2**28
    runs = 2 if is_quick else 4
    return {
        "matmul_fp32_gflops": matmul_gflops(device, torch.float32, clock, size, runs),
        "matmul_bf16_gflops": matmul_gflops(device, torch.bfloat16, clock, size, runs),
        "matmul_largest_size": size,
        "copy_gb_per_s": copy_gb_per_s(device, clock, num_bytes, runs),
        "copy_bytes": num_bytes,
    }


@dataclass(frozen=True)
class Matrices:
    """Weights that a token is multiplied with."""

    body: int  # of all blocks
    head: int  # of the output matrix

    @classmethod
    def of(cls, sizes: Sizes) -> Matrices:
        """Counted from the sizes.

        >>> Matrices.of(Sizes())
        Matrices(body=6291456, head=2097152)
        """
        width = sizes.hidden_size
        kv = width * sizes.num_kv_heads // sizes.num_heads
        block = 2 * width * width + 2 * width * kv + 3 * width * sizes.intermediate_size
        return cls(sizes.num_layers * block, sizes.vocab_size * width)

    def forward(self, tokens: int, predicted: int) -> float:
        """FLOPs of a forward pass over `tokens`, of which `predicted` give logits."""
        return 2.0 * (self.body * tokens + self.head * predicted)


def flops_of(case: str, sizes: Sizes) -> float:
    """Model FLOPs of a step or of a rollout; see above."""
    matrices = Matrices.of(sizes)
    if case in ("rloo_step", "generate", "decode_long_prompt"):
        prompt = sum(len(ids) for ids in make_prompts(sizes))
        new = sizes.num_prompts * sizes.k * sizes.new_tokens
        rollout = matrices.forward(prompt + new, new)
        if case != "rloo_step":
            return rollout
        return rollout + matrices.forward(prompt + new, 0) + 4 * matrices.forward(prompt + new, new)
    pairs = make_pairs(sizes)
    predicted = sum(len(completion) for pair in pairs for _, completion in pair)
    tokens = predicted + sum(len(prompt) for (prompt, _), _ in pairs)
    if case == "rm_step":
        return 3 * matrices.forward(tokens, 0)
    passes = 3 if case == "dpo_step_precomputed" else 4
    return passes * matrices.forward(tokens, predicted)


def tokens_of(case: str, sizes: Sizes) -> int:
    """Prompt and completion tokens that a step learns from; of a rollout its new tokens."""
    new = sizes.num_prompts * sizes.k * sizes.new_tokens
    if case in ("generate", "decode_long_prompt"):
        return new
    if case == "rloo_step":
        return sizes.k * sum(len(ids) for ids in make_prompts(sizes)) + new
    return sum(len(prompt) + len(completion) for pair in make_pairs(sizes) for prompt, completion in pair)


def decode_step(
    sizes: Sizes, roll_out: Callable[[int], Callable[[], object]], clock: Clock, runs: int, copy_gb: float
) -> dict[str, float]:
    """One decode step against the time that its bytes take at the copy bandwidth.

    The step's time is the difference of rollouts of two lengths. Bytes: the matrices in bf16, and keys and values of
    the mean length in bf16, all read once.

    Args:
        sizes: of model and batch.
        roll_out: a rollout of so many new tokens.
        clock: seconds.
        runs: of each length.
        copy_gb: the ceiling, 1e9 bytes per second.
    """
    long, short = sizes.new_tokens, max(1, sizes.new_tokens // 2)
    medians = [statistics.median(times(roll_out(length), clock, 1, runs)) for length in (long, short)]
    step_s = (medians[0] - medians[1]) / max(1, long - short)
    matrices = Matrices.of(sizes)
    prompt = sum(len(ids) for ids in make_prompts(sizes)) / sizes.num_prompts
    kv_width = sizes.hidden_size * sizes.num_kv_heads // sizes.num_heads
    cached = sizes.num_prompts * sizes.k * (prompt + (long + short) / 2)
    num_bytes = 2.0 * (matrices.body + matrices.head) + 2.0 * 2 * sizes.num_layers * kv_width * cached
    needed_s = num_bytes / (copy_gb * 1e9)
    return {"step_s": step_s, "bytes": num_bytes, "at_copy_bandwidth_s": needed_s, "ratio": step_s / needed_s}
