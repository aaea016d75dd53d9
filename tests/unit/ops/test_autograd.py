import torch

from rlhf_cli.ops.autograd import taken


def test_a_selection_and_its_gradient():
    values = torch.randn(3, 2, requires_grad=True)
    index, inverse = (
        torch.tensor([2, 0, 0, 1]),
        torch.tensor([1, 3, 0]),
    )  # place 2 repeats row 0, and nobody reads it
    weights = torch.tensor([[1.0], [2.0], [0.0], [3.0]])
    (taken(values, index, inverse) * weights).sum().backward()
    found, values.grad = values.grad, None
    (values[index] * weights).sum().backward()
    assert torch.equal(found, values.grad)


def test_rows_without_a_place_have_no_gradient():
    values = torch.randn(3, 2, requires_grad=True)
    keep = torch.tensor([[True], [False], [True]])
    # row 1 is not taken; its inverse points anywhere
    (
        taken(values, torch.tensor([2, 0]), torch.tensor([1, 0, 0]), keep) * torch.tensor([[5.0], [7.0]])
    ).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[7.0, 7.0], [0.0, 0.0], [5.0, 5.0]]
