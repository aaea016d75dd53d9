import math

import numpy as np
import pytest
import torch

from rlhf_cli.ops.sampling import inverse_cdf, never_falling, sample_token

LARGEST_UNIFORM = 1 - 2**-24  # the largest float32 below 1 that the noise takes
# 99.9% quantile of chi-square with 5 degrees of freedom: a right sampler stays below it 999 seeds in 1000
CHI_SQUARE_999_5 = 20.515
PROBABILITY = [0.4, 0.0, 0.25, 0.2, 0.1, 0.04, 0.01]


def test_inverse_cdf_by_hand():
    probability = torch.tensor([[0.5, 0.25, 0.25]])
    uniform = [0.0, 0.49, 0.5, 0.74, 0.75, 0.99]
    picked, total = inverse_cdf(probability.expand(6, 3), torch.tensor(uniform))
    assert picked.tolist() == [0, 0, 1, 1, 2, 2]
    assert picked.dtype == torch.int64
    assert total.tolist() == [1.0] * 6
    twice, total = inverse_cdf(2 * probability.expand(6, 3), torch.tensor(uniform))
    assert torch.equal(twice, picked) and total.tolist() == [2.0] * 6


def test_evenly_spaced_numbers_hit_every_token_as_often_as_its_probability_says():
    count = 10_000
    uniform = (torch.arange(count) + 0.5) / count
    probability = torch.tensor(PROBABILITY).expand(count, -1)
    found = torch.bincount(inverse_cdf(probability, uniform)[0], minlength=len(PROBABILITY))
    assert (found - count * torch.tensor(PROBABILITY)).abs().max() <= 1  # an interval's ends are rounded


def test_frequencies_of_random_numbers_match_probabilities():
    count = 20_000
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=11)).random(count, dtype=np.float32))
    logits = torch.log(torch.tensor(PROBABILITY)).expand(count, -1)
    found = torch.bincount(sample_token(logits, uniform)[0], minlength=len(PROBABILITY)).tolist()
    assert found[1] == 0
    expected = [count * p for p in PROBABILITY]
    statistic = sum((o - e) ** 2 / e for o, e in zip(found, expected, strict=True) if e > 0)
    assert statistic < CHI_SQUARE_999_5


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 0.75, LARGEST_UNIFORM])
@pytest.mark.parametrize(
    "probability",
    [
        [0.0, 0.5, 0.0, 0.5, 0.0],
        [0.0, 0.0, 1.0, 0.0, 0.0],
        [0.3, 0.3, 0.3, 0.0, 0.0],  # a sum below 1
        [0.25, 0.0, 0.750001, 0.0, 0.0],  # and one above
    ],
)
def test_a_token_without_probability_is_never_drawn(probability, uniform):
    picked = int(inverse_cdf(torch.tensor([probability]), torch.tensor([uniform]))[0][0])
    assert probability[picked] > 0


def test_the_ends_of_the_interval_stay_inside_a_large_vocabulary():
    generator = torch.Generator().manual_seed(0)
    probability = torch.softmax(4 * torch.randn(64, 5000, generator=generator), -1)
    probability[:, :100] = 0.0
    probability[:, -100:] = 0.0
    for uniform in (0.0, LARGEST_UNIFORM):
        picked, _ = inverse_cdf(probability, torch.full((64,), uniform))
        assert (probability.gather(1, picked[:, None]) > 0).all()


def test_sums_that_were_rounded_apart_are_put_in_order():
    generator = torch.Generator().manual_seed(0)
    probability = torch.softmax(3 * torch.randn(32, 2000, generator=generator), -1)
    probability[:, ::3] = 0.0
    exact = probability.cumsum(-1)
    rounded = exact * (1 + 3e-7 * torch.randn(exact.shape, generator=generator))
    assert (rounded.diff(dim=-1) < 0).any() and (rounded.diff(dim=-1)[probability[:, 1:] == 0] > 0).any()
    repaired = never_falling(rounded, probability)
    steps = repaired.diff(dim=-1, prepend=torch.zeros(32, 1))
    assert (steps >= 0).all() and (steps[probability == 0] == 0).all()
    assert torch.allclose(repaired, exact, rtol=2e-6)
    assert torch.equal(never_falling(exact, probability), exact)  # the sums of the CPU need no repair


