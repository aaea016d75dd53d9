"""train-rm with one model, and what a trained one is finished with: memorised labels, temperature, scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlhf_cli import build
from rlhf_cli.data.swaps import with_swaps
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.evaluation.calibration import fit_temperature, temperature_note
from rlhf_cli.evaluation.reward_models import PairScores, score_pairs
from rlhf_cli.models.dropout import set_dropout
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.ops.grades import sum_probabilities
from rlhf_cli.rewards.ensemble import EnsembleRewardModel
from rlhf_cli.rewards.format import store_format
from rlhf_cli.rewards.model import RewardModel, Scorer, load_reward_model
from rlhf_cli.rewards.settings import Grades, Margins, RmConfig, Standardize
from rlhf_cli.rollout.engine import generate
from rlhf_cli.runs.common import (
    COUNTED_ROWS,
    explained_memory,
    micro_batch_keys,
    prepare,
    say_cuts,
    train,
    write_card_of,
)
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.scoring import RewardOfRollout
from rlhf_cli.settings import ReadOut
from rlhf_cli.train.probing import probe_head
from rlhf_cli.train.recorder import RunRecorder, SilentRecorder, shared_run
from rlhf_cli.train.reward import RewardLoss, RewardTask, encode
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Example, Preference, Rollout

KEYS = ("loss", "rm/accuracy", "eval/loss", "eval/rm/accuracy")

# What needs less memory where rewards are standardised.
MEMORY_KEYS = ("rollout.max_rows", "rollout.max_tokens")

# What a finished run may hold: the selected weights, and the others.
_MODELS = ("model", "model_best", "model_last")


def train_rm(job: Job, seed: int, sft: Artifact) -> None:
    """A reward model into job.folder, calibrated on validation pairs and standardised on samples of the SFT model."""
    config, data = job.config, job.data
    num_steps = config.rm.train.num_steps(len(data.pairs))
    upstream = {"sft": sft} if uses_sft(job) else {}
    with shared_run(job.request(f"rm {config.rm.name}", seed, num_steps, KEYS, upstream)) as recorder:
        reward_model = build.new_reward_model(config, sft.path, job.precision.device, seed)
        check_rows(job, recorder, reward_model)
        pairs = training_pairs(job)
        if config.rm.probe_steps:
            probe(job, recorder, seed, reward_model, pairs)
        base = build.rm_base(config, sft.path)
        extra = fit_reward_model(job, recorder, seed, reward_model, pairs, base)
        extra |= finished(job, recorder, seed, sft, pairs)
        recorder.summary(extra)
        write_card_of(job, seed, base, upstream, extra)


def uses_sft(job: Job) -> bool:
    """Whether a reward model starts from the SFT model or is scaled on its samples."""
    return build.starts_from_sft(job.config) or job.config.rm.standardize is Standardize.sft_samples


def check_rows(job: Job, recorder: RunRecorder | SilentRecorder, reward_model: RewardModel) -> None:
    """The rows suit the model; what its caps cut is told."""
    data = job.data
    data.check_tokenizer("rm.model", reward_model.tokenizer)
    build.check_context(job.config, "rm.model", reward_model.model, data.max_completion_tokens)
    chosen = [Example(pair.prompt, pair.chosen) for pair in data.pairs[:COUNTED_ROWS]]
    say_cuts(recorder, reward_model.tokenizer, chosen, data.max_prompt_tokens, data.max_completion_tokens)


def training_pairs(job: Job) -> Sequence[Preference]:
    """The data's pairs, with labels swapped as the config asks."""
    rm: RmConfig = job.config.rm
    return with_swaps(job.data.pairs, rm.label_swap_rate, rm.label_swap_seed)


def probe(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    seed: int,
    reward_model: RewardModel,
    pairs: Sequence[Preference],
) -> None:
    """Linear probing: the head alone learns first."""
    rm: RmConfig = job.config.rm
    task = _task(job, derive_seed(seed, "probe"), reward_model, pairs)
    accuracy = probe_head(task, rm.probe_steps, rm.probe_lr, job.world)
    recorder.message(
        f"linear probing: {rm.probe_steps} steps of the head alone, validation accuracy {accuracy:.3f}"
    )


def fit_reward_model(
    job: Job,
    recorder: RunRecorder | SilentRecorder,
    seed: int,
    reward_model: RewardModel,
    pairs: Sequence[Preference],
    base: str | None,
) -> dict[str, float]:
    """Trains it and returns its figures.

    Args:
        job, recorder, seed: of the run.
        reward_model: before training; it gets the configured dropout and adapter.
        pairs: training rows, swapped labels included.
        base: what its backbone was loaded from; None where it starts from scratch.
    """
    rm: RmConfig = job.config.rm
    if rm.dropout is not None:
        set_dropout("rm.dropout", reward_model.model, rm.dropout)
    adapter = prepare(recorder, "rm.peft", rm.peft, rm.train, reward_model.model, base, seed)
    task = _task(job, seed, reward_model, pairs)
    task.adapter = adapter
    num_steps = rm.train.num_steps(len(pairs))
    curves = (*KEYS, "rm/margin", "grad_norm")
    return train(task, rm.train, num_steps, job, recorder, seed, curves, micro_batch_keys("rm"))


def _task(job: Job, seed: int, reward_model: RewardModel, pairs: Sequence[Preference]) -> RewardTask:
    rm: RmConfig = job.config.rm
    loss = RewardLoss(
        use_margin=isinstance(rm, Margins) and rm.use_margin,
        entropy_bonus=rm.entropy_bonus if isinstance(rm, Grades) and rm.num_labels > 1 else 0.0,
    )
    validation = encode(reward_model, job.data.pairs_validation)
    return RewardTask(
        reward_model, encode(reward_model, pairs), validation, rm.train, job.precision, seed, loss, job.world
    )


