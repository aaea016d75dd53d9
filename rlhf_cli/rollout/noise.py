"""Sampling noise as a pure function of (seed, step, prompt, sample, position).

A counter-based generator (Philox, Salmon et al. 2011, as numpy ships it) is set up for each row, so no draw
depends on how many were made before it: micro-batches, the order of rows, finished rows leaving the batch, the number
of processes and a resumed run all see the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Keeps rollout noise apart from any other use of the same seed.
_DOMAIN = 0x526F_6C6C_6F75_7400


def uniform_noise(
    seed: int, step: int, prompt_index: Sequence[int], sample_index: Sequence[int], num_positions: int
) -> NDArray[np.float32]:
    """Uniform numbers for every row and position.

    Args:
        seed: of the run, >= 0.
        step: the rollout's number, >= 0.
        prompt_index: N row numbers in the data.
        sample_index: N sample numbers, 0..k-1.
        num_positions: T. A longer request starts with the numbers of a shorter one.

    Returns:
        float32 [N, T] in [0, 1).
    """
    noise = np.empty((len(prompt_index), num_positions), dtype=np.float32)
    key = np.array([seed, _DOMAIN], dtype=np.uint64)
    for row, (prompt, sample) in enumerate(zip(prompt_index, sample_index, strict=True)):
        # The lowest counter word is left to the positions: Philox adds one to it per four numbers.
        counter = np.array([0, sample, prompt, step], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
        noise[row] = generator.random(num_positions, dtype=np.float32)
    return noise