def test_greedy_takes_the_most_likely_whatever_the_noise():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    for uniform in (0.0, LARGEST_UNIFORM):
        ids, logprob = sample_token(logits, torch.full((2,), uniform), temperature=0.0)
        assert ids.tolist() == [1, 0]
        assert logprob.tolist() == [0.0, 0.0]
        assert torch.equal(sample_token(logits, torch.full((2,), uniform), temperature=1e-3)[0], ids)


@pytest.mark.parametrize(("temperature", "probability"), [(1.0, 0.9), (2.0, 0.75), (0.5, 81 / 82)])
def test_temperature_sets_the_distribution_that_is_drawn_from_and_reported(temperature, probability):
    logits = torch.tensor([[math.log(9), 0.0]]).expand(1000, 2)
    uniform = (torch.arange(1000) + 0.5) / 1000
    ids, logprob = sample_token(logits, uniform, temperature)
    assert abs(int((ids == 0).sum()) - 1000 * probability) <= 1
    expected = torch.where(ids == 0, math.log(probability), math.log(1 - probability))
    assert torch.allclose(logprob, expected, atol=1e-5)


def test_rows_are_independent():
    generator = torch.Generator().manual_seed(1)
    logits, uniform = torch.randn(6, 9, generator=generator), torch.rand(6, generator=generator)
    together = sample_token(logits, uniform)
    for row in range(6):
        alone = sample_token(logits[row : row + 1], uniform[row : row + 1])
        assert alone[0][0] == together[0][row]
        assert torch.allclose(alone[1][0], together[1][row], atol=1e-6)


def test_bf16_logits_are_drawn_from_in_float32():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(2)).bfloat16()
    uniform = torch.tensor([0.1, 0.4, 0.6, 0.9])
    ids, logprob = sample_token(logits, uniform)
    assert logprob.dtype == torch.float32
    assert torch.equal(ids, sample_token(logits.float(), uniform)[0])


@pytest.mark.parametrize("size", [1, 127, 128, 129, 255, 256, 1000])
def test_blocks_of_tokens_are_drawn_as_one_row_of_them(size):
    generator = torch.Generator().manual_seed(size)
    probability = torch.rand((200, size), generator=generator) ** 4
    probability[:, torch.rand(size, generator=generator) < 0.3] = 0.0
    probability[:, 130:400] = 0.0  # whole blocks of nothing
    probability[:, size // 2] += 0.1
    exact = probability.double().cumsum(-1)
    uniform = torch.linspace(0, LARGEST_UNIFORM, 200)
    number = uniform[:, None].double() * exact[:, -1:]
    picked, total = inverse_cdf(probability, uniform)
    torch.testing.assert_close(total.double(), exact[:, -1], rtol=1e-6, atol=0)
    assert (probability.gather(-1, picked[:, None]) > 0).all()
    slack = 1e-5 * exact[:, -1:]  # at an interval's end either of two tokens is right
    above = exact.gather(-1, picked[:, None])
    below = above - probability.gather(-1, picked[:, None])
    assert (number < above + slack).all() and (number > below - slack).all()
    different = picked != torch.searchsorted(exact, number, right=True)[:, 0]
    assert different.sum() <= 4


def test_log_probs_are_those_of_the_distribution_whatever_the_logits_size():
    logits = torch.tensor([[500.0, 499.0, -2000.0], [-90.0, -91.0, -1e4]])
    ids, logprob = sample_token(logits, torch.tensor([0.9, 0.1]), 0.5)
    assert ids.tolist() == [1, 0]
    assert logprob.tolist() == pytest.approx(
        torch.log_softmax(logits / 0.5, -1)[[0, 1], [1, 0]].tolist(), rel=1e-5
    )
    assert logits[0].tolist() == [500.0, 499.0, -2000.0]


def test_rounding_of_a_blocks_sum_draws_nothing_behind_its_last_possible_token():
    generator = torch.Generator().manual_seed(4)
    probability = torch.rand((4000, 128), generator=generator)
    probability[:, 100:] = 0.0
    picked, _ = inverse_cdf(probability, torch.full((4000,), LARGEST_UNIFORM))
    assert (picked < 100).all()


@pytest.mark.parametrize("num_tokens", [7, 300])
def test_weights_that_are_no_numbers_give_an_id_of_the_vocabulary(num_tokens):
    ids, logprob = sample_token(torch.full((2, num_tokens), math.nan), torch.tensor([0.0, 0.9]))
    assert bool((ids >= 0).all() and (ids < num_tokens).all()) and bool(logprob.isnan().all())
