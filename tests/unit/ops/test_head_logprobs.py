"""Log-probs of tokens from hidden states, block by block, and their gradient."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rlhf_cli.ops import head_logprobs as module
from rlhf_cli.ops.head_logprobs import head_logprobs
from rlhf_cli.ops.logprobs import row_logprobs

C, H, V = 13, 6, 11
NEVER = torch.tensor([2, 7])


def inputs(bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(size, generator=generator) for size in ((C, H), (V, H), (V,)))
    targets = torch.randint(V, (C,), generator=generator)
    targets[torch.isin(targets, NEVER)] = 0
    return hidden, weight, offset if bias else None, targets


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, never: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, weight, bias)
    if never is not None:
        logits = logits.index_fill(-1, never, -1e4)
    logprob, entropy = row_logprobs(logits, targets, temperature, True)
    assert entropy is not None
    return logprob, entropy


@pytest.fixture(params=["all kept", "computed again", "in blocks", "in blocks, computed again"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many probabilities are kept for the gradient, and how large a block is."""
    if "again" in request.param:
        monkeypatch.setattr(module, "KEPT", 0)
    if "blocks" in request.param:
        monkeypatch.setattr(module, "_BLOCK", {"cpu": 4 * V})
        monkeypatch.setattr(module, "_LEAST_ROWS", 1)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("never", [None, NEVER])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_plain_form(
    temperature: float, bias: bool, never: Tensor | None
) -> None:
    hidden, weight, offset, targets = inputs(bias)
    weights = torch.linspace(-1, 2, C)
    results = []
    for function in (plain, head_logprobs):
        leaves = [one.clone().requires_grad_() for one in (hidden, weight, offset) if one is not None]
        logprob, entropy = function(leaves[0], leaves[1], leaves[2] if bias else None, targets, temperature, never)
        assert (entropy is not None and not entropy.requires_grad) or function is plain
        (logprob * weights).sum().backward()
        results.append([logprob.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("way")
def test_what_is_frozen_has_no_gradient_and_costs_none() -> None:
    hidden, weight, offset, targets = inputs()
    hidden.requires_grad_()
    head_logprobs(hidden, weight, offset, targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        logprob, entropy = head_logprobs(hidden, weight, offset, targets, with_entropy=False)
    assert entropy is None and not logprob.requires_grad
    torch.testing.assert_close(logprob, plain(hidden.detach(), weight, offset, targets, 1.0, None)[0])


@pytest.mark.usefixtures("way")
def test_under_autocast_it_is_as_close_to_float32_as_autocast_is() -> None:
    hidden, weight, offset, targets = inputs()
    exact, _ = plain(hidden, weight, offset, targets, 1.0, None)
    leaves = [one.clone().requires_grad_() for one in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, _ = plain(hidden, weight, offset, targets, 1.0, None)
        logprob, _ = head_logprobs(leaves[0], leaves[1], offset, targets)
    assert logprob.dtype is torch.float32
    assert 0 < float((logprob - exact).abs().max()) <= 1.5 * float((rough - exact).abs().max())
    logprob.sum().backward()
    truth = [one.clone().requires_grad_() for one in (hidden, weight)]
    plain(truth[0], truth[1], offset, targets, 1.0, None)[0].sum().backward()
    for leaf, wanted in zip(leaves, truth, strict=True):
        assert leaf.grad is not None and wanted.grad is not None and leaf.grad.dtype is torch.float32
        assert float((leaf.grad - wanted.grad).norm() / wanted.grad.norm()) < 0.02


@pytest.mark.usefixtures("way")
def test_only_the_products_of_the_output_layer_are_rounded_under_autocast() -> None:
    hidden, weight, offset, targets = inputs()
    rounded = [one.bfloat16() for one in (hidden, weight, offset)]
    logits = functional.linear(*rounded).float().log_softmax(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, entropy = head_logprobs(hidden, weight, offset, targets)
    torch.testing.assert_close(logprob, logits.gather(-1, targets[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, -(logits.exp() * logits).sum(-1), atol=1e-4, rtol=0)


def test_no_tokens() -> None:
    hidden, weight, _, _ = inputs()
    weight.requires_grad_()
    logprob, entropy = head_logprobs(hidden[:0], weight, None, torch.empty(0, dtype=torch.long))
    assert logprob.shape == (0,) and entropy is not None and entropy.shape == (0,)
    logprob.sum().backward()
    assert weight.grad is not None and float(weight.grad.abs().sum()) == 0.0


def test_a_backward_pass_can_be_asked_for_once() -> None:
    hidden, weight, _, targets = inputs()
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = head_logprobs(hidden, weight, None, targets)[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_takes_one_block_and_one_gradient_beside_the_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "scripts" / "benchmarks"))
    allocated_bytes = importlib.import_module("memory").allocated_bytes
    monkeypatch.setattr(module, "KEPT", 0)
    count, size, width = 300, 20_000, 64
    weight = torch.randn(size, width).requires_grad_()
    hidden, targets = torch.randn(count, width), torch.randint(size, (count,))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            head_logprobs(hidden, weight, None, targets, with_entropy=False)[0].sum().backward()

    step()
    weight.grad = None
    block = 4 * module._LEAST_ROWS * size
    matrix = 4 * size * width
    # In bf16: logits and d_logits in that precision as well, the weight's copy, and the product before it is added
    lower = 0 if dtype is torch.float32 else block // 2 + matrix
    assert matrix + block < allocated_bytes(step) < 1.05 * (matrix + block + lower)


@pytest.mark.parametrize(("size", "rows"), [(1 << 20, 128), (50_257, 128), (8_192, 128), (2_048, 512)])
def test_a_block_is_never_so_small_that_reading_the_weight_is_most_of_it(size: int, rows: int) -> None:
    first = module._blocks(10_000, size, torch.device("cpu"))[0]
    assert first == slice(0, rows)
