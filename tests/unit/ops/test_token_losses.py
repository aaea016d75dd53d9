"""Losses over tokens; those over whole completions are in test_policy_losses."""

import math

import pytest
import torch

from rlhf_cli.ops.gae import generalised_advantages, returns_to_go, token_rewards
from rlhf_cli.ops.policy_losses import (
    clipped_ratio_loss,
    clipped_token_fraction,
    token_ratio,
    token_score_function_loss,
    value_loss,
)

NAN = float("nan")
MASK = torch.tensor(
    [
        [False, False, True, True, True, False],
        [True, False, False, False, False, False],  # EOS first
        [False, False, False, False, False, False],  # nothing counts
        [False, True, True, True, True, True],  # cut by the length limit
    ]
)
TOKENS = float(MASK.sum())


def _grid(seed, scale=1.0):
    """Random numbers on the tokens, NaN everywhere else."""
    numbers = scale * torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(MASK, numbers, torch.full_like(numbers, NAN))


def _leaf(grid):
    return grid.clone().requires_grad_()


def _gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


def _slow(term, normaliser, *grids):
    """Sum of a term over the tokens, in plain numbers."""
    rows, columns = MASK.shape
    places = [(row, t) for row in range(rows) for t in range(columns) if MASK[row, t]]
    return sum(term(*(grid[row, t].item() for grid in grids)) for row, t in places) / normaliser


def _slow_gradient(slow_loss, grid, step=1e-6):
    """Central differences on the tokens; 0 where nothing counts."""
    result = torch.zeros_like(grid)
    for row, t in MASK.nonzero().tolist():
        up, down = grid.clone(), grid.clone()
        up[row, t] += step
        down[row, t] -= step
        result[row, t] = (slow_loss(up) - slow_loss(down)) / (2 * step)
    return result


def _ppo_term(clip):
    def term(new, old, weight):
        ratio = math.exp(new - old)
        gain = ratio * weight
        if clip is not None:
            gain = min(gain, min(max(ratio, 1 - clip), 1 + clip) * weight)
        return -gain

    return term


def _value_term(clip):
    def term(value, old, target):
        errors = [(value - target) ** 2]
        if clip is not None:
            errors.append((min(max(value, old - clip), old + clip) - target) ** 2)
        return max(errors) / 2

    return term


# token_score_function_loss


def test_score_function_loss_by_hand_and_its_gradient():
    mask = torch.tensor([[False, True, True, False]])
    logprob = torch.tensor([[NAN, -1.0, -3.0, NAN]], requires_grad=True)
    loss = token_score_function_loss(logprob, torch.tensor([[NAN, 2.0, -0.5, NAN]]), mask, 4.0)
    assert loss.item() == (2.0 - 1.5) / 4
    assert _gradient(loss, logprob).tolist() == [[0.0, -0.5, 0.125, 0.0]]


def test_score_function_loss_equals_the_slow_one():
    logprob, advantage = _leaf(_grid(0)), _grid(1)
    loss = token_score_function_loss(logprob, advantage, MASK, 5.0)
    assert loss.item() == pytest.approx(_slow(lambda lp, a: -a * lp, 5.0, logprob, advantage))
    expected = torch.where(MASK, -advantage / 5.0, torch.zeros_like(advantage))
    assert torch.allclose(_gradient(loss, logprob), expected)


# clipped_ratio_loss


def test_ratio_loss_by_hand_with_its_gradient_and_fraction():
    ratio, mask = torch.tensor([[1.5, 0.5, 0.5, 1.5, 1.1, 9.0]]), torch.tensor([[True] * 5 + [False]])
    advantage = torch.tensor([[1.0, 1.0, -1.0, -1.0, 3.0, 9.0]])
    logprob = ratio.log().requires_grad_()
    loss = clipped_ratio_loss(logprob, torch.zeros(1, 6), advantage, mask, 10.0, clip=0.2)
    # 1.2 (cut), 0.5, -0.8 (cut), -1.5, 3.3
    assert loss.item() == pytest.approx(-(1.2 + 0.5 - 0.8 - 1.5 + 3.3) / 10)
    assert _gradient(loss, logprob)[0].tolist() == pytest.approx([0.0, -0.05, 0.0, 0.15, -0.33, 0.0])
    # 2 of the 5 tokens here; they are half of the step's
    assert clipped_token_fraction(ratio, advantage, mask, 10.0, 0.2).item() == pytest.approx(0.2)
    assert clipped_token_fraction(ratio, advantage, mask, 10.0, None).item() == 0.0


