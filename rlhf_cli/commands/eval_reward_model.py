"""The part of eval that measures the reward model: its figures, files, plots and tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from rlhf_cli.commands.train import say
from rlhf_cli.data.tokenise import count_cuts
from rlhf_cli.evaluation.best_of_n import BestOf, sample_and_score, summarise
from rlhf_cli.evaluation.overoptimisation import fit_best_of_n
from rlhf_cli.evaluation.reward_models import (
    CONSISTENCY_PAIRS,
    PairScores,
    consistency,
    margin_histogram,
    pair_rows,
    score_pairs,
    summarise_pairs,
    without_interval,
)
from rlhf_cli.evaluation.rewardbench import section_scores
from rlhf_cli.evaluation.statistics import Estimate, ReliabilityBin, accuracy_by_confidence, wilson_interval
from rlhf_cli.files import write_json_atomic
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.report.common import write_file
from rlhf_cli.report.reward_plots import (
    BestOfPoint,
    Curve,
    MarginPanel,
    ReliabilityPanel,
    ReliabilityPoint,
    best_of_n_curves,
    margin_histograms,
    reliability_diagram,
)
from rlhf_cli.report.tables import figure_table, sweep_table
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.train.recorder import RunRecorder
from rlhf_cli.train.seeding import derive_seed
from rlhf_cli.types import Example, Preference

# Pairs of a split that are looked at for what the caps cut.
_COUNTED = 500

_NUM_BINS = 15  # of the calibration error and the reliability plot

# Sizes of n that the two coefficients of the fitted curve need: with fewer it passes through every point.
_FITTED_FROM = 4

# In the table only where they say more than the plain ones, which they equal at temperature 1.
_CALIBRATED = ("rm/calibrated/nll", "rm/calibrated/brier", "rm/calibrated/ece", "rm/temperature")


@dataclass(frozen=True)
class RewardModelReport:
    """What there is to say of a reward model."""

    figures: Mapping[str, Estimate]  # by the names of summary.json
    by_split: Mapping[str, Mapping[str, Estimate]]  # the pairs' figures under plain names, the chosen split first
    best_of: Sequence[BestOf]
    notes: Sequence[str]
    files: Sequence[Path]
    plots: Sequence[Path]


@dataclass(frozen=True)
class _BestOf:
    """Best-of-n and where its picture is."""

    sizes: Sequence[BestOf]
    plots: Sequence[Path]


def evaluate_reward_model(
    job: Job, reward_model: Scorer, sampler: Artifact | None, recorder: RunRecorder
) -> RewardModelReport:
    """Measures on the pairs of every split, and as the judge of best-of-n where there is a model to sample from.

    The chosen split (`eval.split`) bears plain names, the others their split's. Writes rm_pairs.jsonl (a row per pair),
    rm_bins.json (what the plots count) and the plots.
    """
    config = job.config
    chosen = config.eval.split
    scores: dict[str, PairScores] = {}
    by_split: dict[str, dict[str, Estimate]] = {}
    notes: list[str] = []
    for split in [chosen, *(name for name in job.data.pairs_test if name != chosen)]:
        pairs = job.data.pairs_test[split]
        _say_cuts(reward_model, split, pairs)
        scores[split] = score_pairs(reward_model, pairs, job.precision, job.data.gold, config.rollout.max_rows)
        figures = summarise_pairs(scores[split], config.eval.num_resamples, config.seed)
        sections, gaps = section_scores(
            scores[split].margin, scores[split].subsets, config.eval.num_resamples, config.seed
        )
        by_split[split] = {"rm/accuracy": figures["rm/accuracy"]} | sections | figures
        notes += gaps
    asked = job.data.pairs_test[chosen]
    largest = consistency(reward_model, asked, job.precision)
    by_split[chosen]["rm/consistency"] = without_interval(largest, min(len(asked), CONSISTENCY_PAIRS))
    files = _files(recorder.run.path, scores)
    plots = _pair_plots(recorder.run.plots, scores, by_split)
    recorder.progress.update(1, {})
    best_of = _BestOf((), ())
    if sampler is not None:
        best_of = _best_of(job, reward_model, sampler, recorder.run.plots)
        recorder.progress.update(2, {})
    named = {
        name if split == chosen else name.replace("rm/", f"rm/{split}/", 1): estimate
        for split, one in by_split.items()
        for name, estimate in one.items()
    }
    return RewardModelReport(
        named | _best_of_figures(best_of.sizes),
        by_split,
        best_of.sizes,
        notes,
        files,
        [*plots, *best_of.plots],
    )


def show_reward_model(report: RewardModelReport, console: Console) -> None:
    """Tables of the pairs' figures, a column per split, and of best-of-n."""
    first = next(iter(report.by_split.values()))
    is_calibrated = first["rm/temperature"].value != 1
    columns = {
        split: {name: one for name, one in figures.items() if is_calibrated or name not in _CALIBRATED}
        for split, figures in report.by_split.items()
    }
    console.print(figure_table(columns, title="Reward model"))
    for note in report.notes:
        console.print(note, markup=False)
    if report.best_of:
        rows = [
            {
                "n": one.n,
                "KL": f"{one.kl:.3f}",
                "reward that chooses": one.proxy,
                **({} if one.gold is None else {"gold reward of its choice": one.gold}),
            }
            for one in report.best_of
        ]
        console.print(sweep_table(rows, ["n", "KL"], title=f"Best of n, over {report.best_of[0].proxy.n} prompts"))


