"""train-policy with algo=warp: members, merging, the output front.

    members/i1-m1/       a member's model, and its checkpoints while it learns
    iterations/1/merged/ theta_slerp of the iteration;  iterations/1/start/ what the next one starts from
    iterations/1/merge.json   angle between the members' task vectors in each layer
    front/eta-0.5/       (1-eta) theta_sft + eta theta_slerp;  front.json has its reward and KL

What is there under its name is whole: a resumed run takes it up and goes on inside the member that was interrupted.
"""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_cli.algos.warp import Anchor, Merge, Warp
from rlhf_cli.evaluation.statistics import Bootstrap, Estimate
from rlhf_cli.files import write_folder_atomic, write_json_atomic
from rlhf_cli.models.causal import LanguageModel
from rlhf_cli.models.loading import load_causal_lm, parameter_counts, save_model
from rlhf_cli.ops.merging import angles, interpolate, lerp_many, slerp_many, task_vector_norms
from rlhf_cli.report.plots import FrontPoint, reward_vs_kl, training_curves
from rlhf_cli.runs.common import explained_memory, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.policy import CURVES, MEMORY_KEYS, policy_task, say_problems, shown_keys, upstream_of
from rlhf_cli.runs.scoring import PolicyReward, SftModel, load_reward, measured
from rlhf_cli.train.checkpoint import Checkpoints, Durable
from rlhf_cli.train.distributed import stop_if_asked
from rlhf_cli.train.loop import fit
from rlhf_cli.train.measuring import metric_of
from rlhf_cli.train.parts import PartRecorder, PartResult, finished, mark_finished, steps_done
from rlhf_cli.train.policy import PolicyTask
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run
from rlhf_cli.train.seeding import derive_seed

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Run:
    """What the parts of the procedure share."""

    job: Job
    algorithm: Warp
    seed: int
    sft: Artifact
    reference: LanguageModel
    reward: PolicyReward
    recorder: RunRecorder | SilentRecorder

    def task(self, start: str, seed: int, mu: float | None) -> PolicyTask:
        """A member."""
        return policy_task(
            self.job,
            self.recorder,
            self.algorithm.member(),
            self.sft,
            self.reward,
            seed,
            reference=self.reference,
            start=start,
            mu=mu,
            validation_seed=derive_seed(self.seed, "validation"),
        )


def train_warp(job: Job, seed: int, sft: Artifact, rm: Artifact | None, judge: Artifact | None = None) -> None:
    """A policy into job.folder; `rm` and `judge` are None where no term of the reward asks for them."""
    algorithm: Warp = job.config.algo
    upstream = upstream_of(sft, rm, judge)
    folders = [folder for _, _, folder in _places(job.folder, algorithm)]

    def done() -> int:
        return steps_done(folders, job.config.checkpoint.keep)

    request = job.request(job.config.name, seed, algorithm.num_steps, shown_keys(job), upstream, done)
    with shared_run(request) as recorder, recorder.durable.stop.listening(), explained_memory(MEMORY_KEYS):
        say_problems(job, recorder)
        loaded = SftModel(*load_causal_lm("sft.path", sft.path, job.precision.device))
        reward = load_reward(job, seed, sft, rm, judge, loaded)
        run = _Run(job, algorithm, seed, sft, loaded.model, reward, recorder)
        results, merges = _iterations(run)
        front = _front(run, _iteration(job.folder, algorithm.I) / "merged")
        summary = _summary(run, results, merges, front)
        recorder.summary(summary)
        if isinstance(recorder, RunRecorder):
            training_curves(recorder.run.plots / "training.png", recorder.run.metrics().rows, CURVES)
            reward_vs_kl(recorder.run.plots / "front.png", _points(front), "From the SFT model to the merged one")
        write_card_of(job, seed, sft.path, upstream, summary)


def _places(folder: Path, algorithm: Warp) -> list[tuple[int, int, Path]]:
    """Iteration, member and folder of every member, in the order they are trained."""
    numbers = itertools.product(range(1, algorithm.I + 1), range(1, algorithm.M + 1))
    return [(i, m, folder / "members" / f"i{i}-m{m}") for i, m in numbers]


def _iteration(folder: Path, number: int) -> Path:
    return folder / "iterations" / str(number)


def _iterations(run: _Run) -> tuple[list[PartResult], list[Mapping[str, float]]]:
    """Trains all members and merges them; returns how each ended, and each iteration's angles."""
    results: list[PartResult] = []
    merges: list[Mapping[str, float]] = []
    start = run.sft.path
    for iteration in range(1, run.algorithm.I + 1):
        places = [place for place in _places(run.job.folder, run.algorithm) if place[0] == iteration]
        for _, member, folder in places:
            results.append(_member(run, iteration, member, folder, start, results))
        stop_if_asked(run.job.world)
        members, ends = [folder for *_, folder in places], results[-len(places) :]
        merges.append(run.job.world.from_main(partial(_merge, run, iteration, start, members, ends)))
        start = str(_iteration(run.job.folder, iteration) / "start")
    return results, merges


