"""Top-k and top-p: which tokens stay, against transformers, and what is drawn and reported then."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlhf_cli.ops.sampling import sample_token, truncated_logits

INF = math.inf
# 99.9% quantile of chi-square with 2 degrees of freedom: a right sampler stays below it 999 seeds in 1000
CHI_SQUARE_999_2 = 13.816
PROBABILITY = [0.4, 0.0, 0.25, 0.2, 0.1, 0.04, 0.01]
LARGEST_UNIFORM = 1 - 2**-24


def logits_of(probability):
    return torch.log(torch.tensor([probability]))


def kept(logits, top_k=None, top_p=None):
    """The ids that stay, of one row."""
    return (truncated_logits(logits, top_k, top_p)[0] > -INF).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (1, None, [0]),
        (3, None, [0, 2, 3]),
        (6, None, [0, 2, 3, 4, 5, 6]),
        (None, 0.39, [0]),
        (None, 0.41, [0, 2]),
        (None, 0.64, [0, 2]),
        (None, 0.66, [0, 2, 3]),
        (None, 0.98, [0, 2, 3, 4, 5]),
        (None, 1e-9, [0]),
        # of the three that top-k leaves, the first has 0.4/0.85 = 0.47 and the first two have 0.76
        (3, 0.46, [0]),
        (3, 0.48, [0, 2]),
        (3, 0.75, [0, 2]),
        (3, 0.77, [0, 2, 3]),
    ],
)
def test_what_stays_by_hand(top_k, top_p, expected):
    logits = logits_of(PROBABILITY)
    assert kept(logits, top_k, top_p) == expected
    cut = truncated_logits(logits, top_k, top_p)
    assert torch.equal(cut[0, expected], logits[0, expected])


ROWS = st.lists(
    # few values, so that there are ties, and any values
    st.one_of(st.sampled_from([-2.0, 0.0, 0.5, 3.0]), st.floats(-20, 20, width=32)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    row=ROWS,
    top_k=st.none() | st.integers(1, 14),
    top_p=st.none() | st.floats(1e-6, 1.0),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
)
def test_it_is_what_transformers_does(row, top_k, top_p, temperature):
    logits = torch.tensor([row, row[::-1]])
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        theirs.append(TopPLogitsWarper(top_p))
    expected = theirs(torch.zeros(2, 1, dtype=torch.long), logits)
    assert torch.equal(truncated_logits(logits / temperature, top_k, top_p), expected)
    uniform = torch.tensor([0.2, 0.9])
    ids, logprob = sample_token(logits, uniform, temperature, top_k, top_p)
    reported = torch.log_softmax(expected, -1).gather(1, ids[:, None])[:, 0]
    assert torch.allclose(logprob, reported, atol=2e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (7, None), (9, 1.0), (None, 1.0)])
def test_a_cut_of_nothing_changes_nothing_and_costs_nothing(top_k, top_p):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(5, generator=torch.Generator().manual_seed(1))
    assert truncated_logits(logits, top_k, top_p) is logits
    ids, logprob = sample_token(logits, uniform, 0.7, top_k, top_p)
    plain = sample_token(logits, uniform, 0.7)
    assert torch.equal(ids, plain[0]) and torch.equal(logprob, plain[1])


def test_the_same_noise_gives_the_same_token_where_what_is_cut_does_not_matter():
    """The tail is 1e-6 of the mass: sorted by probability, most rows would get another token."""
    generator = torch.Generator().manual_seed(0)
    logits, uniform = torch.randn(500, 40, generator=generator), torch.rand(500, generator=generator)
    logits[:, ::2] -= 20
    cut, _ = sample_token(logits, uniform, top_k=20)
    assert torch.equal(cut, sample_token(logits, uniform)[0])
    assert len(cut.unique()) == 20


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.8), (3, 0.9), (5, 0.85)])
def test_frequencies_are_the_probabilities_of_what_stays(top_k, top_p):
    count = 20_000
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(key=12)).random(count, dtype=np.float32))
    ids, logprob = sample_token(logits_of(PROBABILITY).expand(count, -1), uniform, 1.0, top_k, top_p)
    found = torch.bincount(ids, minlength=len(PROBABILITY)).tolist()
    assert sum(found) == found[0] + found[2] + found[3] == count
    expected = {i: count * PROBABILITY[i] / 0.85 for i in (0, 2, 3)}
    assert sum((found[i] - e) ** 2 / e for i, e in expected.items()) < CHI_SQUARE_999_2
    assert torch.allclose(logprob, torch.log(torch.tensor(PROBABILITY)[ids] / 0.85), atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.6, LARGEST_UNIFORM])
@pytest.mark.parametrize(("top_k", "top_p"), [(2, None), (None, 0.6), (40, 0.6), (2, 0.99)])
def test_a_token_that_was_cut_is_never_drawn(uniform, top_k, top_p):
    logits = 3 * torch.randn(64, 500, generator=torch.Generator().manual_seed(3))
    ids, logprob = sample_token(logits, torch.full((64,), uniform), 1.0, top_k, top_p)
    cut = truncated_logits(logits, top_k, top_p)
    assert (cut.gather(1, ids[:, None]) > -INF).all() and logprob.isfinite().all() and (logprob <= 0).all()
    for number in range(64):  # and none that is left less likely than one that was cut
        assert cut[number][cut[number] > -INF].min() > logits[number][cut[number] == -INF].max()


def test_an_id_that_has_no_token_is_not_drawn_where_k_is_more_than_there_are():
    logits = torch.tensor([[2.0, -1e4, 1.0, -1e4]]).expand(50, 4)  # as `models.vocabulary` takes ids out
    ids, _ = sample_token(logits, torch.arange(50) / 50, top_k=3)
    assert ids.unique().tolist() == [0, 2]


class TestEdges:
    def test_one_token_is_the_most_likely_and_certain(self):
        logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(4))
        uniform = torch.linspace(0, LARGEST_UNIFORM, 20)
        greedy, zero = sample_token(logits, uniform, temperature=0.0)
        for cut in ({"top_k": 1}, {"top_p": 1e-9}):
            ids, logprob = sample_token(logits, uniform, **cut)
            assert torch.equal(ids, greedy) and torch.equal(logprob, zero)
        assert torch.equal(sample_token(logits, uniform, 0.0, top_k=3, top_p=0.5)[0], greedy)

    def test_equals_of_the_last_one_stay_in_top_k(self):
        assert kept(torch.zeros(1, 5), top_k=2) == [0, 1, 2, 3, 4]
        assert kept(torch.tensor([[1.0, 0.0, 2.0, 1.0]]), top_k=2) == [0, 2, 3]

    def test_of_equals_top_p_keeps_as_many_as_it_needs(self):
        assert kept(torch.zeros(1, 5), top_p=0.5) == [2, 3, 4]
        assert kept(torch.zeros(1, 5), top_p=1e-9) == [4]

    def test_a_vocabulary_of_one(self):
        ids, logprob = sample_token(torch.tensor([[3.0]]), torch.tensor([0.5]), 1.0, 1, 0.1)
        assert ids.tolist() == [0] and logprob.tolist() == [0.0]

    def test_extreme_logits(self):
        logits = torch.tensor([[1e4, 9e3, -1e4, 1e4 - 1]])
        ids, logprob = sample_token(logits.expand(2, 4), torch.tensor([0.1, 0.9]), top_k=3, top_p=0.99)
        assert ids.tolist() == [0, 3]
        assert torch.allclose(logprob, torch.tensor([0.0, -1.0]) - math.log(1 + math.exp(-1)), atol=1e-6)


def test_the_gradient_is_that_of_the_tokens_that_stay():
    logits = logits_of([0.4, 0.3, 0.2, 0.1]).double().requires_grad_()
    torch.log_softmax(truncated_logits(logits, top_k=3), -1)[0, 0].backward()
    expected = torch.tensor([[1 - 4 / 9, -3 / 9, -2 / 9, 0.0]], dtype=torch.double)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_the_log_prob_of_a_large_vocabulary_counts_a_tail_of_rare_tokens():
    """Each of them is too rare for a float32 sum around 1 to feel it; together they have 0.4% of the probability."""
    logits = torch.full((1, 128_000), math.log(3e-8))
    logits[0, 0] = 0.0
    ids, logprob = sample_token(logits, torch.tensor([0.5]))
    assert ids.tolist() == [0]
    assert logprob.item() == pytest.approx(-math.log(1 + 127_999 * 3e-8), abs=1e-6)