@pytest.mark.parametrize("clip", [None, 0.1, 0.3])
def test_ratio_loss_and_its_gradient_equal_a_slow_implementation(clip):
    logprob, old, advantage = _leaf(_grid(0, 0.5)), _grid(1, 0.5), _grid(2)
    loss = clipped_ratio_loss(logprob, old, advantage, MASK, TOKENS, clip)

    def slow(grid):
        return _slow(_ppo_term(clip), TOKENS, grid, old, advantage)

    assert loss.item() == pytest.approx(slow(logprob.detach()))
    gradient = _gradient(loss, logprob)
    assert torch.allclose(gradient, _slow_gradient(slow, logprob.detach()), atol=1e-7)
    ratio = token_ratio(logprob.detach(), old, MASK)
    num_cut = (gradient[MASK] == 0).sum().item()
    assert clipped_token_fraction(ratio, advantage, MASK, TOKENS, clip).item() == pytest.approx(num_cut / TOKENS)
    assert num_cut == 0 if clip is None else 0 < num_cut < TOKENS


@pytest.mark.parametrize("clip", [None, 0.2])
def test_at_ratio_one_the_gradient_is_that_of_vanilla_policy_gradient(clip):
    logprob, advantage = _leaf(_grid(0)), _grid(2)
    ratio = token_ratio(logprob, logprob, MASK)
    assert torch.equal(ratio, torch.ones_like(ratio))
    loss = clipped_ratio_loss(logprob, logprob.detach(), advantage, MASK, TOKENS, clip)
    assert loss.item() == pytest.approx(-advantage[MASK].sum().item() / TOKENS)
    vanilla = token_score_function_loss(logprob, advantage, MASK, TOKENS)
    assert torch.equal(_gradient(loss, logprob), _gradient(vanilla, logprob))


def test_ppo_with_lambda_one_and_no_clip_is_vanilla_policy_gradient_on_the_return():
    # from the reward on: the advantage of PPO through GAE, that of vanilla policy gradient through the return-to-go
    logprob, ref, value = _leaf(_grid(0)), _grid(1), _grid(2)
    paid = token_rewards(torch.tensor([1.0, -2.0, 5.0, 0.5], dtype=torch.float64), logprob - ref, MASK, 0.1)
    advantage, _ = generalised_advantages(paid, value, MASK, lam=1.0)
    ppo = clipped_ratio_loss(logprob, logprob.detach(), advantage, MASK, TOKENS, clip=None)
    vanilla = token_score_function_loss(logprob, returns_to_go(paid, MASK) - value, MASK, TOKENS)
    found, expected = _gradient(ppo, logprob), _gradient(vanilla, logprob)
    assert torch.allclose(found, expected, atol=1e-12) and expected.abs().max() > 0.1
    # with another lambda it is not
    other, _ = generalised_advantages(paid, value, MASK, lam=0.5)
    loss = clipped_ratio_loss(logprob, logprob.detach(), other, MASK, TOKENS, clip=None)
    assert not torch.allclose(_gradient(loss, logprob), expected, atol=1e-3)


# value_loss


def test_value_loss_by_hand_and_its_gradient():
    mask = torch.tensor([[True, True, True, False]])
    value = torch.tensor([[3.0, 3.0, 0.2, NAN]], requires_grad=True)
    target = torch.tensor([[4.0, 1.0, 1.0, NAN]])
    loss = value_loss(value, torch.zeros(1, 4), target, mask, 3.0, clip=0.5)
    # the edge 0.5 is further from 4 than 3 is; 3 is further from 1 than the edge; 0.2 is inside
    assert loss.item() == pytest.approx((3.5**2 + 2.0**2 + 0.8**2) / 2 / 3)
    assert _gradient(loss, value)[0].tolist() == pytest.approx([0.0, 2 / 3, -0.8 / 3, 0.0])


@pytest.mark.parametrize("clip", [None, 0.2, 0.6])
def test_value_loss_and_its_gradient_equal_a_slow_implementation(clip):
    value, old, target = _leaf(_grid(0)), _grid(1), _grid(2)
    loss = value_loss(value, old, target, MASK, 7.0, clip)

    def slow(grid):
        return _slow(_value_term(clip), 7.0, grid, old, target)

    assert loss.item() == pytest.approx(slow(value.detach()))
    assert torch.allclose(_gradient(loss, value), _slow_gradient(slow, value.detach()), atol=1e-7)


