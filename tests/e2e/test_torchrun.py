"""Several processes that train together: the figures of one, and the same promises about kills and resuming."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.e2e.fixtures_e2e import LOADED, RLHF, Done, content, environment, ok, rows, run, timeless

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
SMALL = ["experiment=smoke", "device=cpu", "precision=fp32", "threads=1"]
TOLERANCE = 1e-4  # relative to 1 or to the figure: sums of float32 in another order, over a few steps


def together(number: int) -> list[str]:
    """`rlhf` in that many processes."""
    return [*TORCHRUN, str(number), "-m", "rlhf_cli"]


def assert_equal_figures(one: Path, several: Path, weights: float = 1e-5) -> None:
    first, second = rows(one / "metrics.jsonl"), rows(several / "metrics.jsonl")
    assert len(first) == len(second) > 0
    for a, b in zip(map(timeless, first), map(timeless, second), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=TOLERANCE, abs=TOLERANCE), (a["step"], key)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, several))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) < weights


def samples(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row["prompt"], row["completion"], row["length"]) for row in rows(folder / "samples.jsonl")
    ]


def stage(work: Path, cache: str, name: str) -> Path:
    (folder,) = (work / cache).glob(f"{name}-*")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline in one process and in two, each with a cache of its own."""
    folder = tmp_path_factory.mktemp("together")
    steps = [
        "sft.train.steps=6",
        "sft.train.eval_every=3",
        "rm.train.steps=6",
        "rm.train.eval_every=4",
        # two optimizer batches and two passes of each rollout; shares of two prompts
        "algo.train.steps=8",
        "algo.rollout_batch_size=16",
        "algo.num_epochs=2",
        "algo.train.eval_every=4",
    ]
    line = ["train-policy", *SMALL, *steps]
    ok([*line, "run_dir=one", "stages.cache_dir=cache1"], folder, program=LOADED)
    ok([*line, "run_dir=two", "stages.cache_dir=cache2"], folder, program=together(2))
    return folder


def test_two_processes_give_the_figures_of_one_in_every_stage(work: Path):
    for name in ("sft", "rm"):
        assert_equal_figures(stage(work, "cache1", name), stage(work, "cache2", name))
    # Two caches: the models behind these differ in their last bits, and Adam makes steps of lr=5e-4 of any gradient
    assert_equal_figures(work / "one", work / "two", weights=1e-4)


def test_two_processes_sample_the_same_tokens(work: Path):
    assert samples(work / "one") == samples(work / "two") != []


def test_one_process_writes_and_the_record_says_how_many_there_were(work: Path):
    names = [{str(p.relative_to(work / run)) for p in (work / run).rglob("*")} for run in ("one", "two")]
    assert names[0] == names[1]
    assert content(work / "two" / "run.json")["processes"] == 2
    assert content(work / "one" / "run.json")["processes"] == 1
    first, second = (content(work / run / "summary.json") for run in ("one", "two"))
    assert first.keys() == second.keys() and first["samples"] == second["samples"]


UNEVEN = {"reinforce": 5, "ppo": 5, "raft": 5, "warp": 2}


@pytest.fixture(scope="module")
def uneven(work: Path) -> tuple[Path, Done]:
    """Each algorithm in one process and in three, and what the three said of all algorithms."""
    given = [f"{name}.path={stage(work, 'cache1', name)}" for name in ("sft", "rm")]
    lines = []
    for algo, steps in UNEVEN.items():
        few = ["algo.k=2", f"algo.train.steps={steps}", "algo.train.samples_every=1"]
        line = ["train-policy", *SMALL, *given, f"algo={algo}", *few]
        ok([*line, f"run_dir={algo}1"], work, program=LOADED)
        lines.append([free_port(), [*line, f"run_dir={algo}3"]])
    ranks = str(Path(__file__).with_name("ranks.py"))
    return work, ok([json.dumps(lines)], work, program=(*TORCHRUN, "3", ranks))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize("algo", UNEVEN)
def test_three_processes_with_uneven_shares(uneven: tuple[Path, Done], algo: str):
    """Eight samples are four prompts of two: shares of two, one and one.

    The moving baseline, the whitening of advantages and the number of tokens are of the whole batch.
    """
    folder, done = uneven
    assert_equal_figures(folder / f"{algo}1", folder / f"{algo}3")
    assert samples(folder / f"{algo}1") == samples(folder / f"{algo}3") != []
    assert content(folder / f"{algo}3" / "run.json")["processes"] == 3
    assert done.err.count("parameters are trained") == len(UNEVEN), "said once, not by each process"


