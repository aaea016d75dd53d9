"""Kills training runs with SIGKILL at random moments, resumes them until they are done, and compares to the bit.

    python scripts/kill_and_resume.py --kills 30

For every stage an undisturbed run is the reference. A disturbed run is started with the same command plus
resume=auto, killed at a random moment (while it starts, rolls out, steps, evaluates, writes a checkpoint, or settles
its weights after the last step), started again, and so on until it finishes; then another one is begun, until the stage
has had its share of kills. Rows before the newest checkpoint have to stay byte for byte at each kill; metrics and
summary (time, throughput and memory aside), samples and weights of each finished run have to equal the reference's. A
kill counts only if it hit a run that is compared in the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

STAGES = {  # command and arguments
    "train-sft": ["train-sft", "sft.train.steps=60", "sft.train.eval_every=15"],
    "train-rm": ["train-rm", "rm.train.steps=40", "rm.train.eval_every=10"],
    "train-policy": ["train-policy", "algo=reinforce", "algo.train.steps=40", "algo.train.eval_every=10"],
    "warp": ["train-policy", "algo=warp", "algo.T=10", "algo.train.eval_every=4"],
    "best-before-last": [  # the rate rises to the end, and the weights get worse and worse
        "train-sft",
        *(f"sft.train.{line}" for line in ("lr=10", "warmup_ratio=1", "select=best", "steps=30", "eval_every=3")),
    ],
}
SMALL = ["experiment=smoke", "device=cpu", "precision=fp32", "threads=1", "checkpoint.every=4"]
# In turn: anywhere in a step (rollout, forward, backward, evaluation), inside a checkpoint, anywhere between the last
# row and the end of the process, anywhere in the start.
MOMENTS = ("step", "checkpoint", "end", "start", "step", "checkpoint", "end", "end", "step")
START_S, STEP_S = 6.0, 0.2
UNTIMED = ("time_s", "time/", "throughput/", "memory/")


def main() -> int:
    """Runs the harness; 0 where every disturbed run equals its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="kills in all, shared between the stages")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--work", type=Path, default=Path("outputs/kill-and-resume"))
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES))
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    moments = random.Random(options.seed)
    failures = 0
    for place, stage in enumerate(options.stages):
        share = options.kills // len(options.stages) + (place < options.kills % len(options.stages))
        failures += not Check(stage, options.work, moments).passes(share)
    print(
        f"{len(options.stages) - failures} of {len(options.stages)} stages equal to the bit after {options.kills} kills"
    )
    return 1 if failures else 0


