"""The one training loop. It knows steps, gradients and the best weights so far, and nothing of what is learned."""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_cli.files import write_folder_atomic
from rlhf_cli.settings import Select, TrainSettings
from rlhf_cli.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    Durable,
    model_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
    save_batch,
)
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.optim import build_optimizer, lr_factor
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.seeding import seed_dropout
from rlhf_cli.train.stopping import StopRequested
from rlhf_cli.types import LossOutput

# An fp16 scaler halves its scale at every overflow; more in a row than this is divergence, not a large scale.
_MAX_SKIPPED_IN_A_ROW = 20


@dataclass(frozen=True)
class StepBatch:
    """Everything one optimizer step learns from: this process' share of it, where several train together."""

    micro_batches: Sequence[Any]  # what `Task.loss` takes, in order
    normaliser: (
        float  # what the loss is divided by: sequences, pairs or tokens of the share; the loop adds them up
    )
    num_samples: int  # rows in the share
    num_tokens: int  # tokens in the share, prompt and completion
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the whole step, measured while it was made
    samples: Sequence[Mapping[str, Any]] = ()  # rows for samples.jsonl, of the whole step


@dataclass(frozen=True)
class Evaluation:
    """Metrics on validation data, and the one number that picks the best weights (higher is better)."""

    metrics: Mapping[str, float]
    score: float


class Task(ABC):
    """What is learned: a source of batches, a loss, an evaluation."""

    model: nn.Module  # all that is trained

    @abstractmethod
    def batch(self, step: int) -> StepBatch:
        """The batch of a step (0-based)."""

    @abstractmethod
    def loss(self, micro_batch: Any, normaliser: float) -> LossOutput:
        """Loss of a micro-batch, already divided by the step's normaliser."""

    @abstractmethod
    def evaluate(self, step: int) -> Evaluation:
        """Evaluation after `step` steps, over the shares of all processes."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the weights as a Hugging Face folder."""

    def after_step(self) -> None:
        """What follows the weights when they have moved; nothing, unless a task says otherwise."""
        return

    def state(self) -> Mapping[str, Any] | None:
        """What the task carries from step to step beside the weights, as JSON; nothing where all follows from the step.

        None between steps at which it could not be taken up again (inside a rollout that serves several steps).
        """
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a `state`."""
        return

    def tensors(self) -> Mapping[str, Tensor]:
        """Tensors that the task carries beside the model's, by name; a checkpoint has them and writes into them."""
        return {}


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

    def sync(self) -> None:
        """Brings what was written to the disk."""
        ...


@dataclass(frozen=True)
class FitResult:
    """How a training run ended."""

    last_step: int
    best_step: int
    best_score: float
    stopped_early: bool
    final: Evaluation  # of the selected weights
    samples: int  # rows learned from, over all steps
    tokens: int  # of these, prompt and completion
    time_s: float  # of training, over resumes
    checkpoint_s: float  # of that, spent on writing checkpoints


class TrainingDivergedError(RuntimeError):
    """Loss or gradient stopped being finite."""