class Together:
    """A run in two processes, and what can happen to them."""

    def __init__(self, arguments: Sequence[str], cwd: Path) -> None:
        self.process = subprocess.Popen(
            [*together(2), *arguments],
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def at_row(self, folder: Path, number: int) -> None:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").is_file() or len(rows_so_far(folder)) < number:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def worker(self, rank: int) -> int:
        """The process with that rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                return int(child)
        raise AssertionError(f"no process of rank {rank} among {children}")

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=120)
        return self.process.returncode, out


def rows_so_far(folder: Path) -> list[bytes]:
    return (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_both_end_when_one_is_killed_and_the_run_goes_on_to_the_bit(work: Path):
    given = [f"{name}.path={stage(work, 'cache1', name)}" for name in ("sft", "rm")]
    line = ["train-policy", *SMALL, *given, "algo=reinforce", "algo.train.steps=60", "checkpoint.every=7"]
    ok([*line, "run_dir=whole"], work, program=together(2))
    resumed = [*line, "run_dir=killed", "resume=auto"]
    started = Together(resumed, work)
    started.at_row(work / "killed", 12)
    workers = [started.worker(0), started.worker(1)]
    os.kill(workers[1], signal.SIGKILL)
    status, out = started.end()
    assert status != 0 and all(gone(pid) for pid in workers), out
    # Whichever comes first: the lost connection, or torchrun, which stops those that are left
    assert "another process of this run has ended" in out or "stopped by SIGTERM" in out
    assert content(work / "killed" / "run.json")["status"] in ("failed", "interrupted")
    started = Together(resumed, work)
    started.at_row(work / "killed", 40)
    started.process.send_signal(signal.SIGTERM)
    _, out = started.end()
    assert "stopped by SIGTERM" in out, out
    assert content(work / "killed" / "run.json")["status"] == "interrupted"
    assert len(rows_so_far(work / "killed")) == newest(work / "killed"), "the step that was under way is kept"
    ok(resumed, work, program=together(2))
    assert [timeless(row) for row in rows(work / "whole" / "metrics.jsonl")] == [
        timeless(row) for row in rows(work / "killed" / "metrics.jsonl")
    ]
    first, second = ((work / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "killed"))
    assert first == second


def newest(folder: Path) -> int:
    """Step of the newest checkpoint."""
    return max(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def test_a_run_that_is_still_written_is_not_taken_twice(work: Path):
    line = ["train-sft", *SMALL, "sft.train.steps=4000", "run_dir=busy", "resume=auto"]
    with subprocess.Popen([*RLHF, *line], cwd=work, env=environment(), stderr=subprocess.DEVNULL) as first:
        try:
            deadline = time.monotonic() + 120
            while not (work / "busy" / "metrics.jsonl").is_file():
                assert first.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            second = run(line, work)
            assert second.status == 2
            assert second.last_line.endswith("busy: another process is still writing this run")
            assert first.poll() is None
        finally:
            first.kill()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "policies=[two]"], "eval runs in one process, not in 2: start it without torchrun"),
        (["train-sft", "seed=0,1", "-m"], "a sweep starts its jobs itself"),
        (
            ["train-policy", "algo.k=4", "algo.train.batch_size=4"],
            "algo.train.batch_size=4: expected at least the 2 processes x algo.k=4",
        ),
        (["train-sft", "sft.train.lr=fast"], "sft.train.lr=fast"),
    ],
)
def test_what_several_processes_cannot_do_is_said_once(arguments: list[str], message: str, work: Path):
    before = sorted(work.iterdir())
    done: Done = run([arguments[0], *SMALL, *arguments[1:]], work, program=together(2))
    assert done.status != 0
    lines = [line for line in done.err.splitlines() if line.startswith("rlhf: ")]
    assert len(lines) == 1 and message in lines[0], done.err
    assert "exitcode  : 2" in done.err
    assert "in rlhf_cli" not in done.err, "no traceback"
    assert sorted(work.iterdir()) == before
