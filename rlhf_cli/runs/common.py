"""What every stage's run does: prepare a model, train, write summary, plot and card, explain exhausted memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli import build
from rlhf_cli.data.tokenise import count_cuts
from rlhf_cli.models.adapters import Adapter
from rlhf_cli.models.card import Card, hub_id, write_card
from rlhf_cli.models.last_layer import has_tied_head
from rlhf_cli.models.loading import parameter_counts
from rlhf_cli.models.recompute import enable_recomputation
from rlhf_cli.models.settings import PeftSettings
from rlhf_cli.report.plots import training_curves
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.loop import FitResult, Task, fit
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder
from rlhf_cli.types import Example

# Rows that are looked at for what the caps cut.
COUNTED_ROWS = 1000


def say_cuts(
    recorder: RunRecorder | SilentRecorder,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    max_prompt: int,
    max_completion: int,
) -> None:
    """Tells how many rows the caps cut, where they cut any."""
    cuts = count_cuts(tokenizer, examples, max_prompt, max_completion, COUNTED_ROWS)
    if cuts.prompts or cuts.completions:
        recorder.message(f"{cuts} (data.max_prompt_tokens and the like: {max_prompt} and {max_completion} tokens)")


def prepare(
    recorder: RunRecorder | SilentRecorder,
    key: str,
    peft: PeftSettings,
    settings: TrainSettings,
    model: PreTrainedModel,
    base: str | None,
    seed: int,
) -> Adapter | None:
    """Gets the model ready for training with little memory: adapter or frozen layers, recomputed activations."""
    adapter = build.adapter(key, peft, model, base, seed)
    if base is None and peft.name != "none":
        recorder.message(f"{key}={peft.name}: all weights are trained, because the model starts from scratch")
    if adapter is not None and peft.name == "adapter" and peft.variant == "replace":
        recorder.message(
            f"warning: {key}.variant=replace: every MLP is replaced by fresh weights, so training does not start from "
            "the model it is given, which stays a policy's reference"
        )
    if base is not None and peft.name == "last_layer" and has_tied_head(model):
        recorder.message(
            f"{key}=last_layer: the last block alone is trained, because the output layer is tied to the input"
        )
    if settings.gradient_checkpointing:
        enable_recomputation("gradient_checkpointing", model)
    return adapter


def train(
    task: Task,
    settings: TrainSettings,
    num_steps: int,
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    seed: int,
    curves: Sequence[str],
    memory_keys: Sequence[str],
) -> dict[str, float]:
    """Trains, then writes summary and plot; returns the summary.

    Args:
        task, settings, num_steps, job, recorder, seed: as `fit` has them.
        curves: metrics to plot.
        memory_keys: config keys that a lower value of makes the run need less memory.
    """
    counts = parameter_counts(task.model)
    recorder.message(
        f"{counts['parameters/trainable']:,} of {counts['parameters/total']:,} parameters are trained, "
        f"{num_steps} steps, {job.precision.device.type} {job.precision.name}"
    )
    durable = recorder.durable
    with durable.stop.listening(), explained_memory(memory_keys):
        result: FitResult = fit(
            task, settings, num_steps, job.folder, recorder, job.precision, seed, durable, job.world
        )
    summary: dict[str, float] = {
        **result.final.metrics,
        **counts,
        "step": result.last_step,
        "best_step": result.best_step,
        "stopped_early": int(result.stopped_early),
        "samples": result.samples,
        "tokens": result.tokens,
        "time_s": result.time_s,
        "time/checkpoint_s": result.checkpoint_s,
    }
    recorder.summary(summary)
    if isinstance(recorder, RunRecorder):
        training_curves(recorder.run.plots / "training.png", recorder.run.metrics().rows, curves)
    return summary


# What decides a stage's model, by the beginning of its keys; the card names these and no more, so that one artifact
# has one card, whatever it was built for.
_CARD_KEYS = {
    "train-sft": ("sft.", "model.", "data.", "precision."),
    "train-rm": ("rm.", "data.", "rollout.temperature", "rollout.max_new_tokens", "precision."),
    "train-policy": ("algo.", "kl.", "reward.", "rm.noise", "peft.", "data.", "rollout.", "precision."),
}
_OF_THE_BUILDER = ("sft.seed", "rm.seed", "rm.member")  # the card has the seed it was trained with
_NOT_ON_CARD = (
    ".path",
    ".cache_dir",
    ".micro_batch_size",
    ".micro_batch_tokens",
    ".samples_every",
    ".gradient_checkpointing",
)


def write_card_of(
    job: Job, seed: int, base: str | None, upstream: Mapping[str, Artifact], summary: Mapping[str, float]
) -> None:
    """The model card in model/, of what decides the weights and of how good they are; nothing of when and where."""
    if not job.world.is_main:
        return
    settings = {
        key: value
        for key, value in job.flat.items()
        if key.startswith(_CARD_KEYS[job.command])
        and not key.endswith(_NOT_ON_CARD)
        and key not in _OF_THE_BUILDER
    }
    data_path = getattr(job.config.data, "path", None)
    write_card(
        job.folder / "model",
        Card(
            command=job.command,
            name=job.config.name if job.tracked else job.command.removeprefix("train-"),
            data=job.data.name,
            base_model=base,
            base_hub_id=hub_id(base),
            data_hub_id=getattr(job.config.data, "hub_id", None) if data_path is None else None,
            settings={"seed": seed, **settings},
            metrics={key: value for key, value in summary.items() if not key.startswith(_NOT_FIGURES)},
            upstream={stage: artifact.record() for stage, artifact in upstream.items()},
        ),
    )


# Of a summary: how long and how large, not how good.
_NOT_FIGURES = (
    "front/",
    "warp/i",
    "time",
    "parameters/",
    "samples",
    "tokens",
    "step",
    "best_step",
    "stopped_early",
)


def micro_batch_keys(stage: str) -> tuple[str, str]:
    """What bounds a training pass of `stage`, where its memory is exhausted."""
    return f"{stage}.train.micro_batch_size", f"{stage}.train.micro_batch_tokens"


class MemoryExhaustedError(RuntimeError):
    """The device has less memory than the run needs."""


@contextmanager
def explained_memory(keys: Sequence[str]) -> Iterator[None]:
    """Adds the remedy to an allocator's error: which keys to lower."""
    try:
        yield
    except RuntimeError as error:
        on_cpu = "can't allocate memory" in str(error)  # the CPU's allocator has no exception of its own
        if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
            raise
        remedies = [f"lower {' or '.join(keys)}", *([] if on_cpu else ["try precision=bf16"])]
        raise MemoryExhaustedError(f"out of memory; {', or '.join(remedies)} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
