"""Reward-model training on pairs that a source draws anew in each epoch."""

from __future__ import annotations

from typing import Any

from fixtures_models import FP32, reward_model

from rlhf_cli.data.rows import Drawn, rows_of_epoch
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode
from rlhf_cli.train.seeding import epoch_order
from rlhf_cli.types import Preference


def draw(number: int) -> Preference:
    return Preference("", f"good {number}", f"bad {number}")


def test_every_epoch_has_pairs_of_its_own() -> None:
    model = reward_model()
    pairs = Drawn(5, draw)
    task = RewardTask(
        model,
        encode(model, pairs),
        encode(model, pairs[:]),
        TrainSettings(batch_size=3),
        FP32,
        7,
        loss=RewardLoss(),
    )
    seen: list[Any] = []
    for step in range(5):  # three epochs of five rows in batches of three, which straddle
        for part in task.batch(step).micro_batches:
            ids, counts = part.chosen.ids, part.chosen.completion_mask
            seen += [row[mask].tolist() for row, mask in zip(ids, counts, strict=True)]
    expected = [
        model.encode("", rows_of_epoch(pairs, epoch)[int(place)].chosen)[1]
        for epoch in range(3)
        for place in epoch_order(7, epoch, 5)
    ]
    assert seen == expected and len({tuple(ids) for ids in seen}) == 15
