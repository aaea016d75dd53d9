"""train-rm with several models: what they all start from, and each of them; `merged_reward` makes them into one.

Rame et al. 2024 (arXiv:2401.12187): members start from one backbone under one linearly probed head and differ in the
order of the rows, learning rate, dropout and, where the SFT run kept some, the SFT checkpoint.
"""

from __future__ import annotations

import shutil
import time

from rlhf_cli import build
from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.files import write_folder_atomic
from rlhf_cli.models.dropout import set_dropout
from rlhf_cli.models.loading import load_backbone_as_classifier
from rlhf_cli.rewards.model import load_reward_model
from rlhf_cli.rewards.settings import MembersRm
from rlhf_cli.runs.common import write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.reward import KEYS, check_rows, fit_reward_model, memorised, probe, training_pairs
from rlhf_cli.train.recorder import shared_run


def train_start(job: Job, seed: int, sft: Artifact) -> None:
    """What all members start from: a backbone under a fresh head, or one that has been probed on it."""
    rm: MembersRm = job.config.rm
    upstream = {"sft": sft} if build.starts_from_sft(job.config) else {}
    with shared_run(job.request(f"rm {rm.name} start", seed, max(1, rm.probe_steps), (), upstream)) as recorder:
        began = time.perf_counter()
        reward_model = build.new_reward_model(job.config, sft.path, job.precision.device, seed)
        check_rows(job, recorder, reward_model)
        for rate in rm.dropouts:  # before the first member finds out
            set_dropout("rm.dropouts", reward_model.model, rate)
        if rm.probe_steps:
            probe(job, recorder, seed, reward_model, training_pairs(job))
        if job.world.is_main:
            write_folder_atomic(reward_model.save, job.folder / "model")
        recorder.summary({"time_s": time.perf_counter() - began})


def train_member(job: Job, seed: int, start: Artifact, snapshot: Artifact | None, base: str | None) -> None:
    """One of several reward models.

    Args:
        job: its config's `rm` is the member's own.
        seed: of the member.
        start: backbone and head.
        snapshot: an SFT checkpoint whose backbone stands in for the start's; None = the start's own.
        base: what an adapter would lie on; None where the start's backbone has learned nothing yet.
    """
    rm, device = job.config.rm, job.precision.device
    pairs = training_pairs(job)
    num_steps = rm.train.num_steps(len(pairs))
    upstream = {"start": start} | ({} if snapshot is None else {"sft": snapshot})
    with shared_run(job.request(f"rm {rm.name} member", seed, num_steps, KEYS, upstream)) as recorder:
        reward_model = load_reward_model("rm.start", start.path, device)
        reward_model.format = build.reward_format(job.config)
        if snapshot is not None:
            other, _ = load_backbone_as_classifier("sft.snapshots", snapshot.path, device, seed)
            reward_model.model.base_model.load_state_dict(other.base_model.state_dict())
        figures = fit_reward_model(job, recorder, seed, reward_model, pairs, base)
        trained = str(job.folder / "model")
        figures |= memorised(job, lambda: load_reward_model("rm.path", trained, device), pairs)
        recorder.summary(figures)
        write_card_of(job, seed, start.path, upstream, figures)


def publish_member(job: Job, seed: int, sft: Artifact, member: Artifact) -> None:
    """The one member that was asked for, as a run of its own; the cache keeps the original."""
    title = f"rm {job.config.rm.name} member"
    with shared_run(job.request(title, seed, 1, (), {"sft": sft, "member": member})) as recorder:
        began = time.perf_counter()
        if job.world.is_main:
            write_folder_atomic(
                lambda folder: shutil.copytree(member.path, folder, dirs_exist_ok=True), job.folder / "model"
            )
        reward_model = load_reward_model("rm.path", member.path, job.precision.device)
        found = score_pairs(reward_model, job.data.pairs_validation, job.precision)
        recorder.summary({"rm/accuracy": found.accuracy, "loss": found.nll, "time_s": time.perf_counter() - began})
