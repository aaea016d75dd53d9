"""Every kind of reward model on the embedded data, with and without swapped labels, over several seeds: one table.

    python scripts/compare_reward_models.py --seeds 0 1 2 3 4 --jobs 2

For each seed and each share of swapped labels: a scalar, two distributional ones (strict and half_tie) and six members,
which are made into an ensemble and into WARM. The seed decides heads, order of the rows, dropout and which labels are
swapped; the SFT model that all start from is one, and so are the rows. Test labels are never swapped. The table has
means over seeds with 95% intervals (Student's t) and below it differences, paired by seed, as Markdown and as JSON
with the figures of each seed. Rewards are left on their raw scale, which no figure here depends on. What is finished is
not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import spearmanr
from study import cell, end_with_parent, quiet, reviews_of, rlhf_here, table

from rlhf_cli.data.dataset import GoldReward
from rlhf_cli.data.swaps import with_swaps
from rlhf_cli.evaluation.statistics import Estimate, expected_calibration_error, mean_interval_over_seeds
from rlhf_cli.ops.grades import log_pair_probability
from rlhf_cli.ops.preference_losses import wins
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.settings import GradeLoss
from rlhf_cli.types import Preference, Scores

# Name in the table -> arguments. Ensemble and WARM have the same members, which are trained once.
MODELS: dict[str, list[str]] = {
    "scalar": ["rm=scalar"],
    "strict": ["rm=distributional", "rm.loss=strict"],
    "half_tie": ["rm=distributional", "rm.loss=half_tie"],
    "ensemble": ["rm=ensemble", "rm.members=6"],
    "warm": ["rm=warm", "rm.members=6"],
}
RATES = (0.0, 0.25)

# Column -> figure, digits
COLUMNS = {
    "train, corrupted": ("accuracy/train_corrupted", 3),  # by the corrupted labels: what was memorised
    "train, clean": ("accuracy/train_clean", 3),
    "test": ("accuracy/test", 3),
    "ood": ("accuracy/ood", 3),
    "ECE, as trained": ("ece/as_trained", 3),  # of the probability in the loss
    "ECE, odds": ("ece/odds", 3),  # of odds P(w > l) / P(l > w): differs from it for strict alone
    "ECE, calibrated": ("ece/calibrated", 3),  # of the odds, after the stored temperature
    "gold rank": ("gold_rank/test", 3),
    "gold rank, ood": ("gold_rank/ood", 3),
    "entropy of grades": ("grade_entropy", 2),
}
PAIRED = (
    ("warm", "ensemble"),
    ("warm", "scalar"),
    ("ensemble", "scalar"),
    ("half_tie", "strict"),
    ("half_tie", "scalar"),
)

TRAIN_PAIRS = 500  # with swapped labels and without, that are looked at
COST_ROWS, COST_REPEATS = 1000, 7

Vector = NDArray[np.float64]
Figures = dict[str, float]


@dataclass(frozen=True)
class Unit:
    """What is trained together: every model of one seed and one share of swapped labels."""

    folder: Path
    seed: int
    rate: float
    models: tuple[str, ...]
    threads: int
    extra: tuple[str, ...]


def main() -> int:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="shares of swapped labels")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=Path("outputs/reward_models"))
    parser.add_argument("--jobs", type=int, default=2, help="side by side")
    parser.add_argument("--threads", type=int, default=1, help="of each")
    parser.add_argument("extra", nargs="*", help="overrides for every run, after --")
    options = parser.parse_args()
    units = [
        Unit(
            options.out / f"seed-{seed}" / f"swapped-{rate:g}",
            seed,
            rate,
            tuple(options.models),
            options.threads,
            tuple(options.extra),
        )
        for seed in options.seeds
        for rate in options.rates
    ]
    began = time.perf_counter()
    measured = run_all(units, options.jobs)
    torch.set_num_threads(options.threads)
    quiet()
    cost = scoring_cost(units[0].folder) if {"warm", "ensemble"} <= set(options.models) else None
    print(f"{time.perf_counter() - began:.0f} s in all")
    write(options.out, by_rate(units, measured), options.models, cost)
    return 0


def run_all(units: Sequence[Unit], jobs: int) -> list[dict[str, Figures]]:
    """The figures of each unit's models, in order; ends with the first that fails."""
    if jobs == 1:
        return [run_unit(unit) for unit in units]
    began = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, initializer=end_with_parent, initargs=(os.getpid(),)) as pool:
        futures = [pool.submit(run_unit, unit) for unit in units]
        try:
            for count, done in enumerate(as_completed(futures), start=1):
                done.result()
                print(f"{count} of {len(units)} done after {time.perf_counter() - began:.0f} s", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def run_unit(unit: Unit) -> dict[str, Figures]:
    """Trains and measures every model of a unit; what is finished is not run again."""
    torch.set_num_threads(unit.threads)
    quiet()
    swaps = [f"rm.label_swap_rate={unit.rate:g}", f"rm.label_swap_seed={unit.seed}"]
    common = [
        f"seed={unit.seed}",
        *swaps,
        "rm.standardize=none",
        "device=cpu",
        f"threads={unit.threads}",
        "resume=auto",
        *unit.extra,
    ]
    found = {}
    for name in unit.models:
        folder = unit.folder / name
        rlhf_here(
            "train-rm", *MODELS[name], f"name={name}", f"run_dir={folder}", *common, log=unit.folder / "train.log"
        )
        file = folder / "measured.json"
        if not file.is_file():
            figures = measure(folder, unit.rate, unit.seed)
            file.write_text(json.dumps(figures, indent=2), encoding="utf-8")
        found[name] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(folder: Path, swap_rate: float, swap_seed: int) -> Figures:
    """Figures of a run's reward model, by the name that COLUMNS has for them."""
    scorer = load_scorer("rm.path", str(folder / "model"), torch.device("cpu"))
    data = reviews_of(folder)
    assert data.gold is not None
    train = with_swaps(data.pairs, swap_rate, swap_seed)
    figures: Figures = {}
    for name, swapped in (("corrupted", True), ("clean", False)):
        rows = [pair for pair in train if pair.swapped is swapped][:TRAIN_PAIRS]
        if rows:
            figures[f"accuracy/train_{name}"] = accuracy(*scorer.score_sides(rows))
    for split, pairs in data.pairs_test.items():
        chosen, rejected = scorer.score_sides(pairs)
        figures[f"accuracy/{split}"] = accuracy(chosen, rejected)
        figures[f"gold_rank/{split}"] = gold_rank(pairs, chosen, rejected, data.gold)
        if split == "test":
            figures |= calibration(scorer, chosen, rejected)
    return figures


def accuracy(chosen: Scores, rejected: Scores) -> float:
    """Share of the pairs whose label the reward agrees with; a tie counts one half."""
    return float(wins(chosen.raw - rejected.raw)) / len(chosen.raw)


def gold_rank(pairs: Sequence[Preference], chosen: Scores, rejected: Scores, gold: GoldReward) -> float:
    """Spearman's correlation of the reward with the gold reward, over both completions of all pairs."""
    texts = [*((pair.prompt, pair.chosen) for pair in pairs), *((pair.prompt, pair.rejected) for pair in pairs)]
    rewards = torch.cat([chosen.raw, rejected.raw]).numpy()
    return float(spearmanr(rewards, [gold(*one) for one in texts]).statistic)


def calibration(scorer: Scorer, chosen: Scores, rejected: Scores) -> Figures:
    """ECE of three probabilities on the same pairs; of distributions over grades, their mean entropy in nats too."""
    odds = scorer.log_odds(chosen, rejected).double().numpy()
    ones = np.ones_like(odds)
    figures = {
        "ece/as_trained": expected_calibration_error(expit(odds), ones),
        "ece/odds": expected_calibration_error(expit(odds), ones),
        "ece/calibrated": expected_calibration_error(expit(odds / scorer.format.temperature), ones),
        "temperature": scorer.format.temperature,
    }
    if scorer.format.grade_loss is None:
        return figures
    assert chosen.logits is not None and rejected.logits is not None
    both = torch.cat([chosen.logits, rejected.logits]).double()
    figures["grade_entropy"] = float(torch.distributions.Categorical(logits=both).entropy().mean())
    if scorer.format.grade_loss == GradeLoss.strict.value:
        p, q = (
            log_pair_probability(one.double(), other.double(), GradeLoss.strict).exp().clamp(max=1.0).numpy()
            for one, other in ((chosen.logits, rejected.logits), (rejected.logits, chosen.logits))
        )
        figures["ece/as_trained"] = two_sided_error(p, q)
        figures["undecided"] = float(np.mean(1 - p - q))  # goes to neither side
    return figures


def two_sided_error(p: Vector, q: Vector, num_bins: int = 15) -> float:
    """ECE of probabilities that need not sum to one.

    Each pair is asked in both orders: p, which comes about, and q, which does not. Where q = 1 - p it is the
    symmetrised ECE of p.

    Args:
        p: P(preferred > other) [Q].
        q: P(other > preferred) [Q].
        num_bins: equal bins of [0, 1].
    """
    predicted = np.concatenate([p, q])
    came_about = np.concatenate([np.ones_like(p), np.zeros_like(q)])
    index = np.minimum((predicted * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(index, weights=came_about - predicted, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(predicted))


def scoring_cost(unit: Path) -> dict[str, float]:
    """Milliseconds for 1,000 rows, WARM and ensemble in turn in this process: medians, and their ratio."""
    pairs = reviews_of(unit / "warm").pairs_test["test"]
    texts = [(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    rows = [texts[i % len(texts)] for i in range(COST_ROWS)]
    prompts, completions = [prompt for prompt, _ in rows], [text for _, text in rows]
    scorers = {
        name: load_scorer("rm.path", str(unit / name / "model"), torch.device("cpu"))
        for name in ("warm", "ensemble")
    }
    taken: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(COST_REPEATS + 1):
        for name, scorer in scorers.items():
            began = time.perf_counter()
            scorer.score(prompts, completions)
            taken[name].append((time.perf_counter() - began) * 1000.0)
    ms = {name: float(np.median(times[1:])) for name, times in taken.items()}  # the first warms up
    return {"warm_ms": ms["warm"], "ensemble_ms": ms["ensemble"], "ratio": ms["ensemble"] / ms["warm"]}


def by_rate(
    units: Sequence[Unit], measured: Sequence[dict[str, Figures]]
) -> dict[float, list[dict[str, Figures]]]:
    """Share of swapped labels -> for each seed the figures of every model."""
    found: dict[float, list[dict[str, Figures]]] = {}
    for unit, figures in zip(units, measured, strict=True):
        found.setdefault(unit.rate, []).append(figures)
    return found


def over_seeds(seeds: Sequence[dict[str, Figures]], model: str) -> dict[str, Estimate]:
    """Mean of each of a model's figures."""
    names = list(seeds[0][model])
    return {name: mean_interval_over_seeds([one[model][name] for one in seeds]) for name in names}


def paired(seeds: Sequence[dict[str, Figures]], first: str, second: str) -> dict[str, Estimate]:
    """Mean difference first - second of each figure that both have, paired by seed."""
    names = [name for name in seeds[0][first] if name in seeds[0][second]]
    return {
        name: mean_interval_over_seeds([one[first][name] - one[second][name] for one in seeds]) for name in names
    }


def write(
    folder: Path,
    found: Mapping[float, list[dict[str, Figures]]],
    models: Sequence[str],
    cost: Mapping[str, float] | None,
) -> None:
    """table.md and table.json."""
    differences = [pair for pair in PAIRED if set(pair) <= set(models)]
    means = {rate: {name: over_seeds(seeds, name) for name in models} for rate, seeds in found.items()}
    deltas = {rate: {f"{a} - {b}": paired(seeds, a, b) for a, b in differences} for rate, seeds in found.items()}
    text = markdown(means)
    if differences:
        text += f"\nDifferences, paired by seed:\n\n{markdown(deltas)}"
    if cost is not None:
        text += "\n" + cost_line(cost)
    (folder / "table.md").write_text(text, encoding="utf-8")
    values = {
        "seeds": found,
        "means": _plain(means),
        "differences": _plain(deltas),
        "scoring": cost,
    }
    (folder / "table.json").write_text(json.dumps(values, indent=2), encoding="utf-8")
    print(text)


def markdown(found: Mapping[float, Mapping[str, Mapping[str, Estimate]]]) -> str:
    """A line for each model at each share of swapped labels; a figure that a model has not is left empty."""
    lines = [
        [f"{rate:.0%}", f"`{name}`"]
        + [cell(figures[key], digits) if key in figures else "" for key, digits in COLUMNS.values()]
        for rate, models in found.items()
        for name, figures in models.items()
    ]
    return table(["swapped", "reward model", *COLUMNS], lines)


def cost_line(cost: Mapping[str, float]) -> str:
    """What scoring takes, in words."""
    return (
        f"Scoring 1,000 rows: WARM {cost['warm_ms']:.0f} ms, ensemble {cost['ensemble_ms']:.0f} ms, "
        f"{cost['ratio']:.1f} times as much (medians of {COST_REPEATS}, in turn in one process).\n"
    )


def _plain(found: Mapping[float, Mapping[str, Mapping[str, Estimate]]]) -> dict[str, object]:
    """For JSON, which has no NaN: without an interval its ends are null."""
    return {
        f"{rate:g}": {
            name: {key: [one.value, *_ends(one)] for key, one in figures.items()}
            for name, figures in models.items()
        }
        for rate, models in found.items()
    }


def _ends(one: Estimate) -> list[float | None]:
    return [None if math.isnan(end) else end for end in (one.lo, one.hi)]


if __name__ == "__main__":
    raise SystemExit(main())
