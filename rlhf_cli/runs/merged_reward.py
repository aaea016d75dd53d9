"""Members, best first, made into one reward model: the mean of their weights (rm=warm) or predictions (rm=ensemble).

Members are ranked by accuracy on the validation pairs, which no test figure is taken from. `selection=all` merges all
of them. `selection=greedy` walks down the ranking and keeps a member where the merged model is then no less accurate
there (greedy soup, Wortsman et al. 2022, arXiv:2203.05482, algorithm 1). For every number of members metrics.jsonl has
the accuracy of the mean of the first ones' weights and of their predictions.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rlhf_cli import build
from rlhf_cli.files import write_folder_atomic
from rlhf_cli.models.loading import parameter_counts
from rlhf_cli.ops.merging import lerp_many
from rlhf_cli.ops.preference_losses import wins
from rlhf_cli.report.reward_plots import members_curve
from rlhf_cli.rewards.ensemble import EnsembleRewardModel, save_ensemble
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.settings import EnsembleRm, MembersRm, Selection, Standardize
from rlhf_cli.runs.common import explained_memory, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.reward import (
    MEMORY_KEYS,
    adjusted,
    memorised,
    of_pairs,
    say_temperature,
    sft_samples,
    training_pairs,
)
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run

_KEYS = ("selection/member", "selection/weight_average", "selection/ensemble")


@dataclass(frozen=True)
class _Member:
    """A trained member, on the CPU, and what it says of the validation pairs."""

    number: int
    path: Path
    model: RewardModel
    logits: tuple[Tensor, Tensor]  # float32 [Q, K] each, of the chosen and of the rejected
    accuracy: float
    nll: float


def merge_members(job: Job, seed: int, sft: Artifact, members: Sequence[Artifact]) -> None:
    """A reward model into job.folder, calibrated on validation pairs and standardised on samples of the SFT model."""
    rm: MembersRm = job.config.rm
    upstream = {f"member-{i}": member for i, member in enumerate(members)}
    if rm.standardize is Standardize.sft_samples:
        upstream["sft"] = sft
    request = job.request(f"rm {rm.name}", seed, len(members), _KEYS, upstream)
    with shared_run(request) as recorder, explained_memory(MEMORY_KEYS):
        began = time.perf_counter()
        ranked = _ranked(job, members)
        _say_ranking(recorder, ranked)
        _record_prefixes(job, recorder, ranked)
        chosen = _greedy(job, ranked) if rm.selection is Selection.greedy else ranked
        if len(chosen) < len(ranked):
            kept = [one.number for one in chosen]
            left = [one.number for one in ranked if one.number not in kept]
            recorder.message(f"members that are merged: {kept}; left out: {left}")
        scorer = _merged(job, chosen)
        _, figures = adjusted(job, scorer, sft_samples(job, seed, sft))
        say_temperature(recorder, figures)
        if job.world.is_main:
            write_folder_atomic(lambda folder: _save(scorer, chosen, folder), job.folder / "model")
        merged = of_pairs(job, scorer, job.data.pairs_validation)
        figures |= {
            "loss": merged.nll,
            "rm/accuracy": merged.accuracy,
            "rm/margin": float(merged.margin.mean()),
            "parameters/total": _num_parameters(scorer),
            "rm/members": len(chosen),
            "rm/members_trained": len(members),
            **memorised(job, lambda: scorer, training_pairs(job)),
            "time_s": time.perf_counter() - began,
        }
        recorder.summary(figures)
        if isinstance(recorder, RunRecorder):
            members_curve(recorder.run.plots / "members.png", recorder.run.metrics().rows)
        write_card_of(job, seed, build.rm_base(job.config, sft.path), upstream, figures)


def averaged(models: Sequence[RewardModel]) -> RewardModel:
    """The mean of the models' weights, taken in float64 on the CPU, in the architecture of the first.

    Raises:
        ValueError: models that do not fit together.
    """
    weights = [{name: one.cpu() for name, one in model.model.state_dict().items()} for model in models]
    twin = copy.deepcopy(models[0].model)
    twin.load_state_dict(lerp_many(weights[0], weights))
    return RewardModel(twin, models[0].tokenizer, models[0].format)


def _ranked(job: Job, members: Sequence[Artifact]) -> list[_Member]:
    """Best first: by accuracy, ties by likelihood, then by number; the main process' order, in all of them."""
    found = []
    for number, member in enumerate(members):
        model = load_reward_model("rm.members", member.path, job.precision.device)
        model.format = build.reward_format(job.config)
        pairs = of_pairs(job, model, job.data.pairs_validation)
        assert pairs.logits is not None, "of one model"
        model.model.cpu()
        found.append(_Member(number, Path(member.path), model, pairs.logits, pairs.accuracy, pairs.nll))
    order = sorted(range(len(found)), key=lambda i: (-found[i].accuracy, found[i].nll, i))
    return [found[i] for i in job.world.from_main(lambda: order)]


