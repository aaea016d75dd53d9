"""Members, best first, made into one reward model: the mean of their weights (rm=warm) or predictions (rm=ensemble).

Members are ranked by accuracy on the validation pairs, which no test figure is taken from. `selection=all` merges all
of them. `selection=greedy` walks down the ranking and keeps a member where the merged model is then no less accurate
there (greedy soup, Wortsman et al. 2022, arXiv:2203.05482, algorithm 1). For every number of members metrics.jsonl has
the accuracy of the mean of the first ones' weights and of their predictions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import softplus

from rlhf_cli import build
from rlhf_cli.evaluation.reward_models import score_pairs
from rlhf_cli.files import write_folder_atomic
from rlhf_cli.ops.merging import lerp_many
from rlhf_cli.ops.preference_losses import wins
from rlhf_cli.report.plots import training_curves
from rlhf_cli.rewards.ensemble import EnsembleRewardModel, save_ensemble
from rlhf_cli.rewards.model import RewardModel, load_reward_model
from rlhf_cli.rewards.settings import EnsembleRm, MembersRm, Selection
from rlhf_cli.runs.common import explained_memory, write_card_of
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.reward import MEMORY_KEYS, adjusted, say_temperature, sft_samples
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run
from rlhf_cli.types import Scores

_KEYS = ("selection/member", "selection/weight_average", "selection/ensemble")


@dataclass(frozen=True)
class _Member:
    """A trained member, on the CPU, and how good it is on the validation pairs."""

    number: int
    path: Path
    model: RewardModel
    accuracy: float
    nll: float
    logits: tuple[Tensor, Tensor]  # float32 [Q, K] of the preferred completions, and of the others


def merge_members(job: Job, seed: int, sft: Artifact, members: Sequence[Artifact]) -> None:
    """A reward model into job.folder, calibrated on validation pairs and standardised on samples of the SFT model."""
    rm: MembersRm = job.config.rm
    upstream = {"sft": sft} | {f"member-{i}": member for i, member in enumerate(members)}
    with shared_run(job.request(f"rm {rm.name}", seed, len(members), _KEYS, upstream)) as recorder:
        began = time.perf_counter()
        ranked = _ranked(job, members)
        _say_ranking(recorder, ranked)
        _record_prefixes(job, recorder, ranked)
        chosen = _greedy(job, ranked) if rm.selection is Selection.greedy else ranked
        scorer = _merged(job, chosen)
        with explained_memory(MEMORY_KEYS):
            _, figures = adjusted(job, scorer, sft_samples(job, seed, sft))
        say_temperature(recorder, figures)
        if job.world.is_main:
            write_folder_atomic(lambda folder: _save(scorer, chosen, folder), job.folder / "model")
        merged = score_pairs(scorer, job.data.pairs_validation, job.precision)
        figures |= {
            "loss": merged.nll,
            "rm/accuracy": merged.accuracy,
            "rm/members": len(chosen),
            "rm/members_trained": len(members),
            "time_s": time.perf_counter() - began,
        }
        recorder.summary(figures)
        if isinstance(recorder, RunRecorder):
            rows = recorder.run.metrics().rows
            training_curves(recorder.run.plots / "members.png", rows, _KEYS, "Accuracy by number of members")
        write_card_of(job, seed, build.rm_base(job.config, sft.path), upstream, figures)


def averaged(models: Sequence[RewardModel]) -> RewardModel:
    """The mean of the models' weights, in float64, in the architecture of the first.

    Raises:
        ValueError: models that do not fit together.
    """
    weights = [model.model.state_dict() for model in models]
    twin = type(models[0].model)(models[0].model.config).to(models[0].model.device).eval()
    twin.load_state_dict(lerp_many(weights[0], weights))
    return RewardModel(twin, models[0].tokenizer, models[0].format)


def _ranked(job: Job, members: Sequence[Artifact]) -> list[_Member]:
    """Best first: by accuracy, ties by likelihood, then by number."""
    found = []
    for number, member in enumerate(members):
        model = load_reward_model("rm.members", member.path, job.precision.device)
        model.format = build.reward_format(job.config)
        chosen, rejected = _sides(job, model)
        assert chosen.logits is not None and rejected.logits is not None
        nll = float(softplus(-model.log_odds(chosen, rejected).double()).mean())
        logits = chosen.logits, rejected.logits
        found.append(_Member(number, Path(member.path), model, _right(chosen, rejected), nll, logits))
    return sorted(found, key=lambda one: (-one.accuracy, one.nll, one.number))


def _sides(job: Job, model: RewardModel) -> tuple[Scores, Scores]:
    """Of both completions of every validation pair."""
    pairs = job.data.pairs_validation
    prompts = [pair.prompt for pair in pairs]
    with job.precision.autocast():
        return model.score(prompts, [one.chosen for one in pairs]), model.score(
            prompts, [one.rejected for one in pairs]
        )


def _right(chosen: Scores, rejected: Scores) -> float:
    """Accuracy; a tie counts one half."""
    return float(wins(chosen.raw - rejected.raw)) / len(chosen.raw)


def _say_ranking(recorder: RunRecorder | SilentRecorder, ranked: Sequence[_Member]) -> None:
    shown = ", ".join(f"{one.number} ({one.accuracy:.3f})" for one in ranked)
    recorder.message(f"members by accuracy on the validation pairs: {shown}")


def _record_prefixes(job: Job, recorder: RunRecorder | SilentRecorder, ranked: Sequence[_Member]) -> None:
    """A row for each number of members: the one that joins, the mean of weights, the mean of predictions."""
    for count in range(1, len(ranked) + 1):
        first = ranked[:count]
        row: Mapping[str, float] = {
            "selection/member": ranked[count - 1].accuracy,
            "selection/weight_average": _averaged_accuracy(job, first),
            "selection/ensemble": _ensemble_accuracy(job, first),
            "member": ranked[count - 1].number,
        }
        recorder.metrics(count, row)


def _greedy(job: Job, ranked: Sequence[_Member]) -> list[_Member]:
    accuracy_of = _ensemble_accuracy if isinstance(job.config.rm, EnsembleRm) else _averaged_accuracy
    chosen, best = [ranked[0]], ranked[0].accuracy
    for one in ranked[1:]:
        accuracy = accuracy_of(job, [*chosen, one])
        if accuracy >= best:
            chosen, best = [*chosen, one], accuracy
    return chosen


def _averaged_accuracy(job: Job, members: Sequence[_Member]) -> float:
    return _right(*_sides(job, averaged([one.model for one in members])))


def _ensemble_accuracy(job: Job, members: Sequence[_Member]) -> float:
    """From what each member has said already: M of them take M forward passes for all their ensembles."""
    whole = _ensemble(job, [one.model for one in members])
    return _right(*(whole.of_logits([one.logits[side] for one in members]) for side in (0, 1)))


def _merged(job: Job, members: Sequence[_Member]) -> RewardModel | EnsembleRewardModel:
    models = [one.model for one in members]
    return _ensemble(job, models) if isinstance(job.config.rm, EnsembleRm) else averaged(models)


def _ensemble(job: Job, models: Sequence[RewardModel]) -> EnsembleRewardModel:
    rm = job.config.rm
    penalty = rm.disagreement_penalty if isinstance(rm, EnsembleRm) else 0.0
    return EnsembleRewardModel(models, build.reward_format(job.config), [0.0] * len(models), penalty)


def _save(scorer: RewardModel | EnsembleRewardModel, members: Sequence[_Member], folder: Path) -> None:
    if isinstance(scorer, EnsembleRewardModel):
        save_ensemble(folder, [one.path for one in members], scorer)
    else:
        scorer.save(folder)