def _member(
    run: _Run, iteration: int, member: int, folder: Path, start: str, before: Sequence[PartResult]
) -> PartResult:
    """One member, from `start`; nothing is done where it has ended already."""
    job, algorithm = run.job, run.algorithm
    world = job.world
    stop_if_asked(world)
    if world.from_main(lambda: finished(folder) is not None):
        ended = finished(folder)
        assert ended is not None
        if world.is_main:
            _drop_checkpoints(folder)
        return ended
    # The first one is the run that algo=reinforce would be with this seed.
    first = iteration == member == 1
    seed = run.seed if first else derive_seed(run.seed, "warp member", iteration, member)
    task = run.task(start, seed, algorithm.mu if algorithm.anchor is Anchor.ema else None)
    counts = parameter_counts(task.model)
    if first:
        steps = f"{algorithm.I} x {algorithm.M} x {algorithm.T} = {algorithm.num_steps} steps"
        run.recorder.message(
            f"{counts['parameters/trainable']:,} of {counts['parameters/total']:,} parameters are trained, "
            f"{steps}, {job.precision.device.type} {job.precision.name}"
        )
    run.recorder.message(f"iteration {iteration}, member {member}")
    recorder = PartRecorder(run.recorder, before, {"warp/iteration": iteration, "warp/member": member})
    settings = algorithm.member().train
    durable = _durable(run, folder)
    fitted = fit(task, settings, algorithm.T, folder, recorder, job.precision, seed, durable, world)
    result = PartResult.of(fitted, counts)
    if world.is_main:
        recorder.sync()  # its rows have to be there when nothing will write them again
        mark_finished(folder, result)
        _drop_checkpoints(folder)
    world.barrier()
    return result


def _drop_checkpoints(folder: Path) -> None:
    """Of a member that has ended: nothing goes back to them."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _durable(run: _Run, folder: Path) -> Durable:
    """A member's own checkpoints, and the one to continue."""
    settings, whole = run.job.config.checkpoint, run.recorder.durable
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep, run.recorder.message)

    step = run.job.world.from_main(checkpoints.newest_step)
    return Durable(checkpoints, settings.every, whole.stop, None if step is None else checkpoints.load(step))


def _merge(
    run: _Run, iteration: int, start: str, members: Sequence[Path], results: Sequence[PartResult]
) -> Mapping[str, float]:
    """Writes the merged model and the next start; returns angle and norm of the task vectors. In one process."""
    folder, algorithm = _iteration(run.job.folder, iteration), run.algorithm
    record = folder / "merge.json"
    if record.is_file():  # written last
        done: dict[str, float] = json.loads(record.read_text(encoding="utf-8"))
        return done
    model, tokenizer = load_causal_lm("sft.path", start, _CPU)
    init = _weights(model)
    weights = [_weights(load_causal_lm("members", str(place / "model"), _CPU)[0]) for place in members]
    figures = _task_vectors(init, weights)
    best = max(range(len(results)), key=lambda number: results[number].score)
    match algorithm.merge:
        case Merge.slerp:
            merged = slerp_many(init, weights)
        case Merge.lerp:
            merged = lerp_many(init, weights)
        case Merge.none:
            merged = weights[best]
            figures["member"] = float(best + 1)
    folder.mkdir(parents=True, exist_ok=True)
    _write_model(model, tokenizer, merged, folder / "merged")
    _write_model(model, tokenizer, interpolate(init, merged, algorithm.eta), folder / "start")
    write_json_atomic(record, figures)
    for line in _described(algorithm, figures):
        run.recorder.message(f"iteration {iteration}: {line}")
    return figures


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _task_vectors(init: Mapping[str, Tensor], members: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """By layer: angle between two members in degrees, mean over all pairs of members, and mean norm."""
    pairs = [angles(init, one, other) for one, other in itertools.combinations(members, 2)]
    norms = [task_vector_norms(init, weights) for weights in members]
    figures = {}
    for layer in norms[0]:
        if found := [pair[layer] for pair in pairs if layer in pair]:
            figures[f"angle/{layer}"] = statistics.fmean(found)
        figures[f"norm/{layer}"] = statistics.fmean(norm[layer] for norm in norms)
    if by_layer := [value for name, value in figures.items() if name.startswith("angle/")]:
        figures["angle"] = statistics.fmean(by_layer)
    return figures


def _described(algorithm: Warp, figures: Mapping[str, float]) -> list[str]:
    parts = []
    if "angle" in figures:
        by_layer = [value for name, value in figures.items() if name.startswith("angle/")]
        parts.append(
            f"angle between members {figures['angle']:.1f} degrees on average over layers "
            f"({min(by_layer):.1f} to {max(by_layer):.1f})"
        )
    if "member" in figures:
        parts.append(f"member {figures['member']:.0f} stays")
    if algorithm.anchor is Anchor.ema:
        held = (1.0 - algorithm.mu) ** algorithm.T
        parts.append(f"mu*T = {algorithm.mu * algorithm.T:g}, the anchors hold {held:.0%} of their start")
    return parts


def _write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Mapping[str, Tensor], target: Path
) -> None:
    """Writes `model` with these weights, as a plain folder; `model` is left as it was."""
    kept = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = weights[name]
        write_folder_atomic(lambda building: save_model(model, tokenizer, building), target)
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = kept[name]


