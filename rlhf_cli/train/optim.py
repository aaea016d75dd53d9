"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from rlhf_cli.settings import Schedule, TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; matrices decay, norms and biases do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def lr_factor(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Share of the peak learning rate at a step.

    Linear from 0 over the warm-up (the first step already moves), then constant, linear or cosine from the peak
    towards `min_lr_ratio`, which the step after the last would have: every step moves.

    Args:
        settings: schedule, warmup_ratio or warmup_steps, min_lr_ratio.
        step: 1-based.
        num_steps: all steps of the run.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(round(settings.warmup_ratio * num_steps, 9))  # 0.07 * 100 is 7.000000000000001
    if step <= warmup:
        return step / warmup
    if settings.schedule is Schedule.constant:
        return 1.0
    progress = (step - 1 - warmup) / (num_steps - warmup)
    shape = 1.0 - progress if settings.schedule is Schedule.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.min_lr_ratio + (1.0 - settings.min_lr_ratio) * shape
