"""Randomness as a function of what it is for, never of what was drawn before.

Data order is a function of (seed, epoch), the rows of a step of (seed, step), dropout of (seed, step, rank).
A resumed run therefore has no generator state to restore. torch is imported only where it is needed, so that
the rest can be used without it.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from functools import lru_cache
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from rlhf_cli.errors import bad_value


def derive_seed(*parts: SupportsIndex | str) -> int:
    """A seed in [0, 2^63) that depends on every part, the same in every process and on every platform.

    The first 63 bits of SHA-256 over the parts as a JSON list, so ("a", 1), ("a", "1") and ("a1",) differ.
    """
    canonical = json.dumps([part if isinstance(part, str) else operator.index(part) for part in parts])
    return int.from_bytes(hashlib.sha256(canonical.encode("ascii")).digest()[:8], "big") >> 1


def seed_dropout(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators so that dropout is a function of (seed, step, rank); call once per step.

    Dropout is the one consumer of torch's global generators here: modules draw their masks from nowhere else.
    """
    import torch

    torch.manual_seed(derive_seed("dropout", seed, step, rank))


def epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """The order of `n` rows in an epoch: a permutation, int64 [n], read-only.

    Philox keyed by (seed, epoch) gives each row a random 64-bit number, and the rows are sorted by it. NumPy
    promises the bits of a bit generator over its versions, but not the algorithm of `Generator.permutation`.
    """
    return _epoch_order(seed, epoch, n)


@lru_cache(maxsize=4)  # a step needs the same one or two epochs as the step before
def _epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    assert epoch >= 0, f"epoch {epoch} is negative"
    assert n > 0, "no rows to order"
    key = np.array([derive_seed("epoch order", seed), epoch], dtype=np.uint64)
    draws = np.asarray(np.random.Philox(key=key).random_raw(n))
    order = np.argsort(draws, kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def batch_rows(seed: int, step: int, batch_size: int, n: int) -> npt.NDArray[np.int64]:
    """The rows of step `step` (0-based) of `n`, int64 [batch_size].

    All epochs are laid end to end, each shuffled by (seed, epoch), and cut into batches: every row comes once
    per epoch whatever the batch size, and a batch may straddle the border of two epochs (or span several).
    """
    return batch_places(seed, step, batch_size, n)[1]


def batch_places(
    seed: int, step: int, batch_size: int, n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """As `batch_rows`, with the epoch of each row before it: some data is drawn anew in each."""
    assert step >= 0, f"step {step} is negative"
    assert batch_size > 0, f"batch size {batch_size}"
    positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
    epochs = positions // n
    rows = np.empty(batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = epoch_order(seed, epoch, n)[positions[here] % n]
    return epochs, rows


def set_threads(n: int | None) -> int:
    """Let torch's operators use `n` threads on the CPU (None: as they are); the number that is then in force.

    The order of floating-point sums follows the thread count, so it belongs to what makes a run repeatable.
    Raises RequestError for a number below 1.
    """
    import torch

    if n is not None:
        if n < 1:
            raise bad_value("threads", n, "a number of threads, at least 1")
        torch.set_num_threads(n)
    return torch.get_num_threads()


def deterministic() -> None:
    """Choose deterministic kernels in torch; call before the first CUDA operation.

    On the CPU every operator used here has one, and one that has not raises RuntimeError. With CUDA such an
    operator only warns: results then repeat as far as the kernels allow, and a run does not die late for it.
    cuBLAS needs a fixed workspace (CUBLAS_WORKSPACE_CONFIG, set to :4096:8 unless the environment has it),
    and cuDNN must not choose kernels by timing. Nor does it do the attention: it plans anew for every shape, which
    takes longer than the attention itself, and rows without padding rarely have a shape twice. Filling fresh
    memory with nan, which torch would add, is left off: it costs bandwidth at every allocation and only matters to
    code that reads what it never wrote.
    """
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)
