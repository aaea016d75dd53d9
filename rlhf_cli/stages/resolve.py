"""sft -> rm -> policy: finds the model a stage needs, or trains it once and keeps it under a digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from rlhf_cli.build import rm_base, starts_from_sft
from rlhf_cli.errors import RequestError, bad_value
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.rewards.format import has_format
from rlhf_cli.rewards.settings import MembersRm, RmConfig
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.members import train_member, train_start
from rlhf_cli.runs.merged_reward import merge_members
from rlhf_cli.runs.reward import train_rm
from rlhf_cli.runs.sft import SNAPSHOTS, train_sft
from rlhf_cli.stages.cache import Say, cached
from rlhf_cli.stages.keys import (
    file_digest,
    merged_rm_key,
    rm_key,
    rm_member_key,
    rm_start_key,
    sft_key,
)
from rlhf_cli.train.seeding import derive_seed


def resolve_sft(job: Job, say: Say) -> Artifact:
    """The SFT model: the given one, a cached one, or one trained now."""
    config = job.config
    if config.sft.path is not None:
        return _given("sft.path", config.sft.path, say)
    key = sft_key(job)
    return cached(job, key, say, lambda folder: train_sft(_stage_job(job, folder, "train-sft"), config.sft.seed))


def resolve_rm(job: Job, sft: Callable[[], Artifact], say: Say) -> Artifact:
    """The reward model: the given one, a cached one, or one trained now.

    Args:
        job: what needs it.
        sft: gives the SFT model; called only where the reward model is not given.
        say: takes lines for the person watching.
    """
    config = job.config
    if config.rm.path is not None:
        return _given("rm.path", config.rm.path, say)
    upstream = sft()
    if not config.rm.has_members:
        key = rm_key(job, upstream)
        return cached(
            job, key, say, lambda folder: train_rm(_stage_job(job, folder, "train-rm"), config.rm.seed, upstream)
        )
    members = resolve_members(job, upstream, say)
    return cached(
        job,
        merged_rm_key(job, upstream, members),
        say,
        lambda folder: merge_members(_stage_job(job, folder, "train-rm"), config.rm.seed, upstream, members),
    )


def resolve_members(job: Job, sft: Artifact, say: Say) -> list[Artifact]:
    """The reward models that one is made of, or the one that `rm.member` asks for: cached, or trained now.

    Members are trained one after the other. Several processes that are started for one member each share the start,
    and what they train is found by the one that asks for all.
    """
    rm: MembersRm = job.config.rm
    start_key = rm_start_key(job, sft)
    start = cached(
        job, start_key, say, lambda folder: train_start(_stage_job(job, folder, "train-rm"), rm.seed, sft)
    )
    begins: list[Artifact | None] = [None, *_snapshots(job, sft)]
    if len(begins) > 1:
        say(f"rm: members start in turn from the SFT model and from {len(begins) - 1} snapshots on the way to it")
    base = None if rm_base(job.config, sft.path) is None else start.path
    numbers = range(rm.members) if rm.member is None else [rm.member]
    found = []
    for number in numbers:
        member = rm.of_member(number, derive_seed(rm.seed, "member", number), len(begins))
        snapshot = begins[number % len(begins)]
        say(f"rm: member {number} of {rm.members}, {_described(member, len(begins), snapshot)}")
        train = partial(_train_member, job, member, start, snapshot, base)
        found.append(cached(job, rm_member_key(job, member, start, snapshot, base), say, train))
    return found


def _train_member(
    job: Job, member: RmConfig, start: Artifact, snapshot: Artifact | None, base: str | None, folder: Path
) -> None:
    # what the card says: the member's own settings, not those of whoever asked for it
    kept = {field.name for field in fields(member)}
    flat = {
        key: value for key, value in job.flat.items() if not key.startswith("rm.") or key.split(".")[1] in kept
    }
    told = {
        "rm.name": member.name,
        "rm.dropout": member.dropout,
        "rm.train.lr": member.train.lr,
        "rm.standardize": member.standardize.value,
        "rm.calibrate": member.calibrate,
    }
    own = replace(job, config=replace(job.config, rm=member), flat={**flat, **told})
    train_member(_stage_job(own, folder, "train-rm"), member.seed, start, snapshot, base)


def _described(member: RmConfig, num_starts: int, snapshot: Artifact | None) -> str:
    own = f"lr {member.train.lr:.3g}"
    if member.dropout is not None:
        own += f", dropout {member.dropout:g}"
    if num_starts > 1:
        own += f", from {'the SFT model' if snapshot is None else Path(snapshot.path).name}"
    return own


def _snapshots(job: Job, sft: Artifact) -> list[Artifact]:
    """Models that the SFT run kept on its way, the latest first; none where members do not start from it.

    Raises:
        RequestError: they are asked for, and the given SFT model has none.
    """
    number = job.config.sft.snapshots
    if not number:
        return []
    if not starts_from_sft(job.config):
        raise bad_value("sft.snapshots", number, "0, because no member starts from the SFT model")
    folders = sorted((Path(sft.path).parent / SNAPSHOTS).glob("step-*"), reverse=True)
    if not folders:
        raise RequestError(f"sft.snapshots={number}: {sft.path} has no {SNAPSHOTS}/ beside it")
    return [Artifact(str(folder), file_digest(str(folder))) for folder in folders[:number]]


def _given(key: str, path: str, say: Say) -> Artifact:
    resolved = resolve_path(key, path)
    kept = "; read out as stored with it" if key == "rm.path" and has_format(resolved) else ""
    say(f"{key.split('.')[0]}: using {resolved} ({key} is set{kept})")
    return Artifact(resolved, file_digest(resolved))


def _stage_job(job: Job, folder: Path, command: str) -> Job:
    return replace(job, folder=folder, command=command, tracked=False, resume=True)
