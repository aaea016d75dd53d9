import math

import pytest
import torch

from rlhf_cli.ops.masks import is_contiguous, is_eos, is_last_true, last_true, masked_sum, zero_outside

NAN = float("nan")


def test_masked_sum_by_hand_and_over_another_dimension():
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    mask = torch.tensor([[True, False, True], [False, True, True]])
    assert masked_sum(values, mask).tolist() == [5.0, 48.0]
    assert masked_sum(values, mask, dim=0).tolist() == [1.0, 16.0, 36.0]


def test_with_everything_counted_it_is_the_sum():
    values = torch.arange(12.0).view(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert torch.equal(masked_sum(values, mask), values.sum(-1))


def test_nothing_counted_is_zero():
    values, mask = torch.tensor([[1.0, NAN]]), torch.zeros(1, 2, dtype=torch.bool)
    assert masked_sum(values, mask).tolist() == [0.0]


@pytest.mark.parametrize("hidden", [NAN, math.inf, -math.inf])
def test_what_is_masked_out_may_be_anything_forward_and_backward(hidden):
    values = torch.tensor([[1.0, 2.0, hidden], [hidden, 3.0, hidden]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    total = masked_sum(values, mask)
    assert total.tolist() == [3.0, 3.0]
    total.sum().backward()
    assert torch.equal(values.grad, mask.float())


def test_eos_is_any_of_several_and_none_is_possible():
    ids = torch.tensor([[4, 7, 9, 4]])
    assert is_eos(ids, [7]).tolist() == [[False, True, False, False]]
    assert is_eos(ids, [9, 4]).tolist() == [[True, False, True, True]]
    assert is_eos(ids, []).tolist() == [[False] * 4]
    assert is_eos(ids, [7]).dtype == torch.bool


def test_last_true_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, True], [True, False, False], [False, True, False]])
    assert last_true(mask).tolist() == [1, 2, 0, 1]


def test_last_true_refuses_a_row_without_a_token():
    with pytest.raises(AssertionError):
        last_true(torch.tensor([[True, False], [False, False]]))


def test_is_last_true_by_hand_and_its_agreement_with_the_index():
    mask = torch.tensor([[True, True, False], [True, False, True], [False, True, False], [False, False, False]])
    expected = [[False, True, False], [False, False, True], [False, True, False], [False, False, False]]
    assert is_last_true(mask).tolist() == expected
    assert is_last_true(mask[:3]).int().argmax(-1).tolist() == last_true(mask[:3]).tolist()


def test_only_a_gap_breaks_a_mask():
    for row in ([True, True, False], [False, True, True], [False, True, False], [False, False, False], [True] * 3):
        assert is_contiguous(torch.tensor([row]))
    assert not is_contiguous(torch.tensor([[True, False, True]]))
    assert not is_contiguous(torch.tensor([[True, True, True, True], [True, False, False, True]]))


def test_zero_outside_cuts_values_and_gradients():
    values = torch.tensor([1.0, NAN, math.inf], requires_grad=True)
    kept = zero_outside(values, torch.tensor([True, False, False]))
    assert kept.tolist() == [1.0, 0.0, 0.0]
    kept.sum().backward()
    assert values.grad.tolist() == [1.0, 0.0, 0.0]
