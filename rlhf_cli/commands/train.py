"""train-sft, train-rm and train-policy."""

from __future__ import annotations

import sys
from dataclasses import replace

from rlhf_cli import build
from rlhf_cli.algos.preference import PreferenceAlgorithm
from rlhf_cli.algos.warp import Warp
from rlhf_cli.commands.context import Context
from rlhf_cli.commands.show import show_run
from rlhf_cli.config.schema import Resume, RunConfig
from rlhf_cli.data.dataset import Dataset
from rlhf_cli.errors import RequestError
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.rewards.settings import MembersRm
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.members import publish_member
from rlhf_cli.runs.merged_reward import merge_members
from rlhf_cli.runs.policy import train_policy
from rlhf_cli.runs.preference import train_on_pairs
from rlhf_cli.runs.reward import train_rm
from rlhf_cli.runs.sft import train_sft
from rlhf_cli.runs.warp import train_warp
from rlhf_cli.stages import file_digest, resolve_members, resolve_rm, resolve_sft
from rlhf_cli.train.distributed import World, current
from rlhf_cli.train.seeding import deterministic, set_threads


def make_job(config: RunConfig, context: Context) -> Job:
    """Rows, device and threads; everything that can be wrong with them is found before a stage starts."""
    deterministic()
    world = current()
    data = _rows(config, world)
    return Job(
        config=config,
        precision=build.precision(config, world),
        data=data,
        threads=set_threads(config.threads),
        folder=context.folder,
        command=config.command,
        argv=context.argv,
        group=context.sweep,
        flat=context.flat,
        resume=config.resume is Resume.auto,
        world=world,
    )


def _rows(config: RunConfig, world: World) -> Dataset:
    """The rows; the main process reads and checks them first, for all."""
    found: list[Dataset] = []

    def read() -> None:
        found.append(build.dataset(config.data, config.algo.eval_prompts))
        if world.size > 1 and config.command != "train-sft":
            _check_shares(found[0], config, world.size)

    world.from_main(read)
    return found[0] if found else build.dataset(config.data, config.algo.eval_prompts)


def _check_shares(data: Dataset, config: RunConfig, num_processes: int) -> None:
    """Raises RequestError where there are fewer prompts than processes."""
    counts: dict[str, int] = {}
    is_policy = config.command == "train-policy"
    if not (is_policy and config.learns_from_pairs()):
        counts["training prompts"] = len(data.prompts)
    if is_policy and not config.learns_from_pairs():
        counts["validation prompts"] = len(data.prompts_validation)
    for name, count in counts.items():
        if count < num_processes:
            raise RequestError(
                f"data={data.name}: has {count} {name}, fewer than the {num_processes} processes that share them"
            )


def run_train(config: RunConfig, context: Context) -> None:
    """Builds what the command needs, trains, and says where everything is."""
    job = make_job(config, context)
    match config.command:
        case "train-sft":
            train_sft(job, config.seed)
        case "train-rm":
            _train_rm(job, resolve_sft(job, say))
        case "train-policy":
            sft = resolve_sft(job, say)
            rm = resolve_rm(job, lambda: sft, say) if config.needs_rm() else None
            _train_policy(job, sft, rm, _judge(config))
    if job.world.is_main:
        show_run(context.folder)


def _train_rm(job: Job, sft: Artifact) -> None:
    """One model; or several, of which those that are in the cache already are not trained again."""
    seed, rm = job.config.seed, job.config.rm
    if not isinstance(rm, MembersRm):
        train_rm(job, seed, sft)
        return
    members = resolve_members(replace(job, config=replace(job.config, rm=replace(rm, seed=seed))), sft, say)
    if rm.member is None:
        merge_members(job, seed, sft, members)
    else:
        publish_member(job, seed, sft, members[0])


def _judge(config: RunConfig) -> Artifact | None:
    """The language model of the reward's coherence, where it is neither left out nor the SFT model."""
    path = config.reward.coherence.path
    if path is None or not config.asks_reward() or not config.reward.coherence.weight:
        return None
    resolved = resolve_path("reward.coherence.path", path)
    say(f"coherence: using {resolved} (reward.coherence.path is set)")
    return Artifact(resolved, file_digest(resolved))


def _train_policy(job: Job, sft: Artifact, rm: Artifact | None, judge: Artifact | None) -> None:
    """By the kind of algorithm: from pairs, from samples, or members that are merged."""
    algorithm, seed = job.config.algo, job.config.seed
    if isinstance(algorithm, PreferenceAlgorithm):
        train_on_pairs(job, seed, sft, rm, judge)
    elif isinstance(algorithm, Warp):
        train_warp(job, seed, sft, rm, judge)
    else:
        train_policy(job, seed, sft, rm, judge)


def say(text: str) -> None:
    """A line for the person watching; results alone go to stdout."""
    if current().is_main:
        print(text, file=sys.stderr, flush=True)
