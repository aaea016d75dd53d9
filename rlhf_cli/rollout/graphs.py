"""A step that is the same from time to time, replayed on a GPU as one CUDA graph; elsewhere it is called.

What is captured is a function of no argument that works in place on tensors which stay where they are, and that never
waits for the host. A kernel of a small model takes less time than its launch from Python; a graph has one launch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

# Each holds its kernels' arguments, some MB; what they work in is shared between them.
_MAX_GRAPHS = 256


@dataclass
class Capturing:
    """Whether steps are captured; where one could not be, none of the same model's is any more."""

    enabled: bool


class StepGraphs:
    """One graph for each shape of a step."""

    def __init__(self, capturing: Capturing) -> None:
        """Not enabled, every step is a call: the path of a CPU."""
        self._capturing = capturing
        self._graphs: OrderedDict[Hashable, torch.cuda.CUDAGraph] = OrderedDict()
        self._met: set[Hashable] = set()
        self._pool = torch.cuda.graph_pool_handle() if capturing.enabled else None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Does the step.

        A shape that is met for the first time is called, which warms up what its kernels need; the second time it is
        captured. One that is met once costs no capture.

        Args:
            key: all that the step depends on besides the contents of tensors.
            step: in place and without host synchronisation; not called where a graph is replayed.
        """
        if not self._capturing.enabled:
            step()
            return
        graph = self._graphs.get(key)
        if graph is None and key in self._met:
            graph = self._capture(key, step)
        if graph is None:
            self._met.add(key)
            step()
        else:
            self._graphs.move_to_end(key)
            graph.replay()

    def _capture(self, key: Hashable, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # thread_local: what other threads do (a data loader's pinned memory) breaks no capture
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step()
        except RuntimeError as error:
            _log.warning("decoding without CUDA graphs, which is slower: %s", str(error).splitlines()[0])
            # What ends a capture may have failed before it gave the stream back
            torch.cuda.set_stream(stream)
            self._capturing.enabled = False
            return None
        self._graphs[key] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


class LateCounts:
    """Small counts that come from the device without it ever waiting: the host reads those of some steps ago.

    The host stays at most `lag` steps ahead. It waits for a step that is past while the device has the next ones to do.
    """

    def __init__(self, num_counts: int, lag: int, device: torch.device) -> None:
        """Counts of the device, read `lag` steps late; 0 = at once."""
        self._is_cuda = device.type == "cuda"
        self._lag = lag
        shape = (lag + 1, num_counts)
        self._slots = torch.zeros(shape, dtype=torch.long, pin_memory=self._is_cuda)
        self._waiting: deque[tuple[int, torch.cuda.Event | None]] = deque()
        self._next = 0

    def note(self, counts: Tensor) -> None:
        """Sends a step's counts, int64 [num_counts], on their way."""
        slot = self._next % (self._lag + 1)
        self._next += 1
        self._slots[slot].copy_(counts, non_blocking=self._is_cuda)  # elsewhere nothing tells when it has come
        event = None
        if self._is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((slot, event))

    def read(self) -> list[int] | None:
        """Counts of `lag` steps ago; None where there are none yet."""
        if len(self._waiting) <= self._lag:
            return None
        slot, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        counts: list[int] = self._slots[slot].tolist()
        return counts
