"""The one training loop. It knows steps, gradients and the best weights so far, and nothing of what is learned."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from rlhf_cli.files import replace_folder_atomic
from rlhf_cli.train.optim import build_optimizer, lr_factor
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import seed_dropout
from rlhf_cli.train.settings import Select, TrainSettings
from rlhf_cli.types import LossOutput

# An fp16 scaler halves its scale at every overflow; more in a row than this is divergence, not a large scale.
_MAX_SKIPPED_IN_A_ROW = 20


@dataclass(frozen=True)
class StepBatch:
    """Everything one optimizer step learns from."""

    micro_batches: Sequence[Any]  # what `Task.loss` takes, in order
    normaliser: float  # what the step's loss is divided by: sequences, pairs or tokens
    num_samples: int  # rows in the step
    num_tokens: int  # tokens in the step, prompt and completion
    metrics: Mapping[str, float] = field(default_factory=dict)  # measured while the batch was made
    samples: Sequence[Mapping[str, Any]] = ()  # rows for samples.jsonl


@dataclass(frozen=True)
class Evaluation:
    """Metrics on validation data, and the one number that picks the best weights (higher is better)."""

    metrics: Mapping[str, float]
    score: float


class Task(Protocol):
    """What is learned: a source of batches, a loss, an evaluation."""

    model: nn.Module

    def batch(self, step: int) -> StepBatch:
        """The batch of a step (0-based)."""
        ...

    def loss(self, micro_batch: Any, normaliser: float) -> LossOutput:
        """Loss of a micro-batch, already divided by the step's normaliser."""
        ...

    def evaluate(self, step: int) -> Evaluation:
        """Evaluation after `step` steps."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the weights as a Hugging Face folder."""
        ...


class Recorder(Protocol):
    """Where a run's figures go."""

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """One row of metrics."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of samples."""
        ...

    def message(self, text: str) -> None:
        """A line for the person watching."""
        ...


@dataclass(frozen=True)
class FitResult:
    """How a training run ended."""

    last_step: int
    best_step: int
    best_score: float
    stopped_early: bool
    final: Evaluation  # of the selected weights


class TrainingDivergedError(RuntimeError):
    """Loss or gradient stopped being finite."""


def fit(
    task: Task,
    settings: TrainSettings,
    num_steps: int,
    folder: Path,
    recorder: Recorder,
    precision: Precision,
    seed: int,
) -> FitResult:
    """Trains `task.model` and writes model/ (and the weights not selected beside it).

    The best weights are kept on disk as model_best/ whenever an evaluation improves; at the end model/ holds the
    ones `settings.select` asks for, and model_last/ or model_best/ the others where they differ.

    Args:
        task: what is learned.
        settings: optimisation.
        num_steps: optimizer steps.
        folder: the run folder.
        recorder: takes metrics, samples and messages.
        precision: device and autocast.
        seed: of the stage; dropout is a function of (seed, step).

    Raises:
        TrainingDivergedError: a loss or gradient is not finite.
    """
    optimizer = build_optimizer(task.model, settings)
    scaler = precision.scaler()
    started = time.perf_counter()
    samples = tokens = skipped = skipped_in_a_row = 0
    best_step, without_better = 0, 0
    best: Evaluation | None = None
    evaluation: Evaluation | None = None
    stopped_early, step = False, 0

    for step in range(1, num_steps + 1):
        step_started = time.perf_counter()
        lr = settings.lr * lr_factor(settings, step, num_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        seed_dropout(seed, step)
        batch = task.batch(step - 1)
        train_started = time.perf_counter()
        row = _forward_backward(task, batch, precision, scaler)
        scaler.unscale_(optimizer)
        row["grad_norm"] = _clip(task.model, settings.max_grad_norm)
        overflow = scaler.is_enabled() and not math.isfinite(row["grad_norm"])
        if not overflow:
            _check_finite(step, row)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        skipped_in_a_row = skipped_in_a_row + 1 if overflow else 0
        skipped += overflow
        if skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
            raise TrainingDivergedError(f"step {step}: {skipped_in_a_row} steps in a row overflowed in fp16")

        now = time.perf_counter()
        samples += batch.num_samples
        tokens += batch.num_tokens
        row |= dict(batch.metrics)
        row |= {
            "lr": lr,
            "samples": samples,
            "tokens": tokens,
            "time_s": now - started,
            "time/train_s": now - train_started,
            "throughput/samples_per_s": batch.num_samples / (now - step_started),
            "throughput/tokens_per_s": batch.num_tokens / (now - step_started),
        }
        if scaler.is_enabled():
            row["fp16/skipped_steps"] = skipped
        row |= _peak_memory(precision.device)

        at_end = step == num_steps
        if at_end or (settings.eval_every is not None and step % settings.eval_every == 0):
            evaluation = task.evaluate(step)
            row |= {f"eval/{name}": value for name, value in evaluation.metrics.items()}
            if not math.isfinite(evaluation.score):
                raise TrainingDivergedError(f"step {step}: the evaluation's score is {evaluation.score}")
            if best is None or evaluation.score > best.score:
                best, best_step, without_better = evaluation, step, 0
                _save_whole(task, folder / "model_best")
            else:
                without_better += 1
                stopped_early = settings.patience is not None and without_better >= settings.patience
        every = settings.samples_every or settings.eval_every
        if batch.samples and (at_end or step == 1 or (every is not None and step % every == 0)):
            recorder.samples(step, batch.samples)
        recorder.metrics(step, row)
        if stopped_early and not at_end:
            recorder.message(f"stopped early at step {step}: no better evaluation since step {best_step}")
            break

    assert evaluation is not None and best is not None, "a run evaluates at its last step"
    _settle_weights(task, settings.select, best_step == step, folder)
    final = best if settings.select is Select.best else evaluation
    return FitResult(step, best_step, best.score, stopped_early and step < num_steps, final)


def _forward_backward(
    task: Task, batch: StepBatch, precision: Precision, scaler: torch.amp.GradScaler
) -> dict[str, float]:
    """Accumulates the gradient over the micro-batches; returns their metrics, added up."""
    loss, sums, maxima = 0.0, dict[str, float](), dict[str, float]()
    for micro_batch in batch.micro_batches:
        with precision.autocast():
            output = task.loss(micro_batch, batch.normaliser)
        scaler.scale(output.loss).backward()
        loss += float(output.loss.detach())
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in output.maxima.items():
            maxima[name] = max(maxima.get(name, -math.inf), float(value))
    return {"loss": loss, **sums, **maxima}


def _clip(model: nn.Module, max_norm: float | None) -> float:
    """Global gradient norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))


def _check_finite(step: int, row: Mapping[str, float]) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise TrainingDivergedError(f"step {step}: {name} is {row[name]}; lower the learning rate")


def _settle_weights(task: Task, select: Select, best_is_last: bool, folder: Path) -> None:
    """Puts the selected weights into model/, the others beside it."""
    best = folder / "model_best"
    if best_is_last:
        best.rename(folder / "model")
    elif select is Select.best:
        best.rename(folder / "model")
        _save_whole(task, folder / "model_last")
    else:
        _save_whole(task, folder / "model")


def _save_whole(task: Task, target: Path) -> None:
    """Writes the weights so that `target` is always a whole folder: the old one or the new one."""
    building = target.with_name(f".{target.name}.building")
    task.save(building)
    replace_folder_atomic(building, target)


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    return {"memory/peak_gib": torch.cuda.max_memory_allocated(device) / 2**30}
