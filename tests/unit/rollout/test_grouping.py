import itertools

import pytest

from rlhf_cli.rollout.grouping import chunks, rows_to_keep, split_lengths


def _cost(groups, lengths, group_cost):
    return sum(len(group) * max(lengths[i] for i in group) + group_cost for group in groups)


@pytest.mark.parametrize("group_cost", [0.0, 1.0, 3.0, 7.0, 12.0, 20.0, 40.0, 70.0, 1e9])
@pytest.mark.parametrize("lengths", [[5], [3, 3], [9, 1, 4, 4, 30, 2, 8], [8, 10, 12, 9, 8, 96, 24, 11, 17]])
def test_no_other_split_at_these_places_costs_less(lengths, group_cost):
    groups = split_lengths(lengths, group_cost)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    assert all(groups)
    ordered = sorted(range(len(lengths)), key=lambda i: lengths[i])
    assert [lengths[i] for i in itertools.chain(*groups)] == [lengths[i] for i in ordered]
    places = [len(lengths) - 2**i for i in range(5) if 2**i < len(lengths)]
    costs = []
    for count in range(len(places) + 1):
        for cuts in itertools.combinations(sorted(places), count):
            ends = [0, *cuts, len(lengths)]
            costs.append(_cost([ordered[a:b] for a, b in itertools.pairwise(ends)], lengths, group_cost))
    assert _cost(groups, lengths, group_cost) == min(costs)


def test_one_long_prompt_stands_alone_and_equal_ones_together():
    lengths = [8, 24, 12, 96, 16]
    assert split_lengths(lengths, 50.0)[-1] == [3]
    assert len(split_lengths([20] * 16, 1.0)) == 1
    assert split_lengths([], 1.0) == []


def test_chunks_hold_at_most_the_budget_unless_one_prompt_is_more():
    lengths = [3, 9, 1, 1, 40, 2, 2, 2]
    k, new = 3, 5
    for max_rows, max_tokens in itertools.product([1, 3, 7, 9, 100], [None, 1, 30, 60, 200]):
        parts = chunks(lengths, k, new, max_rows, max_tokens)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(lengths)))
        for part, following in itertools.zip_longest(parts, parts[1:]):
            inside = lengths[part]
            tokens = k * sum(length + new for length in inside)
            assert len(inside) == 1 or (
                len(inside) * k <= max_rows and (max_tokens is None or tokens <= max_tokens)
            )
            if following is not None:  # one more would have been too many
                more = tokens + k * (lengths[following.start] + new)
                assert (len(inside) + 1) * k > max_rows or (max_tokens is not None and more > max_tokens)
    assert chunks([], k, new, 1, None) == []


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("share", [0.05, 0.2])
@pytest.mark.parametrize("capacity", [1, 3, 64, 100])
def test_rows_that_are_kept_have_room_for_all_and_few_more(capacity, share, multiple):
    kept = [rows_to_keep(active, capacity, share, multiple) for active in range(capacity + 1)]
    assert kept[0] == 0
    assert kept == sorted(kept)
    for active, count in enumerate(kept):
        assert active <= count <= capacity
        assert active == 0 or count <= active / (1 - share) + multiple
    assert all(rows_to_keep(count, capacity, share, multiple) == count for count in kept)
