"""Peak memory of one optimizer step, each side in a process of its own.

    python scripts/benchmarks/memory.py '{"case": "dpo_step", "side": "ours", ...}'     (started by speed.py)

CPU: resident memory, VmHWM of /proc/self/status after writing 5 to /proc/self/clear_refs, less what the process had
after its imports. That has what malloc keeps of freed tensors in it; what a further step of ours had allocated at most
is told, too. CUDA: what the allocator had given out at most. The first step, which makes the optimizer's state, is over
before the peak is reset; the second one is measured.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Question:
    """Whose peak, of which step."""

    case: str
    side: str  # ours, or a setting of the peer: equal, default
    precision: str  # of both, but for default
    device: str
    threads: int
    sizes: dict[str, Any]
    folder: str  # of the saved models


def has_proc() -> bool:
    """Whether the system tells (Linux)."""
    return _STATUS.is_file() and _CLEAR.exists()


def _resident(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024


def ask(question: Question) -> dict[str, Any]:
    """The answer of a fresh process.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    line = [sys.executable, str(Path(__file__)), json.dumps(asdict(question))]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"})
    if done.returncode:
        raise RuntimeError(f"memory of {question.case}, {question.side}: {done.stderr[-1500:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def live_bytes() -> int:
    """Of all tensors that exist, each storage once."""
    import torch

    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.layout is torch.strided:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocated_bytes(function: Callable[[], object]) -> int:
    """What a call allocates on the CPU at most at one time, above what was there; as torch's profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate((num_bytes for _, num_bytes in changes), initial=0))


class _Meter:
    """Baseline, then the peak from `reset` on."""

    def __init__(self, is_cuda: bool) -> None:
        import torch

        self.cuda = torch.cuda if is_cuda else None
        self.baseline = 0 if is_cuda else _resident("VmRSS")
        self.before = 0

    def reset(self) -> None:
        """What was freed goes back to the system first, so that it does not count."""
        gc.collect()
        if self.cuda is not None:
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated()
            return
        if sys.platform == "linux":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text("5", encoding="ascii")
        self.before = _resident("VmRSS") - self.baseline

    def peak(self) -> int:
        """Bytes above the baseline."""
        if self.cuda is not None:
            return int(self.cuda.max_memory_allocated())
        return _resident("VmHWM") - self.baseline


def _measure(question: Question) -> dict[str, Any]:
    import torch

    torch.set_num_threads(question.threads)
    import our_side
    import trl_side
    import workload

    from rlhf_cli.train.precision import Precision

    is_ours = question.side == "ours"
    if not is_ours:
        import trl  # noqa: F401  its imports belong to the baseline
        from trl import DPOTrainer, RewardTrainer, RLOOTrainer  # noqa: F401
    device = torch.device(question.device)
    meter = _Meter(device.type == "cuda")
    sizes, folder = workload.sizes_from_dict(question.sizes), Path(question.folder)
    live: list[int] = []
    allocated: int | None = None
    if is_ours:
        with tempfile.TemporaryDirectory() as runs:
            steps = our_side.make_steps(question.case, sizes, Precision(question.precision, device), Path(runs))
            next(steps)
            meter.reset()
            next(steps)
            peak = meter.peak()
            live.append(live_bytes())
            if device.type == "cpu":
                allocated = live[0] + allocated_bytes(lambda: next(steps))
    else:
        flags = {"default": trl_side.DEFAULT, "equal": trl_side.equal(question.precision)}[question.side]
        found: list[int] = []

        def between(_: float) -> None:
            found.append(meter.peak())
            if len(found) == 2:
                live.append(live_bytes())
            meter.reset()

        clock = our_side.wall_clock(device)
        trl_side.TrlPeer(question.case, sizes, flags, device, folder, clock).run(2, between)
        peak = found[1]
    return {
        "peak_bytes": peak,
        "baseline_bytes": meter.baseline,
        "before_step_bytes": meter.before,
        "live_tensor_bytes": live[0],
        **({} if allocated is None else {"peak_allocated_bytes": allocated}),
    }


def limit_of(live: int, num_trained: int, vocab_size: int, chunk_tokens: int) -> dict[str, int]:
    """1.2 x everything that must be resident, plus one chunk of float32 logits; in bytes.

    Args:
        live: of the tensors that exist between two steps: models and copies as they are held, optimizer state.
        num_trained: parameters, each with a float32 gradient inside a step.
        vocab_size: logits of a position.
        chunk_tokens: positions of a chunk.

    >>> limit_of(live=1000, num_trained=50, vocab_size=10, chunk_tokens=2)
    {'gradient_bytes': 200, 'resident_bytes': 1200, 'chunk_bytes': 80, 'limit_bytes': 1520}
    """
    gradients, chunk = 4 * num_trained, 4 * chunk_tokens * vocab_size
    resident = live + gradients
    return {
        "gradient_bytes": gradients,
        "resident_bytes": resident,
        "chunk_bytes": chunk,
        "limit_bytes": round(1.2 * resident) + chunk,
    }


if __name__ == "__main__":
    print(json.dumps(_measure(Question(**json.loads(sys.argv[1])))))