def _say_ranking(recorder: RunRecorder | SilentRecorder, ranked: Sequence[_Member]) -> None:
    shown = ", ".join(f"{one.number} ({one.accuracy:.3f})" for one in ranked)
    recorder.message(f"members by accuracy on the validation pairs: {shown}")


def _record_prefixes(job: Job, recorder: RunRecorder | SilentRecorder, ranked: Sequence[_Member]) -> None:
    """A row for each number of members: the one that joins, the mean of weights, the mean of predictions."""
    for count in range(1, len(ranked) + 1):
        first = ranked[:count]
        row: Mapping[str, float] = {
            "selection/member": first[-1].accuracy,
            "selection/weight_average": _accuracy_of_average(job, first),
            "selection/ensemble": _accuracy_of_ensemble(job, first),
            "member": first[-1].number,
        }
        recorder.metrics(count, row)


def _greedy(job: Job, ranked: Sequence[_Member]) -> list[_Member]:
    """The first, and each that leaves the merged model no less accurate; the main process' choice, in all of them."""
    accuracy = _accuracy_of_ensemble if isinstance(job.config.rm, EnsembleRm) else _accuracy_of_average
    chosen, best = [ranked[0]], ranked[0].accuracy
    for one in ranked[1:]:
        found = accuracy(job, [*chosen, one])
        if found >= best:
            chosen, best = [*chosen, one], found
    numbers = job.world.from_main(lambda: [one.number for one in chosen])
    return [one for one in ranked if one.number in numbers]


def _accuracy_of_average(job: Job, members: Sequence[_Member]) -> float:
    model = averaged([one.model for one in members])
    model.model.to(job.precision.device)
    return of_pairs(job, model, job.data.pairs_validation).accuracy


def _accuracy_of_ensemble(job: Job, members: Sequence[_Member]) -> float:
    """From what the members have said already: no forward pass."""
    ensemble = _ensemble(job, members)
    chosen, rejected = (ensemble.of_logits([one.logits[side] for one in members]) for side in (0, 1))
    margin = chosen.raw - rejected.raw
    return float(wins(margin)) / len(margin)


def _merged(job: Job, members: Sequence[_Member]) -> RewardModel | EnsembleRewardModel:
    if isinstance(job.config.rm, EnsembleRm):
        for one in members:
            one.model.model.to(job.precision.device)
        return _ensemble(job, members)
    merged = averaged([one.model for one in members])
    merged.model.to(job.precision.device)
    return merged


def _ensemble(job: Job, members: Sequence[_Member]) -> EnsembleRewardModel:
    """Before it is scaled."""
    rm, count = job.config.rm, len(members)
    penalty = rm.disagreement_penalty if isinstance(rm, EnsembleRm) else 0.0
    models = [one.model for one in members]
    return EnsembleRewardModel(models, build.reward_format(job.config), [0.0] * count, [1.0] * count, penalty)


def _num_parameters(scorer: RewardModel | EnsembleRewardModel) -> int:
    """Of all that a score is computed with."""
    models = scorer.members if isinstance(scorer, EnsembleRewardModel) else [scorer]
    return sum(parameter_counts(one.model)["parameters/total"] for one in models)


def _save(scorer: RewardModel | EnsembleRewardModel, members: Sequence[_Member], folder: Path) -> None:
    if isinstance(scorer, EnsembleRewardModel):
        save_ensemble(folder, [one.path for one in members], scorer)
    else:
        scorer.save(folder)
