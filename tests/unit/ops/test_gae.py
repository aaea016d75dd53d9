import math

import pytest
import torch

from rlhf_cli.ops.gae import generalised_advantages, returns_to_go, token_rewards, whiten
from rlhf_cli.ops.kl import shaped_reward

NAN = float("nan")
BETA = 0.3
# (first column, number of tokens) of each row: prompts and completions of different lengths, the one-token completion
# (EOS first), one that fills the grid, one that ends in the last column, and a row without any token
SPANS = [(2, 4), (0, 1), (0, 9), (7, 2), (4, 0), (5, 1)]
WIDTH = 9


def _mask(spans, width):
    mask = torch.zeros(len(spans), width, dtype=torch.bool)
    for row, (first, count) in enumerate(spans):
        mask[row, first : first + count] = True
    return mask


def _grid(seed, mask):
    """Random numbers on the tokens, NaN everywhere else: what is masked out must not be looked at."""
    numbers = torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.where(mask, numbers, torch.full_like(numbers, NAN))


def _lists(grid, spans=SPANS):
    """The tokens of each row as plain numbers, without padding."""
    return [grid[row, first : first + count].tolist() for row, (first, count) in enumerate(spans)]


def _slow_token_rewards(reward, log_ratio, beta):
    rows = []
    for score, ratios in zip(reward, log_ratio, strict=True):
        row = [-beta * ratio for ratio in ratios]
        if row:
            row[-1] += score
        rows.append(row)
    return rows


def _slow_advantages(rewards, values, gamma, lam):
    """Every sum written out from the definition: O(T^2) per row."""
    rows = []
    for reward, value in zip(rewards, values, strict=True):
        length, row = len(reward), []
        for t in range(length):
            total = 0.0
            for distance in range(length - t):
                at = t + distance
                behind = value[at + 1] if at + 1 < length else 0.0
                total += (gamma * lam) ** distance * (reward[at] + gamma * behind - value[at])
            row.append(total)
        rows.append(row)
    return rows


def _slow_returns(rewards, gamma):
    return [
        [sum(gamma**distance * paid for distance, paid in enumerate(row[t:])) for t in range(len(row))]
        for row in rewards
    ]


@pytest.fixture
def mask():
    return _mask(SPANS, WIDTH)


@pytest.fixture
def reward():
    return torch.tensor([2.0, -1.0, 0.5, 3.0, 100.0, -4.0], dtype=torch.float64)


def _assert_rows(grid, expected, spans=SPANS):
    for row, want in zip(_lists(grid, spans), expected, strict=True):
        assert row == pytest.approx(want, abs=1e-12)
    outside = grid[~_mask(spans, grid.shape[1])]
    assert outside.tolist() == [0.0] * outside.numel()


# token_rewards


def test_token_rewards_by_hand():
    # [prompt prompt | y1 EOS | padding], and [prompt | y1 y2 y3 y4] cut by the length limit
    mask = _mask([(2, 2), (1, 4)], 5)
    log_ratio = torch.tensor([[5.0, 5.0, 1.0, -1.0, 5.0], [5.0, 2.0, 0.0, 1.0, 4.0]])
    rewards = token_rewards(torch.tensor([3.0, -2.0]), log_ratio, mask, beta=0.5)
    assert rewards.tolist() == [[0.0, 0.0, -0.5, 3.5, 0.0], [0.0, -1.0, 0.0, -0.5, -4.0]]


def test_token_rewards_equal_the_slow_ones(mask, reward):
    log_ratio = _grid(0, mask)
    _assert_rows(
        token_rewards(reward, log_ratio, mask, BETA), _slow_token_rewards(reward.tolist(), _lists(log_ratio), BETA)
    )


def test_a_completion_is_paid_its_shaped_reward(mask, reward):
    log_ratio = _grid(0, mask)
    total = token_rewards(reward, log_ratio, mask, BETA).sum(-1)
    summed = torch.where(mask, log_ratio, torch.zeros_like(log_ratio)).sum(-1)
    has_token = mask.any(-1)
    expected = shaped_reward(reward, summed, torch.zeros_like(summed), BETA)
    assert torch.allclose(total[has_token], expected[has_token], atol=1e-12)
    assert total[~has_token].tolist() == [0.0]


def test_the_reward_never_lands_on_padding_nor_on_an_earlier_token(mask, reward):
    paid = token_rewards(reward, torch.zeros_like(mask, dtype=torch.float64), mask, BETA)
    for row, (first, count) in enumerate(SPANS):
        expected = [0.0] * WIDTH
        if count:
            expected[first + count - 1] = reward[row].item()
        assert paid[row].tolist() == expected