@dataclass
class _Counters:
    """What the loop itself remembers; JSON in a checkpoint."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    time_s: float = 0.0
    checkpoint_s: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_score: float = -math.inf
    best_metrics: dict[str, float] = field(default_factory=dict)
    without_better: int = 0


@dataclass
class _Fit:
    """What the parts of the loop share."""

    task: Task
    settings: TrainSettings
    num_steps: int
    folder: Path
    recorder: Recorder
    precision: Precision
    seed: int
    durable: Durable | None
    world: World
    checkpoints: Checkpoints = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.task.model, self.settings)
        self.scaler = self.precision.scaler()
        if self.durable is None:
            self.checkpoints = Checkpoints(self.folder / "checkpoints", 1, self.recorder.message)
        else:
            self.checkpoints = self.durable.checkpoints


def fit(
    task: Task,
    settings: TrainSettings,
    num_steps: int,
    folder: Path,
    recorder: Recorder,
    precision: Precision,
    seed: int,
    durable: Durable | None = None,
    world: World = ALONE,
) -> FitResult:
    """Trains `task.model` and writes model/ (and the weights not selected beside it).

    The best weights are kept beside the checkpoints whenever an evaluation improves; at the end model/ holds the ones
    `settings.select` asks for, and model_last/ or model_best/ the others where they differ.

    Args:
        task: what is learned.
        settings: optimisation.
        num_steps: optimizer steps.
        folder: the run folder.
        recorder: takes metrics, samples and messages.
        precision: device and autocast.
        seed: of the stage; dropout is a function of (seed, step, rank).
        durable: checkpoints to write, one to continue, and requests to stop; None trains straight through.
        world: the processes that train together; each has its share of `task`, the main one writes.

    Raises:
        TrainingDivergedError: a loss or gradient is not finite.
        StopRequested: a signal came; a checkpoint has been written.
    """
    run = _Fit(task, settings, num_steps, folder, recorder, precision, seed, durable, world)
    counters = _Counters()
    if durable is not None and durable.resume_from is not None:
        counters = _restore(run, durable.resume_from)
    world.copy_from_main(task_tensors(task).values())
    evaluation: Evaluation | None = None
    stopped_early = False
    clock_zero = time.perf_counter() - counters.time_s
    while counters.step < num_steps and not stopped_early:
        counters.step += 1
        row, batch = _step(run, counters)
        counters.time_s = row["time_s"] = time.perf_counter() - clock_zero
        at_end = counters.step == num_steps
        if at_end or (settings.eval_every is not None and counters.step % settings.eval_every == 0):
            evaluation = task.evaluate(counters.step)
            row |= {f"eval/{name}": value for name, value in evaluation.metrics.items()}
            stopped_early = _judge(run, evaluation, counters)
        if batch.samples and (at_end or _samples_are_due(settings, counters.step)):
            recorder.samples(counters.step, batch.samples)
        recorder.metrics(counters.step, row)
        if durable is not None and not at_end and not stopped_early:
            _make_durable(run, durable, counters)
    if stopped_early and counters.step < num_steps:
        recorder.message(
            f"stopped early at step {counters.step}: no better evaluation since step {counters.best_step}"
        )
    assert evaluation is not None, "a run evaluates at its last step"
    if world.is_main:
        _settle_weights(run, counters)
    world.barrier()
    final = evaluation
    if settings.select is Select.best:
        final = Evaluation(counters.best_metrics, counters.best_score)
    early = stopped_early and counters.step < num_steps
    return FitResult(
        counters.step,
        counters.best_step,
        counters.best_score,
        early,
        final,
        counters.samples,
        counters.tokens,
        counters.time_s,
        counters.checkpoint_s,
    )


def steps(
    task: Task,
    settings: TrainSettings,
    num_steps: int,
    folder: Path,
    recorder: Recorder,
    precision: Precision,
    seed: int,
) -> Iterator[dict[str, float]]:
    """The steps of `fit` one by one, each with its row of metrics, and nothing between them: to measure them."""
    run = _Fit(task, settings, num_steps, folder, recorder, precision, seed, None, ALONE)
    counters = _Counters()
    while counters.step < num_steps:
        counters.step += 1
        yield _step(run, counters)[0]


def task_tensors(task: Task) -> dict[str, Tensor]:
    """All tensors that a checkpoint has of a task, the model's among them."""
    return {**model_tensors(task.model), **{f"task/{name}": value for name, value in task.tensors().items()}}