def _front(run: _Run, merged: Path) -> dict[float, dict[str, Estimate]]:
    """Writes the models between SFT and the merged one, and model/; returns their figures by eta."""
    algorithm, folder = run.algorithm, run.job.folder
    etas = sorted({*algorithm.front, algorithm.output_eta})
    stop_if_asked(run.job.world)
    run.job.world.from_main(partial(_write_front, run, merged, etas))
    figures = {}
    for eta in etas:
        stop_if_asked(run.job.world)
        figures[eta] = _measured(run, _point(folder, eta))
    if run.job.world.is_main:
        flat = [{"eta": eta, **_flat(figures[eta])} for eta in etas]
        write_json_atomic(folder / "front" / "front.json", flat)
        output = _point(folder, algorithm.output_eta)
        write_folder_atomic(lambda building: shutil.copytree(output, building), folder / "model")
    return figures


def _write_front(run: _Run, merged: Path, etas: Sequence[float]) -> None:
    model, tokenizer = load_causal_lm("sft.path", run.sft.path, _CPU)
    end = _weights(load_causal_lm("merged", str(merged), _CPU)[0])
    (run.job.folder / "front").mkdir(exist_ok=True)
    for eta in etas:
        _write_model(model, tokenizer, interpolate(_weights(model), end, eta), _point(run.job.folder, eta))


def _point(folder: Path, eta: float) -> Path:
    return folder / "front" / f"eta-{eta:g}"


def _measured(run: _Run, path: Path) -> dict[str, Estimate]:
    """Figures of a model on the validation prompts, with their intervals over prompts.

    A running scale is each member's own: what is merged has none, and its reward is the sum before it.
    """
    columns = measured(run.job, run.seed, path, run.reference, run.reward)
    bootstrap = Bootstrap(len(columns["reward"]), seed=run.seed)
    return {metric_of(name): bootstrap.mean(column.numpy()) for name, column in columns.items()}


def _flat(figures: Mapping[str, Estimate]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, estimate in figures.items():
        flat |= {name: estimate.value, f"{name}_lo": estimate.lo, f"{name}_hi": estimate.hi}
    return flat


def _points(front: Mapping[float, Mapping[str, Estimate]]) -> list[FrontPoint]:
    return [
        FrontPoint("warp", f"eta {eta:g}", one["kl/full"], one["reward/mean"], one.get("gold/mean"))
        for eta, one in front.items()
    ]


def _summary(
    run: _Run,
    results: Sequence[PartResult],
    merges: Sequence[Mapping[str, float]],
    front: Mapping[float, Mapping[str, Estimate]],
) -> dict[str, float]:
    """The final figures: model/'s own under plain names, the front's and the merging's under theirs."""
    algorithm = run.algorithm
    summary: dict[str, float] = {name: one.value for name, one in front[algorithm.output_eta].items()}
    for eta, point in front.items():
        summary |= {f"front/eta-{eta:g}/{name}": value for name, value in _flat(point).items()}
    for number, figures in enumerate(merges, start=1):
        summary |= {f"warp/i{number}/{name}": value for name, value in figures.items()}
    summary |= results[0].parameters
    if algorithm.anchor is Anchor.ema:
        summary["warp/mu_T"] = algorithm.mu * algorithm.T
    summary |= {
        "step": sum(part.step for part in results),
        "samples": sum(part.samples for part in results),
        "samples_generated": sum(part.samples for part in results),
        "tokens": sum(part.tokens for part in results),
        "time_s": sum(part.time_s for part in results),
        "time/checkpoint_s": sum(part.checkpoint_s for part in results),
    }
    return summary
