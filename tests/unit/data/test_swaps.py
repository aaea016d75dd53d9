"""Label noise: which pairs are exchanged, and that it can be told afterwards."""

from __future__ import annotations

import pytest

from rlhf_cli.data.rows import Drawn, is_drawn, rows_of_epoch
from rlhf_cli.data.swaps import swapped, with_swaps
from rlhf_cli.types import Preference

PAIRS = [Preference(f"p{i}", f"c{i}", f"r{i}", margin=float(i)) for i in range(400)]


def flags(pairs: list[Preference]) -> list[bool]:
    return [pair.swapped for pair in pairs]


def test_a_swap_exchanges_the_completions_and_is_known() -> None:
    pair = Preference("p", "c", "r", margin=2.0)
    assert swapped(pair) == Preference("p", "r", "c", margin=2.0, swapped=True)
    assert swapped(swapped(pair)) == pair


def test_at_rate_0_the_pairs_are_the_same_object() -> None:
    assert with_swaps(PAIRS, 0.0, 7) is PAIRS


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.9])
def test_about_the_rate_of_them_is_exchanged_and_the_rest_stays(rate: float) -> None:
    found = list(with_swaps(PAIRS, rate, 7))
    share = sum(flags(found)) / len(PAIRS)
    assert abs(share - rate) < 4 * (rate * (1 - rate) / len(PAIRS)) ** 0.5
    assert found == [swapped(pair) if one.swapped else pair for pair, one in zip(PAIRS, found, strict=True)]


def test_which_ones_is_a_function_of_seed_and_number_alone() -> None:
    first = flags(list(with_swaps(PAIRS, 0.3, 7)))
    assert flags(list(with_swaps(PAIRS, 0.3, 7))) == first
    assert flags(list(with_swaps(PAIRS[:50], 0.3, 7))) == first[:50]
    other = [Preference("x", str(i), "y") for i in range(400)]
    assert flags(list(with_swaps(other, 0.3, 7))) == first
    assert flags(list(with_swaps(PAIRS, 0.3, 8))) != first


def test_a_higher_rate_exchanges_more_of_the_same() -> None:
    low, high = (flags(list(with_swaps(PAIRS, rate, 7))) for rate in (0.1, 0.5))
    assert all(more for less, more in zip(low, high, strict=True) if less)


def test_a_pair_that_the_data_has_exchanged_goes_back() -> None:
    noisy = [swapped(pair) for pair in PAIRS]
    first = flags(list(with_swaps(PAIRS, 0.3, 7)))
    assert flags(list(with_swaps(noisy, 0.3, 7))) == [not one for one in first]


def test_pairs_that_are_drawn_anew_are_drawn_anew_here_too() -> None:
    drawn = Drawn(100, lambda number: Preference(str(number), "c", "r"))
    noisy = with_swaps(drawn, 0.5, 7)
    assert is_drawn(noisy) and len(noisy) == 100
    epochs = [[rows_of_epoch(noisy, epoch)[i] for i in range(100)] for epoch in (0, 1)]
    assert [pair.prompt for pair in epochs[1]] == [str(100 + i) for i in range(100)]
    assert flags(epochs[0]) != flags(epochs[1])
    fixed = [Preference(str(i), "c", "r") for i in range(200)]
    assert flags([*epochs[0], *epochs[1]]) == flags(list(with_swaps(fixed, 0.5, 7)))
