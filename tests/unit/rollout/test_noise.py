import itertools

import numpy as np
import pytest

from rlhf_cli.rollout.noise import uniform_noise

# 99.9% quantile of chi-square with 15 degrees of freedom
CHI_SQUARE_999_15 = 37.697


def test_rows_are_what_the_bare_counter_based_generator_gives():
    # float32 from the upper 24 bits of each half of a 64-bit word, the lower half first
    noise = uniform_noise(7, 3, [5, 2], [1, 0], 9)
    for row, (prompt, sample) in enumerate([(5, 1), (2, 0)]):
        words = np.random.Philox(key=[7, 0x526F_6C6C_6F75_7400], counter=[0, sample, prompt, 3]).random_raw(5)
        halves = [half for word in words.tolist() for half in (word & 0xFFFFFFFF, word >> 32)]
        assert noise[row].tolist() == [(half >> 8) / 2**24 for half in halves[:9]]


def test_a_longer_request_starts_with_the_shorter_one():
    long = uniform_noise(1, 2, [3, 4], [0, 1], 50)
    for length in (1, 2, 7, 49):
        assert np.array_equal(uniform_noise(1, 2, [3, 4], [0, 1], length), long[:, :length])


def test_a_row_does_not_depend_on_the_rows_around_it():
    prompts, samples = [3, 3, 9, 0], [0, 1, 0, 2]
    together = uniform_noise(1, 2, prompts, samples, 6)
    for row in range(4):
        assert np.array_equal(
            uniform_noise(1, 2, prompts[row : row + 1], samples[row : row + 1], 6)[0], together[row]
        )
    order = [2, 0, 3, 1]
    shuffled = uniform_noise(1, 2, [prompts[i] for i in order], [samples[i] for i in order], 6)
    assert np.array_equal(shuffled, together[order])


def test_calls_leave_nothing_behind():
    state = np.random.get_state()[1].copy()
    first = uniform_noise(1, 2, [3], [4], 5)
    assert np.array_equal(first, uniform_noise(1, 2, [3], [4], 5))
    assert np.array_equal(state, np.random.get_state()[1])


def test_every_argument_tells_rows_apart():
    calls = itertools.product((0, 1, 2**40), (0, 1, 2), (0, 1, 2), (0, 1, 2))
    rows = [uniform_noise(seed, step, [prompt], [sample], 4)[0] for seed, step, prompt, sample in calls]
    assert len({tuple(row) for row in rows}) == 81
    # no stream is another one some positions later
    numbers = np.concatenate([uniform_noise(0, step, [0, 1], [0, 1], 64).ravel() for step in range(4)])
    assert len(np.unique(numbers)) == numbers.size


def test_numbers_are_uniform_in_the_half_open_interval():
    noise = uniform_noise(0, 0, list(range(100)), [0] * 100, 200)
    assert noise.dtype == np.float32 and noise.shape == (100, 200)
    assert noise.min() >= 0.0 and noise.max() < 1.0
    counts = np.histogram(noise, bins=16, range=(0, 1))[0]
    assert ((counts - 1250) ** 2 / 1250).sum() < CHI_SQUARE_999_15
    # neither neighbouring positions nor neighbouring prompts go together; 5 standard errors of a correlation
    for a, b in ((noise[:, :-1], noise[:, 1:]), (noise[:-1], noise[1:])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / a.size**0.5


def test_prompts_and_samples_have_to_match():
    with pytest.raises(ValueError, match="shorter"):
        uniform_noise(0, 0, [1, 2], [0], 3)