def _step(run: _Fit, counters: _Counters) -> tuple[dict[str, float], StepBatch]:
    """One optimizer step; returns its row of metrics, and this process' batch."""
    started = time.perf_counter()
    settings, optimizer, scaler, world, step = run.settings, run.optimizer, run.scaler, run.world, counters.step
    lr = settings.lr * lr_factor(settings, step, run.num_steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    seed_dropout(run.seed, step, world.rank)
    batch = run.task.batch(step - 1)
    train_started = time.perf_counter()
    normaliser, num_samples, num_tokens = world.sum([batch.normaliser, batch.num_samples, batch.num_tokens])
    row = _forward_backward(run, batch, normaliser)
    world.sum_gradients(run.task.model.parameters())
    scaler.unscale_(optimizer)
    row["grad_norm"] = _clip(run.task.model, settings.max_grad_norm)
    overflow = scaler.is_enabled() and not math.isfinite(row["grad_norm"])
    if not overflow:  # a norm can overflow where no gradient does: then the scaler alone would let the step pass
        _check_finite(run, step, row, batch)
        scaler.step(optimizer)
        run.task.after_step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    counters.skipped += overflow
    counters.skipped_in_a_row = counters.skipped_in_a_row + 1 if overflow else 0
    if counters.skipped_in_a_row > _MAX_SKIPPED_IN_A_ROW:
        raise TrainingDivergedError(f"step {step}: {counters.skipped_in_a_row} steps in a row overflowed in fp16")

    now = time.perf_counter()
    counters.samples += int(num_samples)
    counters.tokens += int(num_tokens)
    row |= dict(batch.metrics)
    row |= {
        "lr": lr,
        "samples": counters.samples,
        "tokens": counters.tokens,
        "time/train_s": now - train_started,
        "throughput/samples_per_s": num_samples / (now - started),
        "throughput/tokens_per_s": num_tokens / (now - started),
    }
    if scaler.is_enabled():
        row["fp16/skipped_steps"] = counters.skipped
    return row | _peak_memory(run.precision.device, world), batch


def _judge(run: _Fit, evaluation: Evaluation, counters: _Counters) -> bool:
    """Keeps the weights where they are the best so far; True where patience has run out."""
    if not math.isfinite(evaluation.score):
        raise TrainingDivergedError(f"step {counters.step}: the evaluation's score is {evaluation.score}")
    if evaluation.score > counters.best_score:
        counters.best_step, counters.best_score = counters.step, evaluation.score
        counters.best_metrics, counters.without_better = dict(evaluation.metrics), 0
        if run.world.is_main:
            run.checkpoints.folder.mkdir(parents=True, exist_ok=True)
            write_folder_atomic(run.task.save, run.checkpoints.best(counters.step))
            run.checkpoints.prune_best(counters.step)
        return False
    counters.without_better += 1
    return run.settings.patience is not None and counters.without_better >= run.settings.patience


def _samples_are_due(settings: TrainSettings, step: int) -> bool:
    every = settings.samples_every or settings.eval_every
    return step == 1 or (every is not None and step % every == 0)


def _make_durable(run: _Fit, durable: Durable, counters: _Counters) -> None:
    """Writes a checkpoint where one is due or a signal came, to whichever process; then stops for the signal."""
    stop = int(run.world.max([durable.stop.requested or 0])[0])
    state = run.task.state()
    if state is None:  # inside a rollout: at the next step at which the run can be taken up again
        durable.is_owed = durable.is_owed or counters.step % durable.every == 0
        return
    if not stop and not durable.is_owed and counters.step % durable.every != 0:
        return
    durable.is_owed = False
    if run.world.is_main:
        started = time.perf_counter()
        tensors = {**task_tensors(run.task), **optimizer_tensors(run.optimizer)}
        values = {"counters": asdict(counters), "task": dict(state), "scaler": run.scaler.state_dict()}
        run.recorder.sync()  # rows before a checkpoint have to outlive what it outlives
        durable.checkpoints.save(Checkpoint(counters.step, tensors, values))
        durable.checkpoints.prune_best(counters.best_step)
        counters.checkpoint_s += time.perf_counter() - started
    if stop:
        run.world.barrier()  # the first process that ends makes torchrun signal the others
        raise StopRequested(stop)


def _restore(run: _Fit, checkpoint: Checkpoint) -> _Counters:
    """Puts everything back as it was after the checkpoint's step."""
    restore_tensors(task_tensors(run.task), checkpoint.tensors)
    restore_optimizer(run.optimizer, checkpoint.tensors)
    run.task.restore(checkpoint.values["task"])
    if run.scaler.is_enabled():
        run.scaler.load_state_dict(checkpoint.values["scaler"])
    counters = _Counters(**checkpoint.values["counters"])
    best = run.checkpoints.best(counters.best_step)
    if run.world.is_main and counters.best_step and not best.is_dir():
        raise RuntimeError(f"{best} is gone, and with it the best weights so far; start the run anew")
    return counters


def _forward_backward(run: _Fit, batch: StepBatch, normaliser: float) -> dict[str, float]:
    """Accumulates the gradient over the micro-batches; returns their metrics, added up over all processes."""
    loss, sums, maxima = 0.0, dict[str, float](), dict[str, float]()
    for micro_batch in batch.micro_batches:
        with run.precision.autocast():
            output = run.task.loss(micro_batch, normaliser)
        run.scaler.scale(output.loss).backward()
        loss += float(output.loss.detach())
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in output.maxima.items():
            maxima[name] = max(maxima.get(name, -math.inf), float(value))
    loss, *totals = run.world.sum([loss, *sums.values()])
    highest = run.world.max(list(maxima.values()))
    return {"loss": loss, **dict(zip(sums, totals, strict=True)), **dict(zip(maxima, highest, strict=True))}


def _clip(model: nn.Module, max_norm: float | None) -> float:
    """Global gradient norm before clipping."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    return float(nn.utils.clip_grad_norm_(parameters, math.inf if max_norm is None else max_norm))


def _check_finite(run: _Fit, step: int, row: Mapping[str, float], batch: StepBatch) -> None:
    """Raises TrainingDivergedError, with the batch saved, before the weights are touched."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            share = "" if run.world.size == 1 else f"-rank-{run.world.rank}"
            file = run.folder / f"nonfinite-step-{step}{share}.safetensors"
            save_batch(file, batch.micro_batches)
            raise TrainingDivergedError(
                f"step {step}: {name} is {row[name]}; lower the learning rate (the batch is in {file})"
            )


def _settle_weights(run: _Fit, counters: _Counters) -> None:
    """Puts the selected weights into model/, the others beside it.

    Nothing that it needs is removed: it can be repeated after a kill at any point. The best weights stay beside the
    checkpoints until the run is finished (`Durable`), or go now where there are none.
    """
    folder, best = run.folder, run.checkpoints.best(counters.best_step)

    def copy_best(building: Path) -> None:
        shutil.copytree(best, building)

    if counters.best_step == counters.step:
        write_folder_atomic(run.task.save, folder / "model")
    elif run.settings.select is Select.last:
        write_folder_atomic(copy_best, folder / "model_best")
        write_folder_atomic(run.task.save, folder / "model")
    else:
        write_folder_atomic(run.task.save, folder / "model_last")
        write_folder_atomic(copy_best, folder / "model")
    if run.durable is None:
        shutil.rmtree(run.checkpoints.folder)


def _peak_memory(device: torch.device, world: World) -> dict[str, float]:
    """Of the process that needs the most."""
    if device.type != "cuda":
        return {}
    (peak,) = world.max([torch.cuda.max_memory_allocated(device) / 2**30])
    return {"memory/peak_gib": peak}