def test_without_beta_only_the_reward_is_left_and_nothing_carries_a_gradient(mask, reward):
    log_ratio = torch.randn(mask.shape, dtype=torch.float64, requires_grad=True)
    paid = token_rewards(reward.clone().requires_grad_(), log_ratio, mask, 0.0)
    assert torch.equal(paid, token_rewards(reward, torch.zeros_like(log_ratio), mask, BETA))
    assert not paid.requires_grad


# returns_to_go


def test_returns_by_hand():
    reward = torch.tensor([[NAN, 1.0, 2.0, 4.0, NAN]])
    mask = _mask([(1, 3)], 5)
    assert returns_to_go(reward, mask).tolist() == [[0.0, 7.0, 6.0, 4.0, 0.0]]
    # 1 + 0.5 * (2 + 0.5 * 4)
    assert returns_to_go(reward, mask, gamma=0.5).tolist() == [[0.0, 3.0, 4.0, 4.0, 0.0]]
    assert returns_to_go(reward, mask, gamma=0.0).tolist() == [[0.0, 1.0, 2.0, 4.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_equal_the_slow_ones(mask, gamma):
    reward = _grid(1, mask)
    _assert_rows(returns_to_go(reward, mask, gamma), _slow_returns(_lists(reward), gamma))


# generalised_advantages


def test_advantages_by_hand():
    mask = _mask([(1, 3)], 5)
    reward = torch.tensor([[NAN, 1.0, 0.0, 4.0, NAN]])
    value = torch.tensor([[NAN, 2.0, 3.0, 1.0, NAN]])
    advantage, returns = generalised_advantages(reward, value, mask, lam=0.5)
    # TD errors: 1 + 3 - 2, 0 + 1 - 3, 4 + 0 - 1; then 3, -2 + 3 / 2, 2 - 0.5 / 2
    assert advantage.tolist() == [[0.0, 1.75, -0.5, 3.0, 0.0]]
    assert returns.tolist() == [[0.0, 3.75, 2.5, 4.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_advantages_equal_the_slow_ones(mask, gamma, lam):
    reward, value = _grid(1, mask), _grid(2, mask)
    advantage, returns = generalised_advantages(reward, value, mask, lam=lam, gamma=gamma)
    expected = _slow_advantages(_lists(reward), _lists(value), gamma, lam)
    _assert_rows(advantage, expected)
    _assert_rows(
        returns,
        [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(expected, _lists(value), strict=True)],
    )


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_with_lambda_one_they_are_the_return_minus_the_value(mask, gamma):
    reward, value = _grid(1, mask), _grid(2, mask)
    advantage, returns = generalised_advantages(reward, value, mask, lam=1.0, gamma=gamma)
    to_go = returns_to_go(reward, mask, gamma)
    assert torch.allclose(advantage[mask], (to_go - value)[mask], atol=1e-12)
    assert torch.allclose(returns, to_go, atol=1e-12)


def test_with_lambda_zero_they_are_the_td_error(mask):
    reward, value = _grid(1, mask), _grid(2, mask)
    advantage, _ = generalised_advantages(reward, value, mask, lam=0.0, gamma=0.9)
    expected = []
    for paid, own in zip(_lists(reward), _lists(value), strict=True):
        behind = [*own, 0.0][1:]
        expected.append([r + 0.9 * after - v for r, after, v in zip(paid, behind, own, strict=True)])
    _assert_rows(advantage, expected)


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_a_value_that_knows_the_returns_leaves_no_advantage(mask, lam):
    reward = _grid(1, mask)
    advantage, _ = generalised_advantages(reward, returns_to_go(reward, mask), mask, lam=lam)
    assert advantage.abs().max() < 1e-12


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_one_token_is_the_reward_minus_its_value(lam):
    # EOS first, wherever the prompt ends
    mask = _mask([(0, 1), (3, 1)], 4)
    reward, value = torch.tensor([[2.0, 7.0, 7.0, 7.0], [7.0, 7.0, 7.0, -1.0]]), torch.full((2, 4), 0.5)
    advantage, returns = generalised_advantages(reward, value, mask, lam=lam)
    assert advantage.tolist() == [[1.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.5]]
    assert returns.tolist() == [[2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]]


def test_rows_without_a_token_are_zero():
    mask, nothing = _mask([(0, 0), (2, 0)], 3), torch.full((2, 3), NAN)
    results = [*generalised_advantages(nothing, nothing, mask, lam=0.95), returns_to_go(nothing, mask)]
    results += [token_rewards(torch.tensor([NAN, 5.0]), nothing, mask, 0.1), whiten(nothing, mask)]
    assert all(result.tolist() == [[0.0] * 3] * 2 for result in results)


def test_advantages_carry_no_gradient(mask):
    reward, value = (torch.randn(mask.shape, requires_grad=True) for _ in range(2))
    assert not any(result.requires_grad for result in generalised_advantages(reward, value, mask, lam=0.95))
    assert not returns_to_go(reward, mask).requires_grad and not whiten(value, mask).requires_grad


@pytest.mark.parametrize("gap", [[True, False, True], [False, True, False, True]])
def test_a_mask_with_a_gap_is_refused(gap):
    mask = torch.tensor([gap])
    with pytest.raises(AssertionError):
        returns_to_go(torch.zeros(mask.shape), mask)
    with pytest.raises(AssertionError):
        generalised_advantages(torch.zeros(mask.shape), torch.zeros(mask.shape), mask, lam=1.0)


# whatever is around the completion


@pytest.mark.parametrize(("left", "right"), [(0, 3), (4, 0), (2, 5)])
@pytest.mark.parametrize("side", ["left", "right", "prompts"])
def test_padding_and_the_length_of_prompts_change_nothing(reward, left, right, side):
    lengths = [count for _, count in SPANS]
    wide = left + max(lengths) + right
    starts = {
        "left": [wide - right - count for count in lengths],
        "right": [left] * len(lengths),
        "prompts": [(left + 2 * row) % (wide - count + 1) for row, count in enumerate(lengths)],
    }[side]
    spans = list(zip(starts, lengths, strict=True))
    mask, moved_mask = _mask(SPANS, WIDTH), _mask(spans, wide)

    def through(log_ratio, value, mask):
        paid = token_rewards(reward, log_ratio, mask, BETA)
        advantage, returns = generalised_advantages(paid, value, mask, lam=0.9, gamma=0.95)
        return paid, advantage, returns, returns_to_go(paid, mask), whiten(advantage, mask)

    def moved(grid):
        # the mask's order is row-major on both sides, so each row keeps its tokens
        return torch.full(moved_mask.shape, NAN, dtype=grid.dtype).masked_scatter(moved_mask, grid[mask])

    grids = _grid(3, mask), _grid(4, mask)
    for before, after in zip(through(*grids, mask), through(*map(moved, grids), moved_mask), strict=True):
        assert torch.equal(before[mask], after[moved_mask])
        assert after[~moved_mask].abs().sum() == 0


# whiten


def test_whiten_by_hand():
    grid = torch.tensor([[NAN, 1.0, 3.0], [5.0, NAN, NAN], [NAN, NAN, 7.0]])
    mask = ~grid.isnan()
    # mean 4, biased variance (9 + 1 + 1 + 9) / 4 = 5
    root = math.sqrt(5)
    shifted, scaled = whiten(grid, mask), whiten(grid, mask, shift_mean=False)
    assert shifted[mask].tolist() == pytest.approx([-3 / root, -1 / root, 1 / root, 3 / root])
    assert scaled[mask].tolist() == pytest.approx([4 - 3 / root, 4 - 1 / root, 4 + 1 / root, 4 + 3 / root])
    assert shifted[~mask].tolist() == scaled[~mask].tolist() == [0.0] * 5


def test_whiten_equals_plain_numbers_and_gives_mean_zero_variance_one(mask):
    grid = 3 * _grid(5, mask) + 40
    entries = [entry for row in _lists(grid) for entry in row]
    mean = sum(entries) / len(entries)
    variance = sum((entry - mean) ** 2 for entry in entries) / len(entries)
    expected = [[(entry - mean) / math.sqrt(variance + 1e-8) for entry in row] for row in _lists(grid)]
    whitened = whiten(grid, mask)
    _assert_rows(whitened, expected)
    assert whitened[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1)


def test_whitening_forgets_shift_and_scale_and_may_keep_the_mean(mask):
    grid = _grid(5, mask)
    assert torch.allclose(whiten(7 * grid - 3, mask), whiten(grid, mask), atol=1e-7)
    kept = whiten(grid + 2, mask, shift_mean=False)
    assert kept[mask].mean().item() == pytest.approx((grid + 2)[mask].mean().item())
    assert torch.allclose(kept[mask] - kept[mask].mean(), whiten(grid, mask)[mask])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
@pytest.mark.parametrize("count", [1, 3, 7])
def test_equal_entries_and_a_single_one_are_exactly_zero(value, count):
    mask = _mask([(1, count)], 9)
    grid = torch.full((1, 9), value)
    assert whiten(grid, mask).tolist() == [[0.0] * 9]
    assert whiten(grid, mask, shift_mean=False)[mask].tolist() == pytest.approx([value] * count, rel=1e-6)


def test_repeating_the_batch_changes_nothing(mask):
    grid = _grid(5, mask)
    twice = whiten(torch.cat([grid, grid]), torch.cat([mask, mask]))
    assert torch.allclose(twice[: len(grid)], whiten(grid, mask), atol=1e-12)
