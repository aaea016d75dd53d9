"""Several processes that train one model together, as torchrun starts them.

Each process holds the whole model and works on its share of every batch: prompts in a rollout, rows or pairs elsewhere.
Losses are divided by the whole batch's normaliser, so the gradients of the processes add up to the gradient of one
process with the same batch. What a person or an algorithm sees (rewards, baselines, metrics) is of the whole batch.
The main process, rank 0, takes every decision and writes every file; the others share its file system.

A process that is alone goes the same way through every function here and never communicates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cli.errors import PeerLostError, RequestError, ToldElsewhereError, bad_value
from rlhf_cli.train.stopping import STOP, StopRequested

T = TypeVar("T")

# One may wait for the main process, which waits for another run to train a stage; a dead one is noticed at once anyway.
_PATIENCE = timedelta(days=7)

_BUCKET_ELEMENTS = 1 << 23  # gradients sent together, 32 MiB in float32


@contextmanager
def _exchange() -> Iterator[None]:
    """Around every exchange: the libraries below report a lost process in words of their transport."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLostError(
            "another process of this run has ended; what it said, or torchrun, tells why"
        ) from error


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. All have to make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine: the number of its CUDA device
    control: Any = None  # a gloo group for small things on the CPU; None = alone

    @property
    def is_main(self) -> bool:
        """Whether this one decides and writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process' part of n rows: contiguous, in the order of ranks, sizes at most one apart.

        >>> [World(rank, 3).share(7) for rank in range(3)]
        [slice(0, 3, None), slice(3, 5, None), slice(5, 7, None)]
        """
        base, rest = divmod(n, self.size)
        start = self.rank * base + min(self.rank, rest)
        return slice(start, start + base + (self.rank < rest))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, in float64; the same bits in each."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.float64)
        with _exchange():
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.control)
        return [float(value) for value in tensor]

    def max(self, values: Sequence[float]) -> list[float]:
        """Maxima over the processes; nan where one has nan."""
        if self.size == 1:
            return list(values)
        # what MAX makes of nan is up to the library
        rows = self.gather(torch.tensor([list(values)], dtype=torch.float64))
        return [float(value) for value in rows.amax(dim=0)]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes in the order of ranks.

        Args:
            rows: [n, ...] on the CPU; n may differ between processes, the rest may not.
        """
        if self.size == 1:
            return rows
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(sizes, torch.tensor([len(rows)]), group=self.control)
        longest = max(int(size) for size in sizes)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _exchange():
            dist.all_gather(parts, padded, group=self.control)
        return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])

    def gather_json(self, rows: Sequence[T]) -> list[T]:
        """The rows of all processes, JSON values, in the order of ranks."""
        if self.size == 1:
            return list(rows)
        encoded = torch.frombuffer(bytearray(json.dumps(list(rows)).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(encoded)]))
        text = bytes(self.gather(encoded).tolist())
        result, start = [], 0
        for length in lengths.tolist():
            result += json.loads(text[start : start + length])
            start += length
        return result

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives in the main process, a JSON value, in all of them; it is called nowhere else.

        Raises:
            RequestError: in all of them, where it does in the main process.
        """
        if self.size == 1:
            return make()
        if not self.is_main:
            answer = self._broadcast(None)
            if "refused" in answer:
                raise ToldElsewhereError(answer["refused"])
            return answer["value"]
        try:
            value = make()
        except RequestError as error:
            self._broadcast({"refused": str(error)})
            raise
        self._broadcast({"value": value})
        return value

    def barrier(self) -> None:
        """Waits until all are here."""
        if self.size > 1:
            with _exchange():
                dist.barrier(group=self.control)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces every gradient by its sum over the processes, in buckets that travel side by side."""
        if self.size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sent = []
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            with _exchange():
                sent.append((bucket, flat, dist.all_reduce(flat, op=dist.ReduceOp.SUM, async_op=True)))
        for bucket, flat, work in sent:
            assert work is not None
            with _exchange():
                work.wait()
            parts = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites the tensors by the main process' ones."""
        if self.size > 1:
            with torch.no_grad(), _exchange():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0)

    def _broadcast(self, value: Mapping[str, Any] | None) -> Any:
        """A JSON object of the main process."""
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(encoded)])
        with _exchange():
            dist.broadcast(length, src=0, group=self.control)
        if not self.is_main:
            encoded = torch.empty(int(length), dtype=torch.uint8)
        with _exchange():
            dist.broadcast(encoded, src=0, group=self.control)
        return json.loads(bytes(encoded.tolist()))


ALONE = World()

_current = ALONE


def current() -> World:
    """The processes that this one has joined."""
    return _current


@contextmanager
def joined() -> Iterator[World]:
    """Joins the processes that torchrun (or another launcher that sets the same variables) started.

    They part at the end, after an error too: threads of the transport that are left when the interpreter ends can
    abort the process, and its exit status would be lost.
    """
    global _current
    on_cuda = torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    _current = World(dist.get_rank(), dist.get_world_size(), local_rank, control)
    try:
        yield _current
    finally:
        _current = ALONE
        with suppress(RuntimeError):  # a lost process is no news any more
            dist.destroy_process_group()


def own_device(device: torch.device, world: World) -> torch.device:
    """The device of this process: each has a CUDA device of its own.

    Raises:
        RequestError: the machine has fewer than it has processes.
    """
    if world.size == 1 or device.type != "cuda":
        return device
    num_devices = torch.cuda.device_count()
    if world.max([float(world.local_rank >= num_devices)])[0]:  # all of them end, and the main one says why
        expected = f"at most {num_devices} processes on a machine, one for each CUDA device"
        error = bad_value("device", "cuda", expected)
        raise error if world.is_main else ToldElsewhereError(str(error))
    own = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(own)
    return own


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Cuts a list of tensors into runs of one dtype and a bounded number of elements."""
    buckets: list[list[Tensor]] = []
    elements = 0
    for tensor in tensors:
        fits = buckets and buckets[-1][0].dtype == tensor.dtype and elements + tensor.numel() <= _BUCKET_ELEMENTS
        if not fits:
            buckets.append([])
            elements = 0
        buckets[-1].append(tensor)
        elements += tensor.numel()
    return buckets


def stop_if_asked(world: World) -> None:
    """Raises StopRequested where a signal came to any of the processes; waits for all.

    For places between two fits: a signal in the last step of one lets it end, but not the next one begin.
    """
    number = int(world.max([STOP.requested or 0])[0])
    if number:
        raise StopRequested(number)