def memorised(job: Job, load: Callable[[], Scorer], pairs: Sequence[Preference]) -> dict[str, float]:
    """Accuracy on training rows with swapped labels, by those labels, and on the others; nothing without swaps.

    Args:
        job: its rows and settings.
        load: gives the trained reward model; called only where labels were swapped.
        pairs: training rows, swapped labels included.
    """
    seen = list(islice(pairs, 2 * COUNTED_ROWS))
    parts = {
        name: [pair for pair in seen if pair.swapped is swapped][:COUNTED_ROWS]
        for name, swapped in (("clean", False), ("corrupted", True))
    }
    if not parts["corrupted"]:
        return {}
    scorer = load()
    return {
        f"rm/train_{name}/accuracy": of_pairs(job, scorer, rows).accuracy for name, rows in parts.items() if rows
    }


def finished(
    job: Job, recorder: RunRecorder | SilentRecorder, seed: int, sft: Artifact, pairs: Sequence[Preference]
) -> dict[str, float]:
    """Fits temperature and scale of every model of the run and stores them with it; the figures of model/.

    Args:
        job, recorder, seed, sft: of the run.
        pairs: training rows, swapped labels included.
    """
    found: dict[str, float] = {}
    with explained_memory(MEMORY_KEYS):
        rollout = sft_samples(job, seed, sft)
        for name in reversed(_MODELS):
            folder = job.folder / name
            if job.world.from_main(folder.is_dir):
                found = _finish(job, folder, rollout)
        found |= memorised(job, lambda: _trained(job, job.folder / "model"), pairs)
    say_temperature(recorder, found)
    return found


def say_temperature(recorder: RunRecorder | SilentRecorder, figures: Mapping[str, float]) -> None:
    """Tells where there was nothing to fit."""
    note = temperature_note(figures["rm/temperature"]) if "rm/temperature" in figures else None
    if note is not None:
        recorder.message(f"warning: {note}")


def _finish(job: Job, folder: Path, rollout: Rollout | None) -> dict[str, float]:
    reward_model = _trained(job, folder)
    changes, figures = adjusted(job, reward_model, rollout)
    if job.world.is_main:
        store_format(folder, **changes)
    if "opponent" in changes:  # while it learned, the mean grade stood in for the win rate
        of_validation = of_pairs(job, reward_model, job.data.pairs_validation)
        figures |= {"rm/accuracy": of_validation.accuracy, "rm/margin": float(of_validation.margin.mean())}
    return figures


def _trained(job: Job, folder: Path) -> RewardModel:
    return load_reward_model("rm.path", str(folder), job.precision.device)


def adjusted(job: Job, scorer: Scorer, rollout: Rollout | None) -> tuple[dict[str, Any], dict[str, float]]:
    """What has to be stored with a trained reward model, and the same as figures.

    Args:
        job: its rows and settings.
        scorer: one model or several; what is found is set in its format, for one depends on the other.
        rollout: this process' samples of the SFT model; None where rewards are not standardised.
    """
    rm: RmConfig = job.config.rm
    changes: dict[str, Any] = {}
    figures: dict[str, float] = {}
    if rm.calibrate:
        log_odds = of_pairs(job, scorer, job.data.pairs_validation).log_odds
        changes["temperature"] = figures["rm/temperature"] = fit_temperature(log_odds)
    if rollout is not None:
        reward = RewardOfRollout(scorer, job.precision, job.config.rollout.max_rows)
        if scorer.format.read_out == ReadOut.win_rate.value and scorer.format.grade_loss is not None:
            logits = job.world.gather(reward(rollout).logits)
            changes["opponent"] = (sum_probabilities(logits.double()) / len(logits)).tolist()
            scorer.format = replace(scorer.format, opponent=tuple(changes["opponent"]))
        if isinstance(scorer, EnsembleRewardModel):
            scales = [_scale(job, replace(one, format=scorer.format), rollout) for one in scorer.members]
            scorer.centres, scorer.stds = [mean for mean, _ in scales], [std for _, std in scales]
        mean, std = _scale(job, scorer, rollout)
        changes |= {"mean": mean, "std": std}
        figures |= {"rm/sft_mean": changes["mean"], "rm/sft_std": changes["std"]}
    scorer.format = replace(scorer.format, **{**changes, "opponent": scorer.format.opponent})
    return changes, figures


def _scale(job: Job, scorer: Scorer, rollout: Rollout) -> tuple[float, float]:
    """Mean and standard deviation of the raw score over the samples of all processes."""
    reward = RewardOfRollout(scorer, job.precision, job.config.rollout.max_rows)
    raw = job.world.gather(reward(rollout).raw).double()
    return float(raw.mean()), float(raw.std())


def of_pairs(job: Job, scorer: Scorer, pairs: Sequence[Preference]) -> PairScores:
    """Scores of pairs, as many rows at once as the config allows."""
    return score_pairs(scorer, pairs, job.precision, max_rows=job.config.rollout.max_rows)


def sft_samples(job: Job, seed: int, sft: Artifact) -> Rollout | None:
    """This process' share of samples of the SFT model, one for each prompt; None where no reward is standardised."""
    if job.config.rm.standardize is not Standardize.sft_samples:
        return None
    policy, tokenizer = load_causal_lm("sft.path", sft.path, job.precision.device)
    prompts = job.data.prompts[: job.config.rm.standardize_samples]
    mine = job.world.share(len(prompts))
    batch = prompt_batch(tokenizer, prompts[mine], range(len(prompts))[mine], job.data.max_prompt_tokens)
    with torch.no_grad(), job.precision.autocast():
        return generate(policy, tokenizer, batch, 1, job.sampling, derive_seed(seed, "standardise"), 0)