def test_a_wide_clip_and_the_old_value_itself_are_half_the_squared_error():
    value, old, target = _leaf(_grid(0)), _grid(1), _grid(2)
    plain = value_loss(value, old, target, MASK, TOKENS, None)
    error = (value - target)[MASK].square().sum() / (2 * TOKENS)
    assert plain.item() == pytest.approx(error.item())
    for clip, before in ((1e3, old), (0.1, value.detach())):
        clipped = value_loss(value, before, target, MASK, TOKENS, clip)
        assert clipped.item() == pytest.approx(plain.item())
        assert torch.allclose(_gradient(clipped, value), _gradient(plain, value))
        plain = value_loss(value, old, target, MASK, TOKENS, None)


# all of them


def _losses(logprob, other, third, mask, normaliser):
    return {
        "score function": token_score_function_loss(logprob, third, mask, normaliser),
        "ratio": clipped_ratio_loss(logprob, other, third, mask, normaliser, 0.2),
        "value": value_loss(logprob, other, third, mask, normaliser, 0.2),
    }


@pytest.mark.parametrize("name", ["score function", "ratio", "value"])
def test_what_is_masked_out_may_be_anything_and_has_no_gradient(name):
    leaf, other, third = _leaf(_grid(0)), _grid(1), _grid(2)
    gradient = _gradient(_losses(leaf, other, third, MASK, TOKENS)[name], leaf)
    assert gradient.isfinite().all() and gradient[~MASK].abs().sum() == 0 and gradient[MASK].abs().sum() > 0
    for hidden in (0.0, 1e9, math.inf):
        filled = [torch.where(MASK, grid, torch.full_like(grid, hidden)) for grid in (leaf.detach(), other, third)]
        filled[0].requires_grad_()
        assert torch.equal(gradient, _gradient(_losses(*filled, MASK, TOKENS)[name], filled[0]))


@pytest.mark.parametrize("name", ["score function", "ratio", "value"])
def test_padding_and_the_length_of_prompts_change_nothing(name):
    grids = [_leaf(_grid(0)), _grid(1), _grid(2)]
    loss = _losses(*grids, MASK, TOKENS)[name]
    # each row to the right by its number of columns, into a wider grid
    wide = torch.zeros(4, 11, dtype=torch.bool)
    for row, offset in enumerate((0, 5, 2, 3)):
        wide[row, offset : offset + 6] = MASK[row]
    moved = [
        torch.full(wide.shape, NAN, dtype=torch.float64).masked_scatter(wide, grid.detach()[MASK])
        for grid in grids
    ]
    moved[0].requires_grad_()
    moved_loss = _losses(*moved, wide, TOKENS)[name]
    assert moved_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(_gradient(moved_loss, moved[0])[wide], _gradient(loss, grids[0])[MASK])


@pytest.mark.parametrize("name", ["score function", "ratio", "value"])
def test_micro_batches_add_up_to_the_step(name):
    grids = [_grid(0), _grid(1), _grid(2)]
    whole = _losses(*grids, MASK, TOKENS)[name]
    parts = [_losses(*(grid[rows] for grid in grids), MASK[rows], TOKENS)[name] for rows in ([0, 2], [3], [1])]
    assert sum(part.item() for part in parts) == pytest.approx(whole.item())


@pytest.mark.parametrize("name", ["score function", "ratio", "value"])
def test_nothing_but_masked_rows_is_no_loss(name):
    leaf, nothing = _leaf(torch.full((2, 3), NAN)), torch.zeros(2, 3, dtype=torch.bool)
    loss = _losses(leaf, leaf.detach(), leaf.detach(), nothing, 1.0)[name]
    assert loss.item() == 0.0
    assert _gradient(loss, leaf).tolist() == [[0.0] * 3] * 2


def test_no_gradient_reaches_advantages_old_figures_and_targets():
    first, second, third = (torch.randn(MASK.shape, requires_grad=True) for _ in range(3))
    sum(_losses(first, second, third, MASK, TOKENS).values()).backward()
    assert second.grad is None and third.grad is None and first.grad is not None


def test_equal_advantages_of_zero_move_nothing():
    leaf, old, none = _leaf(_grid(0)), _grid(1), torch.zeros(MASK.shape, dtype=torch.float64)
    for loss in (
        token_score_function_loss(leaf, none, MASK, TOKENS),
        clipped_ratio_loss(leaf, old, none, MASK, TOKENS, 0.2),
    ):
        assert loss.item() == 0.0 and _gradient(loss, leaf).abs().sum() == 0
    assert clipped_token_fraction(token_ratio(leaf.detach(), old, MASK), none, MASK, TOKENS, 0.2).item() == 0.0