def _say_cuts(reward_model: Scorer, split: str, rows: Sequence[Preference]) -> None:
    """Pairs are read as the reward model was trained to; what its caps cut is told."""
    sides = [Example(row.prompt, text) for row in rows[:_COUNTED] for text in (row.chosen, row.rejected)]
    caps = reward_model.format.max_prompt_tokens, reward_model.format.max_completion_tokens
    cuts = count_cuts(reward_model.tokenizer, sides, *caps, at_most=len(sides))
    if cuts.prompts or cuts.completions:
        say(f"rm, {split} pairs: {cuts} (the reward model's own caps, {caps[0]} and {caps[1]} tokens)")


def _files(folder: Path, scores: Mapping[str, PairScores]) -> list[Path]:
    """rm_pairs.jsonl: a row per pair. rm_bins.json: what the plots count."""
    rows = [{"split": split, **row} for split, one in scores.items() for row in pair_rows(one)]
    pairs, bins = folder / "rm_pairs.jsonl", folder / "rm_bins.json"
    write_file(pairs, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    write_json_atomic(bins, {split: _bins(one) for split, one in scores.items()})
    return [pairs, bins]


def _bins(scores: PairScores) -> dict[str, Any]:
    edges, counts = margin_histogram(scores.margin)
    reliability = {
        name: [{"count": b.count, "confidence": b.probability, "accuracy": b.frequency} for b in bins]
        for name, bins in (
            ("reliability", _confidence_bins(scores.probability)),
            ("calibrated_reliability", _confidence_bins(scores.calibrated_probability)),
        )
    }
    return {"margin_edges": edges.tolist(), "margin_counts": counts.tolist(), **reliability}


def _confidence_bins(probability: Any) -> list[ReliabilityBin]:
    return accuracy_by_confidence(probability, np.ones(len(probability)), _NUM_BINS)


def _pair_plots(
    folder: Path, scores: Mapping[str, PairScores], by_split: Mapping[str, Mapping[str, Estimate]]
) -> list[Path]:
    margins = []
    reliability = []
    for split, one in scores.items():
        edges, counts = margin_histogram(one.margin)
        margins.append(
            MarginPanel(f"{split}: accuracy {by_split[split]['rm/accuracy'].value:.3f}", edges, counts.tolist())
        )
        ece = f"ECE {by_split[split]['rm/ece'].value:.3f}"
        series = [(f"as trained, {ece}", _points(_confidence_bins(one.probability)))]
        if one.temperature != 1:
            after = f"temperature {one.temperature:.2f}, ECE {by_split[split]['rm/calibrated/ece'].value:.3f}"
            series.append((after, _points(_confidence_bins(one.calibrated_probability))))
        reliability.append(ReliabilityPanel(split, np.linspace(0, 1, _NUM_BINS + 1).clip(0.5), series))
    paths = [folder / "rm_margin.png", folder / "rm_reliability.png"]
    margin_histograms(paths[0], margins)
    reliability_diagram(paths[1], reliability)
    return paths


def _points(bins: Sequence[ReliabilityBin]) -> list[ReliabilityPoint]:
    return [
        ReliabilityPoint(b.probability, wilson_interval(min(b.frequency * b.count, b.count), b.count), b.count)
        for b in bins
    ]


def _best_of(job: Job, reward_model: Scorer, sampler: Artifact, folder: Path) -> _BestOf:
    config, data = job.config, job.data
    prompts = data.prompts_test[config.eval.split][: config.eval.num_prompts]
    model, tokenizer = load_causal_lm("reference.path", sampler.path, job.precision.device)
    samples = sample_and_score(
        model,
        tokenizer,
        reward_model,
        data.gold,
        prompts,
        data.max_prompt_tokens,
        replace(job.sampling, temperature=config.eval.temperature),
        config.eval.best_of_samples,
        derive_seed(config.seed, "best-of-n"),
        job.precision,
    )
    found = summarise(samples, config.eval.best_of_n, config.eval.num_resamples, config.seed)
    path = folder / "rm_best_of_n.png"
    points = [BestOfPoint(one.n, one.kl**0.5, one.proxy, one.gold) for one in found]
    gold = [one.gold for one in found if one.gold is not None]
    curves = (_fitted(found, [one.proxy for one in found]), _fitted(found, gold) if gold else None)
    best_of_n_curves(path, points, *curves)
    return _BestOf(found, [path])


def _fitted(found: Sequence[BestOf], values: Sequence[Estimate]) -> Curve | None:
    """d (a - b d) above the value at n = 1."""
    if len(found) < _FITTED_FROM:
        return None
    start = values[0].value
    fit = fit_best_of_n([one.kl**0.5 for one in found], [one.value - start for one in values])
    return Curve(f"d ({fit.a:.2f} {'+-'[fit.b > 0]} {abs(fit.b):.2f} d) above n=1", lambda d: start + fit(d))


def _best_of_figures(sizes: Sequence[BestOf]) -> dict[str, Estimate]:
    figures = {}
    for one in sizes:
        figures[f"rm/best_of/{one.n}/proxy"] = one.proxy
        figures[f"rm/best_of/{one.n}/kl"] = without_interval(one.kl, one.proxy.n)
        if one.gold is not None:
            figures[f"rm/best_of/{one.n}/gold"] = one.gold
    return figures
