"""Linear probing: the head of a classifier learns on a frozen backbone, before both learn together.

A fresh head sends a random gradient into the backbone and distorts what it knows; a probed one does not (Kumar et al.
2022, arXiv:2202.10054). Models whose weights are averaged have to start from one head (Rame et al. 2024, section 3).
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.reward import RewardTask


def head_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """What lies above the backbone: `score` of decoder classifiers, all layers of the head of encoder classifiers."""
    backbone = {id(parameter) for parameter in model.base_model.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in backbone]


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
    for parameter, trained in zip(model.parameters(), was_trained, strict=True):
        parameter.requires_grad_(trained)
    return task.evaluate(0).metrics["rm/accuracy"]
