from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from rlhf_cli.ops.output_layer import output_logits


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_linear_layer_and_can_be_written_to(
    rows: int, bias: bool, dtype: torch.dtype
) -> None:
    states, weight, offset = (torch.randn(size).to(dtype) for size in ((rows, 8), (1000, 8), (1000,)))
    before = [one.clone() for one in (states, weight, offset)]
    found = output_logits(states, weight, offset if bias else None)
    wanted = functional.linear(states, weight, offset if bias else None)
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found.fill_(7.0)
    assert all(torch.equal(one, old) for one, old in zip((states, weight, offset), before, strict=True))


def test_autocast_decides_as_it_does_for_the_linear_layer() -> None:
    states, weight = torch.randn(4, 8), torch.randn(100, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = output_logits(states, weight, None), functional.linear(states, weight)
    assert found.dtype is torch.bfloat16 and torch.equal(found, wanted)


def test_gradients_are_those_of_the_linear_layer() -> None:
    leaves = [torch.randn(size).requires_grad_() for size in ((4, 8), (100, 8), (100,))]
    scale = torch.randn(4, 100)
    grads = [
        torch.autograd.grad((function(*leaves) * scale).sum(), leaves)
        for function in (output_logits, functional.linear)
    ]
    for found, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(found, wanted)
