"""Checkpoints: nothing half-written is read, damage is reported, the optimizer comes back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from rlhf_cli.train import checkpoint as module
from rlhf_cli.train.checkpoint import (
    Checkpoint,
    Checkpoints,
    damage,
    model_tensors,
    optimizer_tensors,
    restore_optimizer,
    restore_tensors,
    save_batch,
)
from rlhf_cli.types import Sequences


class Tied(nn.Module):
    """An embedding that is also the output layer, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=True)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(2))
        self.register_buffer("scratch", torch.rand(2), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def trained(seed: int, steps: int) -> tuple[Tied, torch.optim.AdamW]:
    model = Tied(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for step in range(steps):
        one_step(model, optimizer, step)
    return model, optimizer


def one_step(model: Tied, optimizer: torch.optim.AdamW, step: int) -> None:
    optimizer.zero_grad()
    model(torch.tensor([step % 5, 1])).square().sum().backward()
    optimizer.step()


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def checkpoints(tmp_path: Path, reports: list[str]) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2, report=reports.append)


def saved(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.full((3,), float(step))}, {"counters": {"step": step}})


def test_a_run_taken_up_again_goes_on_to_the_bit(checkpoints: Checkpoints):
    model, optimizer = trained(0, 3)
    checkpoints.save(Checkpoint(3, {**model_tensors(model), **optimizer_tensors(optimizer)}, {}))
    other, other_optimizer = trained(1, 0)
    loaded = checkpoints.latest()
    assert loaded is not None
    restore_tensors(model_tensors(other), loaded.tensors)
    restore_optimizer(other_optimizer, loaded.tensors)
    for step in range(3, 6):
        one_step(model, optimizer, step)
        one_step(other, other_optimizer, step)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_tied_weights_are_stored_once_and_scratch_buffers_not_at_all():
    assert sorted(model_tensors(Tied(0))) == ["model/embed.weight", "model/head.bias", "model/scale"]


def test_the_newest_is_read_and_the_oldest_are_dropped(checkpoints: Checkpoints):
    for step in (10, 20, 30):
        checkpoints.save(saved(step))
    assert checkpoints.steps() == [20, 30]
    latest = checkpoints.latest()
    assert latest is not None
    assert (latest.step, latest.values) == (30, {"counters": {"step": 30}})
    assert latest.tensors["a"].tolist() == [30.0, 30.0, 30.0]


def test_no_checkpoint_is_none(checkpoints: Checkpoints):
    assert checkpoints.latest() is None


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "digests.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "delete"])
def test_a_damaged_newest_one_is_reported_and_the_one_before_is_used(
    checkpoints: Checkpoints, reports: list[str], name: str, harm: str
):
    checkpoints.save(saved(1))
    checkpoints.save(saved(2))
    file = checkpoints.folder / "step-2" / name
    data = bytearray(file.read_bytes())
    if harm == "truncate":
        file.write_bytes(bytes(data[: len(data) // 2]))
    elif harm == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(bytes(data))
    else:
        file.unlink()
    latest = checkpoints.latest()
    assert latest is not None
    assert latest.step == 1
    assert len(reports) == 1
    assert "step-2" in reports[0]


def test_the_newest_step_is_that_of_the_newest_whole_one_and_reads_no_tensors(
    checkpoints: Checkpoints, reports: list[str], monkeypatch: pytest.MonkeyPatch
):
    assert checkpoints.newest_step() is None
    for step in (9, 10):  # as numbers, not as names
        checkpoints.save(saved(step))
    for left in (".step-11.building", ".best-9.building"):
        (checkpoints.folder / left).mkdir()

    def load(file: Path) -> None:
        pytest.fail(f"{file} was loaded")

    monkeypatch.setattr(module, "load_file", load)
    assert checkpoints.newest_step() == 10
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-10", "step-9"]
    (checkpoints.folder / "step-10" / "tensors.safetensors").write_bytes(b"short")
    assert checkpoints.newest_step() == 9
    assert len(reports) == 1 and "step-10" in reports[0]
    (checkpoints.folder / "step-9" / "digests.json").unlink()
    assert checkpoints.newest_step() is None


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_do_not_count_as_the_newest(tmp_path: Path, keep: int):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=keep, report=lambda _: None)
    for step in (2, 4):
        checkpoints.save(saved(step))
    for step in checkpoints.steps():
        (checkpoints.folder / f"step-{step}" / "state.json").unlink()
    assert checkpoints.latest() is None
    checkpoints.save(saved(1))
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 1
    assert checkpoints.steps() == [1]


def test_a_half_written_one_is_not_seen_and_removed(checkpoints: Checkpoints, reports: list[str]):
    checkpoints.save(saved(1))
    for left in (".step-2.building", ".step-3.building", ".step-1.old"):
        (checkpoints.folder / left).mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.save(saved(2))
    assert checkpoints.steps() == [1, 2]
    latest = checkpoints.latest()
    assert latest is not None and latest.step == 2
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-1", "step-2"]
    assert reports == []


@pytest.mark.parametrize(
    ("fails", "refusal"),
    [
        ("save_file", SafetensorError("Error while serializing: I/O error: No space left (os error 28)")),
        ("save_file", OSError(28, "No space left")),
        ("replace_folder_atomic", OSError(28, "No space left")),
    ],
)
def test_a_full_disk_leaves_the_ones_before_untouched(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, fails: str, refusal: Exception
):
    checkpoints.save(saved(1))

    def full(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(module, fails, full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoints.save(saved(2))
    assert (caught.value.errno, caught.value.filename) == (28, str(checkpoints.folder / "step-2"))
    assert damage(checkpoints.folder / "step-1") is None
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-1"]


def test_a_batch_is_saved_tensor_by_tensor(tmp_path: Path):
    sequences = Sequences(torch.tensor([[1, 2]]), torch.tensor([[True, True]]), torch.tensor([[False, True]]))
    save_batch(tmp_path / "batch.safetensors", [sequences, sequences])
    stored = load_file(tmp_path / "batch.safetensors")
    assert stored["1/ids"].tolist() == [[1, 2]]
    assert sorted(stored) == sorted(
        f"{i}/{name}" for i in (0, 1) for name in ("ids", "attention_mask", "completion_mask")
    )