class Check:
    """One stage: its reference, and disturbed runs that are compared with it."""

    def __init__(self, stage: str, work: Path, moments: random.Random) -> None:
        self.stage = stage
        self.moments = moments
        self.cache = f"stages.cache_dir={work / 'cache'}"
        self.reference = work / f"{stage}-reference"
        self.disturbed = work / f"{stage}-disturbed"
        self.line = [*command(stage, self.disturbed, self.cache), "resume=auto"]
        self.num_rows = 0
        self.settling_s = 0.0  # from the last row to the end of the process, undisturbed
        self.problems: list[str] = []

    def passes(self, kills: int) -> bool:
        """Kills until the share is had and the last run has finished; prints what is not equal."""
        self._refer()
        counted = pending = 0  # kills of runs that were compared; of the one that is under way
        while counted + pending < kills:
            moment = MOMENTS[(counted + pending) % len(MOMENTS)]
            if self._killed(moment):
                pending += 1
                print(
                    f"{self.stage}: kill {counted + pending}, {moment}, at {position(self.disturbed)}", flush=True
                )
            else:  # it finished in peace, and is one to compare
                counted, pending = counted + pending, 0
                self._compare()
                shutil.rmtree(self.disturbed)
        before = kept(self.disturbed)
        subprocess.run(self.line, check=True, **silent())
        self._check_kept(before)
        self._compare()
        return not self.problems

    def _refer(self) -> None:
        """The undisturbed run."""
        process = subprocess.Popen(command(self.stage, self.reference, self.cache), **silent())
        last_row = time.monotonic()
        while process.poll() is None:
            now = count(self.reference / "metrics.jsonl")
            if now > self.num_rows:
                self.num_rows, last_row = now, time.monotonic()
            time.sleep(0.002)
        self.settling_s = time.monotonic() - last_row
        if process.returncode != 0:
            raise SystemExit(f"{self.stage}: the undisturbed run ended with status {process.returncode}")
        summary = json.loads((self.reference / "summary.json").read_text(encoding="utf-8"))
        if self.stage == "best-before-last":
            assert summary["best_step"] < summary["step"], "the best weights are to be of an earlier step"

    def _killed(self, moment: str) -> bool:
        """Starts the run and kills it at the moment; False where it finished before."""
        before, record = kept(self.disturbed), stamp(self.disturbed / "run.json")
        first = newest(self.disturbed) + 1
        target = self.moments.randint(first, max(first, self.num_rows - 1))
        longest = {"start": START_S, "step": STEP_S, "checkpoint": 0.0, "end": self.settling_s}[moment]
        delay = self.moments.uniform(0.0, longest)
        process = subprocess.Popen(self.line, start_new_session=True, **silent())
        reached = None
        while process.poll() is None:
            if reached is None and self._is_reached(moment, target, record):
                reached = time.monotonic()
            if reached is not None and time.monotonic() - reached >= delay:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.0005)
        self._check_kept(before)
        if process.returncode > 0:
            raise SystemExit(f"{self.stage}: {' '.join(self.line)} ended with status {process.returncode}")
        return process.returncode < 0

    def _is_reached(self, moment: str, target: int, record: int) -> bool:
        """Whether the process is where the kill is aimed at."""
        if moment == "start":
            return True
        if stamp(self.disturbed / "run.json") == record:
            return False  # what the start before left is only cleared away by the time the record is written
        if moment == "checkpoint":
            return any(self.disturbed.glob("**/checkpoints/.*.building"))
        return count(self.disturbed / "metrics.jsonl") >= (self.num_rows if moment == "end" else target)

    def _check_kept(self, before: dict[str, bytes]) -> None:
        """Rows before a checkpoint are never written again."""
        for name, beginning in before.items():
            file = self.disturbed / name
            if not (file.exists() and file.read_bytes().startswith(beginning)):
                self._found(f"{name} has changed before the checkpoint that was there")

    def _compare(self) -> None:
        for problem in differences(self.reference, self.disturbed):
            self._found(problem)

    def _found(self, problem: str) -> None:
        self.problems.append(problem)
        print(f"{self.stage}: {problem}", flush=True)


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, 0 where there is none; of a run of several members, over all of them."""
    steps = max((int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")), default=0)
    for member in folder.glob("members/*"):
        end = member / "finished.json"
        steps += json.loads(end.read_text(encoding="utf-8"))["step"] if end.exists() else newest(member)
    return steps


def kept(folder: Path) -> dict[str, bytes]:
    """What no later start may change: the rows up to the newest checkpoint."""
    step, beginnings = newest(folder), dict[str, bytes]()
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            whole = (folder / name).read_bytes().split(b"\n")[:-1]  # a torn last line does not count
            lines = [line + b"\n" for line in whole if json.loads(line)["step"] <= step]
            beginnings[name] = b"".join(lines)
    return beginnings


def stamp(file: Path) -> int:
    """Changes when a file is written."""
    return file.stat().st_mtime_ns if file.exists() else 0


def count(file: Path) -> int:
    """Lines of a file that is being written."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def command(stage: str, folder: Path, *extra: str) -> list[str]:
    """The command line of a run."""
    name, *arguments = STAGES[stage]
    return [sys.executable, "-m", "rlhf_cli", name, *SMALL, *arguments, f"run_dir={folder}", *extra]


def differences(reference: Path, disturbed: Path) -> list[str]:
    """What is not equal to the bit."""
    found = []
    ours, theirs = rows(reference / "metrics.jsonl"), rows(disturbed / "metrics.jsonl")
    if ours != theirs:
        steps = [a.get("step") for a, b in zip(ours, theirs, strict=False) if a != b]
        found.append(f"metrics differ: {len(ours)} and {len(theirs)} rows, first at step {steps[:1]}")
    if summary(reference) != summary(disturbed):
        found.append("summary differs")
    if rows(reference / "samples.jsonl") != rows(disturbed / "samples.jsonl"):
        found.append("samples differ")
    for name in ("model", "model_best", "model_last", "front"):
        if weights(reference / name) != weights(disturbed / name):
            found.append(f"{name} differs")
    status = json.loads((disturbed / "run.json").read_text())["status"]
    return found if status == "finished" else [*found, f"status is {status}"]


def rows(file: Path) -> list[dict[str, object]]:
    """The lines of a file without what is measured by the clock."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # a torn last line does not count
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(UNTIMED)} for line in lines
    ]


def summary(folder: Path) -> dict[str, object]:
    """summary.json without what is measured by the clock."""
    values = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if not key.startswith(UNTIMED)}


def weights(folder: Path) -> list[tuple[str, str]]:
    """Digests of a model folder's files."""
    return [
        (file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    ]


def position(folder: Path) -> str:
    """Where a killed run was."""
    steps = count(folder / "metrics.jsonl")
    half_written = sorted(path.name for path in folder.glob("**/.*.building")) if folder.exists() else []
    return f"step {steps}" + (f", while writing {', '.join(half_written)}" if half_written else "")


def silent() -> dict[str, object]:
    """Keyword arguments of a run whose output nobody reads."""
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


if __name__ == "__main__":
    sys.exit(main())
