"""The mask of a group of rows while they are decoded."""

from __future__ import annotations

import torch

from rlhf_cli.rollout.cache import RowGroup

CPU = torch.device("cpu")


def test_no_step_sees_a_mask_of_one_before() -> None:
    group = RowGroup(2, 6, CPU)
    real = torch.tensor([[True, True], [False, True]])
    group.begin(torch.arange(2), torch.tensor([2, 1]), real)
    keys = torch.zeros(2, 1, 6, 4)
    for width in (3, 4):
        group.open_column()
        group.num_seen = width
        mask = group._mask(None, 1, keys)
        assert mask[:, 0, 0].isinf().tolist() == [[False] * width, [True] + [False] * (width - 1)]
        assert group._mask(None, 1, keys) is mask, "one for all layers"
        mask.fill_(torch.nan)  # as if it had been captured and never computed
        group.advance()
    group.begin(torch.arange(2), torch.tensor([2, 1]), real)
    group.open_column()
    group.num_seen = 4
    assert not group._mask(None, 1, keys).isnan().any()
