"""Checkpoints: all that a run needs to go on as if nothing had happened. Safetensors and JSON, no pickle.

    checkpoints/step-N/
        tensors.safetensors   weights and optimizer state, by name
        state.json            counters, best-so-far, baseline, scaler
        digests.json          SHA-256 of the two; written last
    checkpoints/best-N/       the model after step N, the best so far; stays while a checkpoint counts on it

A checkpoint appears under its name by one rename, after all of it has reached the disk. Loading verifies the digests: a
damaged one is reported and the one before it is used; where none is whole the run begins again, and says so.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_cli.files import naming, replace_folder_atomic
from rlhf_cli.train.stopping import StopSignal

_TENSORS, _STATE, _DIGESTS = "tensors.safetensors", "state.json", "digests.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """State after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]  # JSON


@dataclass
class Durable:
    """How a training run outlives its process."""

    checkpoints: Checkpoints
    every: int  # steps between checkpoints
    stop: StopSignal
    resume_from: Checkpoint | None = None
    is_owed: bool = False  # a checkpoint was due at a step where none could be taken


class Checkpoints:
    """The checkpoints of one run, newest last."""

    def __init__(self, folder: Path, keep: int, report: Callable[[str], None]) -> None:
        """`keep` stay on disk; `report` takes a line about each damaged one."""
        self.folder = folder
        self.keep = keep
        self.report = report

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, whole or damaged, in order."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match.group(1)) for match in matches if match)

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, then drops the oldest beyond `keep`, and those of later steps.

        Later than the step just taken are only such as `latest` found damaged: they would count as the newest.

        Raises:
            OSError: the disk is full or read-only; it names the checkpoint. Those that were there are untouched.
        """
        final = self.folder / f"step-{checkpoint.step}"
        building = self.folder / f".{final.name}.building"
        shutil.rmtree(building, ignore_errors=True)
        try:
            with naming(final):
                building.mkdir(parents=True)
                _write(building, checkpoint)
                replace_folder_atomic(building, final)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        steps = self.steps()
        count = steps.index(checkpoint.step) + 1
        for step in [*steps[: max(0, count - self.keep)], *steps[count:]]:
            shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)

    def best(self, step: int) -> Path:
        """Where the weights of the best step so far are kept."""
        return self.folder / f"best-{step}"

    def prune_best(self, step: int) -> None:
        """Removes best weights that neither the run (`step` is its best) nor a checkpoint counts on any more."""
        needed = {step, *(self._best_step(one) for one in self.steps())}
        for path in self.folder.glob("best-*"):
            if path.name not in {f"best-{one}" for one in needed}:
                shutil.rmtree(path, ignore_errors=True)

    def _best_step(self, step: int) -> int | None:
        """The best step when a checkpoint was taken; None where it is damaged."""
        try:
            state = json.loads((self.folder / f"step-{step}" / _STATE).read_text(encoding="utf-8"))
            return int(state["values"]["counters"]["best_step"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step, which is known to be whole."""
        folder = self.folder / f"step-{step}"
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        return Checkpoint(step, load_file(folder / _TENSORS), state["values"])

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None where there is none. What a kill left half-written is removed."""
        step = self.newest_step()
        return None if step is None else self.load(step)

    def newest_step(self) -> int | None:
        """The step of `latest`; its digests are verified, and its tensors stay on the disk."""
        for left in (*self.folder.glob(".step-*"), *self.folder.glob(".best-*")):
            shutil.rmtree(left, ignore_errors=True)
        for step in reversed(self.steps()):
            folder = self.folder / f"step-{step}"
            problem = damage(folder)
            if problem is None:
                return step
            self.report(f"checkpoint {folder} is damaged ({problem}); it is not used")
        return None


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    """The three files."""
    contiguous = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(contiguous, folder / _TENSORS)
    state = {"step": checkpoint.step, "values": dict(checkpoint.values)}
    (folder / _STATE).write_text(json.dumps(state, sort_keys=True), encoding="utf-8")
    digests = {name: _digest(folder / name) for name in (_TENSORS, _STATE)}
    (folder / _DIGESTS).write_text(json.dumps(digests, sort_keys=True), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None where they are as they were written."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text(encoding="utf-8"))
        for name in (_TENSORS, _STATE):
            if _digest(folder / name) != digests[name]:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters and persistent buffers by name; tied weights once. What is frozen is loaded anew."""
    persistent = set(model.state_dict())
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    named = [*trainable, *model.named_buffers()]
    return {f"model/{name}": tensor.detach() for name, tensor in named if name in persistent}


def restore_tensors(live: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's tensors into the live ones of the same names."""
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts of every parameter, by the parameter's number."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer/{number}/{name}": value.detach()
        for number, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts a checkpoint's moments back; learning rates are set anew at every step."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, number, name = key.split("/")
            state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save_batch(file: Path, micro_batches: Sequence[Any]) -> None:
    """Writes every tensor of a step's micro-batches, named <micro-batch>/<field>, to look at afterwards."""
    tensors: dict[str, Tensor] = {}
    for number, micro_batch in enumerate(micro_batches):
        tensors |= _tensors(f"{number}", micro_batch)
    save_file(tensors, file)


def _tensors(name: str, node: Any) -> dict[str, Tensor]:
    if isinstance(node, Tensor):
        return {name: node.detach().cpu().contiguous().clone()}
    if not is_dataclass(node):
        return {}
    parts = (_tensors(f"{name}/{item.name}", getattr(node, item.name)) for item in fields(node))
    return {key: tensor for part in parts for key, tensor in part.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
