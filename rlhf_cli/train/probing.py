"""Linear probing: the head of a classifier learns on a frozen backbone, before both learn together.

A fresh head sends a random gradient into the backbone and distorts what it knows; a probed one does not (Kumar et al.
2022, arXiv:2202.10054). Models whose weights are averaged have to start from one head (Rame et al. 2024, section 3).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlhf_cli.rewards.scoring import has_linear_head, pooled_states
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.reward import RewardTask
from rlhf_cli.types import Sequences

# Whose states are kept while a head is probed: at a width of 4,096, 1 GiB.
_KEPT_ROWS = 65_536


def head_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """What lies above the backbone: `score` of decoder classifiers, all layers of the head of encoder classifiers."""
    backbone = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in backbone]


class KeptStates:
    """The states of a frozen backbone, each row's computed once: however long, probing costs one pass over the rows."""

    def __init__(self, model: PreTrainedModel, max_rows: int = _KEPT_ROWS) -> None:
        self._model = model
        self._max_rows = max_rows
        self._kept: dict[tuple[int, ...], torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, sequences: Sequences) -> torch.Tensor:
        """States of N rows, float32 [N, H]."""
        real = zip(sequences.ids, sequences.attention_mask, strict=True)
        keys = [tuple(ids[mask].tolist()) for ids, mask in real]
        new = [i for i, key in enumerate(keys) if key not in self._kept]
        fresh: dict[tuple[int, ...], torch.Tensor] = {}
        if new:
            places = torch.tensor(new, device=sequences.ids.device)
            fresh = dict(zip((keys[i] for i in new), pooled_states(self._model, sequences[places]), strict=True))
        states = torch.stack([fresh[key] if key in fresh else self._kept[key] for key in keys])
        if len(self._kept) + len(fresh) <= self._max_rows:
            self._kept |= fresh
        return states


def probe_head(task: RewardTask, num_steps: int, lr: float, world: World = ALONE) -> float:
    """Trains the head alone by AdamW, dropout off; returns the accuracy on the validation pairs.

    Args:
        task: batches and loss, dropout off from now on; its model is left with every weight trainable that was so.
        num_steps: optimizer steps.
        lr: falls linearly to 0.
        world: the processes that train together.
    """
    model = task.model
    head = head_parameters(model)
    was_trained = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in head:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(head, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / num_steps)
    task.with_dropout = False
    task.states = KeptStates(model) if has_linear_head(model) else None
    for step in range(num_steps):
        batch = task.batch(step)
        normaliser = world.sum([batch.normaliser])[0]
        optimizer.zero_grad(set_to_none=True)
        for micro_batch in batch.micro_batches:
            with task.precision.autocast():
                output = task.loss(micro_batch, normaliser)
            output.loss.backward()
        world.sum_gradients(head)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    task.states = None
    for parameter, trained in zip(model.parameters(), was_trained, strict=True):
        parameter.requires_grad_(trained)
    return task.evaluate(0).metrics["rm/accuracy"]
