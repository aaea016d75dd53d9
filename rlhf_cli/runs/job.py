"""What a stage's run needs beside its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf_cli import build
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.data.dataset import Dataset, rows_digest
from rlhf_cli.rollout.engine import Sampling
from rlhf_cli.train.distributed import ALONE, World
from rlhf_cli.train.precision import Precision
from rlhf_cli.train.recorder import RunRequest
from rlhf_cli.train.tracking import NullTracker, Tracker


@dataclass(frozen=True)
class Artifact:
    """A trained model that a later stage builds on."""

    path: str  # folder or hub id that transformers loads
    digest: str

    def record(self) -> dict[str, str]:
        """As run.json has it."""
        return {"path": self.path, "digest": self.digest}


@dataclass(frozen=True)
class Job:
    """What a stage's run needs beside its models."""

    config: RunConfig
    data: Dataset
    precision: Precision
    threads: int
    folder: Path
    command: str
    argv: Sequence[str]
    tracked: bool = True  # False for a stage that is built on the way to another
    group: str | None = None  # a sweep's name, for trackers
    flat: Mapping[str, object] = field(default_factory=dict)  # the config, for trackers
    resume: bool = False  # continue what the folder holds
    world: World = ALONE  # the processes that train together

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn that something is measured on: policies as they learn, and the reward's scale."""
        rollout = self.config.rollout
        return Sampling(rollout.max_new_tokens, rollout.temperature, rollout.max_rows)

    @property
    def sampling_of_pairs(self) -> Sampling:
        """How completions are drawn that become pairs: of the most likely tokens alone, by request."""
        rollout = self.config.rollout
        return replace(self.sampling, top_k=rollout.top_k, top_p=rollout.top_p)

    def request(
        self,
        title: str,
        seed: int,
        num_steps: int,
        keys: Sequence[str],
        upstream: Mapping[str, Artifact] | None = None,
        steps_done: Callable[[], int] | None = None,
    ) -> RunRequest:
        """What the run writes about itself."""
        return RunRequest(
            folder=self.folder,
            command=self.command,
            name=self.config.name,
            argv=self.argv,
            seed=seed,
            device=self.precision.device.type,
            threads=self.threads,
            upstream={stage: artifact.record() for stage, artifact in (upstream or {}).items()},
            title=title,
            num_steps=num_steps,
            keys=keys,
            data=self.data.name,
            rows_digest=self._rows_digest,
            make_tracker=self._tracker,
            checkpoint=self.config.checkpoint,
            resume=self.resume,
            world=self.world,
            steps_done=steps_done,
        )

    def _rows_digest(self) -> str | None:
        """Of what the command trains on; a stage built on the way has it in its folder's name."""
        data = self.data
        if not self.tracked or self.command == "eval":
            return None
        pairs = data.pairs, data.pairs_validation
        rows = {
            "train-sft": (data.sft, data.sft_validation),
            "train-rm": pairs,
            "train-policy": pairs if self.config.learns_from_pairs() else (data.prompts, data.prompts_validation),
        }
        return rows_digest(*rows[self.command])

    def _tracker(self, run_id: str, resumed_from: int | None) -> Tracker:
        if not self.tracked:
            return NullTracker()
        return build.tracker(
            self.config.logger, self.folder, run_id, resumed_from, self.config.name, self.group, self.flat
        )
