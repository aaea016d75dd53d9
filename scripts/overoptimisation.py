"""Over-optimisation on the embedded data: proxy and gold reward against sqrt(KL), of best-of-n and of RL.

    python scripts/overoptimisation.py [--seeds 0 1 2] [--out outputs/overoptimisation] [--jobs 2] [-- overrides]

Three rewards: a scalar reward model trained on a few pairs, a quarter of whose labels are exchanged; WARM of such
members, on the same rows; and the gold reward itself, which cannot be over-optimised. For each seed and reward one
policy is trained by RLOO without a KL penalty. On the prompts of its held-out evaluations the SFT model draws samples
once, all rewards score them, and best-of-n is estimated without bias for n = 1, 2, 4, ...

Every reward is in standard deviations of the SFT model's samples, less their mean, over the same prompts: proxy and
gold begin at 0 and have one scale. Points are means over seeds with 95% intervals (Student's t). The forms of
Gao et al. 2022 (arXiv:2210.10760) are fitted to the points of all seeds:

    best-of-n   R = d (a - b d)
    RL          R = d (a - b log d)          d = sqrt(KL)

Writes numbers.json, table.md and overoptimisation.png. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from study import Command, overrides_apart, run_all, table, write_json

from rlhf_cli import build
from rlhf_cli.data.settings import ReviewsSettings
from rlhf_cli.data.tokenise import prompt_batch
from rlhf_cli.evaluation.best_of_n import best_of_n, best_of_n_kl, sizes
from rlhf_cli.evaluation.overoptimisation import Fit, fit_best_of_n, fit_rl
from rlhf_cli.evaluation.statistics import Estimate, mean_interval_over_seeds
from rlhf_cli.models.loading import load_causal_lm
from rlhf_cli.report.figures import colour, error_lengths, marker, new_figure
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rollout.engine import Sampling, generate
from rlhf_cli.train.seeding import derive_seed

Table = NDArray[np.float64]

# Few pairs with noisy labels, and enough passes over them to learn the noise.
NOISY = ["data.num_pairs=400", "rm.label_swap_rate=0.25", "rm.train.epochs=4"]

# What a policy is trained on. The gold reward stands last: it is its own proxy.
REWARDS: dict[str, list[str]] = {
    "scalar": ["rm=scalar", *NOISY],
    "warm": ["rm=warm", "rm.members=4", *NOISY],
    "gold": ["reward.rm=0", "reward.gold=1", "data.num_pairs=400"],
}
TITLES = {"scalar": "one reward model", "warm": "WARM of 4", "gold": "gold reward"}

NUM_PROMPTS = 64  # of the held-out evaluations, and of best-of-n
# Chosen on seed 10 with 150 steps and the scalar reward model: gold was highest at step 20, with KL 9, and both KL and
# proxy had levelled off at step 100, with KL 65. Hence fewer steps, and evaluations close enough to see gold rise.
RL = [
    "algo=rloo",
    "algo.beta=0",
    "algo.train.steps=100",
    "algo.train.eval_every=5",
    f"algo.eval_prompts={NUM_PROMPTS}",
    "threads=1",
    "resume=auto",
]

WAYS = ("best-of-n", "RL")


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a reward over the SFT model's samples."""

    mean: float
    std: float

    @staticmethod
    def of(rewards: Table) -> Scale:
        """Over all samples of all prompts."""
        if not (std := float(rewards.std())):
            raise SystemExit(f"all samples of the SFT model are worth {rewards.mean():g}: there is no scale")
        return Scale(float(rewards.mean()), std)

    def __call__(self, rewards: Any) -> Any:
        """In standard deviations from the mean."""
        return (rewards - self.mean) / self.std


@dataclass(frozen=True)
class Curve:
    """Proxy and gold over sqrt(KL), for each of S seeds at M points, standardised."""

    d: Table  # [S, M], sqrt(nats)
    proxy: Table  # [S, M]
    gold: Table  # [S, M]

    def means(self, values: Table) -> list[Estimate]:
        """Over seeds, M of them."""
        return [mean_interval_over_seeds(column.tolist()) for column in values.T]


@dataclass(frozen=True)
class Peak:
    """Where a fitted curve is highest."""

    d: float
    reward: float


def main() -> int:
    """Trains and samples what is missing, then fits, tabulates and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("outputs/overoptimisation"))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, a thread each")
    parser.add_argument("--samples", type=int, default=512, help="of a prompt; best-of-n goes up to half of them")
    own, extra = overrides_apart(sys.argv[1:])
    options = parser.parse_args(own)
    train_policies(options.out, options.seeds, options.jobs, extra)
    torch.set_num_threads(options.jobs)
    curves: dict[str, dict[str, Curve]] = {way: {} for way in WAYS}
    scored = [scores_of_samples(options.out, seed, options.samples) for seed in options.seeds]
    for name in REWARDS:
        curves["best-of-n"][name] = best_of_n_curve(scored, name)
        rows = [evaluations(place(options.out, seed, name) / "metrics.jsonl") for seed in options.seeds]
        curves["RL"][name] = rl_curve(rows, scored, name)
    fits = {way: {name: fitted(way, curve) for name, curve in of.items()} for way, of in curves.items()}
    write_json(options.out / "numbers.json", numbers(curves, fits, options.seeds))
    text = as_markdown(curves, fits)
    (options.out / "table.md").write_text(text, encoding="utf-8")
    draw(options.out / "overoptimisation.png", curves, fits)
    print(text)
    return 0


def place(out: Path, seed: int, name: str) -> Path:
    """The folder of a policy."""
    return out / f"seed-{seed}" / name


def train_policies(out: Path, seeds: Sequence[int], jobs: int, extra: Sequence[str]) -> None:
    """One policy for each seed and reward, with the stages it needs."""
    run_all(
        [
            Command(
                [
                    *("train-policy", *RL, *arguments, f"name={name}", f"run_dir={place(out, seed, name)}"),
                    *(f"seed={seed}", f"sft.seed={seed}", f"rm.seed={seed}", f"rm.label_swap_seed={seed}", *extra),
                ],
                out / "logs" / f"seed-{seed}-{name}.log",
            )
            for name, arguments in REWARDS.items()
            for seed in seeds
        ],
        jobs,
    )


def scores_of_samples(out: Path, seed: int, num_samples: int) -> dict[str, Table]:
    """What every reward gives the SFT model's samples on the prompts of the held-out evaluations, [P, N] each."""
    file = out / f"seed-{seed}" / "samples.npz"
    if not file.is_file():
        found = _sample_and_score(out, seed, num_samples)
        with file.open("wb") as stream:
            np.savez_compressed(stream, **found)
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


@torch.no_grad()
def _sample_and_score(out: Path, seed: int, num_samples: int) -> dict[str, Table]:
    folder = place(out, seed, "scalar")
    config = json.loads((folder / "run_config.json").read_text(encoding="utf-8"))
    settings = ReviewsSettings(**{key[5:]: value for key, value in config.items() if key.startswith("data.")})
    data = build.dataset(settings, config["algo.eval_prompts"])
    assert data.gold is not None
    cpu = torch.device("cpu")
    model, tokenizer = load_causal_lm("sft", _upstream(folder, "sft"), cpu)
    scorers = {
        name: load_scorer(name, _upstream(place(out, seed, name), "rm"), cpu) for name in REWARDS if name != "gold"
    }
    sampling = Sampling(
        config["rollout.max_new_tokens"], config["rollout.temperature"], config["rollout.max_rows"]
    )
    prompts = data.prompts_validation
    found: dict[str, list[list[float]]] = {name: [] for name in REWARDS}
    for number, prompt in enumerate(prompts):
        batch = prompt_batch(tokenizer, [prompt], [number], data.max_prompt_tokens)
        rollout = generate(model, tokenizer, batch, num_samples, sampling, derive_seed(seed, "best-of-n"), 0)
        finished = [not cut for cut in rollout.truncated.tolist()]
        for name, scorer in scorers.items():
            found[name].append(scorer.score(rollout.prompts, rollout.completions, finished).reward.tolist())
        asked = zip(rollout.prompts, rollout.completions, strict=True)
        found["gold"].append([data.gold(text, completion) for text, completion in asked])
    return {name: np.array(rows) for name, rows in found.items()}


def _upstream(folder: Path, stage: str) -> str:
    """The model that a policy's run was trained with."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return str(record["upstream"][stage]["path"])


def evaluations(metrics: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl that have a held-out evaluation."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "eval/kl/full" in row]


def best_of_n_curve(scored: Sequence[Mapping[str, Table]], name: str) -> Curve:
    """Best-of-n by a reward for n = 1, 2, 4, ... up to half of the samples, S seeds."""
    ns = sizes(scored[0][name].shape[1] // 2)
    d = [math.sqrt(best_of_n_kl(n)) for n in ns]

    def values(of: str) -> Table:
        return np.array(
            [[Scale.of(one[of])(best_of_n(one[name], one[of], n).mean()) for n in ns] for one in scored]
        )

    return Curve(np.array([d] * len(scored)), values(name), values("gold"))


def rl_curve(
    rows: Sequence[Sequence[Mapping[str, float]]], scored: Sequence[Mapping[str, Table]], name: str
) -> Curve:
    """A policy's held-out evaluations in the order of training, S seeds, from the SFT model itself on."""

    def values(metric: str, scale: Callable[[Mapping[str, Table]], Callable[[float], float]]) -> Table:
        return np.array(
            [[0.0, *(scale(one)(row[metric]) for row in run)] for run, one in zip(rows, scored, strict=True)]
        )

    return Curve(
        # an estimate near 0 can lie below it
        values("eval/kl/full", lambda one: lambda kl: math.sqrt(max(0.0, kl))),
        values("eval/reward/mean", lambda one: Scale.of(one[name])),
        values("eval/gold/mean", lambda one: Scale.of(one["gold"])),
    )


def fitted(way: str, curve: Curve) -> dict[str, Fit]:
    """The way's form for proxy and gold, through the points of all seeds."""
    fit = fit_best_of_n if way == "best-of-n" else fit_rl
    return {of: fit(curve.d.ravel(), getattr(curve, of).ravel()) for of in ("proxy", "gold")}


def peak(way: str, fit: Fit) -> Peak | None:
    """The highest point of a fitted curve, where it has one; it may lie beyond what was measured.

    d (a - b d) is highest at a / 2b, d (a - b log d) at exp(a / b - 1); both need b > 0, the former a > 0 too.
    """
    if fit.b <= 0 or (way == "best-of-n" and fit.a <= 0):
        return None
    d = fit.a / (2 * fit.b) if way == "best-of-n" else math.exp(min(fit.a / fit.b - 1, 700.0))
    return Peak(d, float(fit([d])[0]))


def numbers(
    curves: Mapping[str, Mapping[str, Curve]],
    fits: Mapping[str, Mapping[str, Mapping[str, Fit]]],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """All points and fits."""
    result: dict[str, Any] = {"seeds": list(seeds)}
    for way, of in curves.items():
        for name, curve in of.items():
            highest = {key: peak(way, fit) for key, fit in fits[way][name].items()}
            result[f"{way}/{name}"] = {
                "d": curve.d.tolist(),
                "proxy": curve.proxy.tolist(),
                "gold": curve.gold.tolist(),
                "fit": {
                    key: {
                        "a": fit.a,
                        "b": fit.b,
                        "r_squared": fit.r_squared,
                        "peak_d": one.d if (one := highest[key]) else None,
                        "peak": one.reward if one else None,
                    }
                    for key, fit in fits[way][name].items()
                },
            }
    return result


def as_markdown(
    curves: Mapping[str, Mapping[str, Curve]], fits: Mapping[str, Mapping[str, Mapping[str, Fit]]]
) -> str:
    """A line for each way and reward: the fits, the fitted maximum of gold, and gold at the largest d."""
    head = ["", "reward", "proxy: a, b, R²", "gold: a, b, R²", "fitted maximum of gold"]
    head += ["best gold", "last: d", "proxy", "gold"]
    rows = []
    for way, of in curves.items():
        for name, curve in of.items():
            fit = fits[way][name]
            gold = curve.means(curve.gold)
            best = max(range(len(gold)), key=lambda i: gold[i].value)
            rows.append(
                [
                    *(way, TITLES[name]),
                    *(f"{one.a:.2f}, {one.b:.2f}, {one.r_squared:.2f}" for one in (fit["proxy"], fit["gold"])),
                    _peak_text(peak(way, fit["gold"]), float(curve.d.max())),
                    f"{_text(gold[best])} at d = {curve.d[:, best].mean():.2f}",
                    f"{curve.d[:, -1].mean():.2f}",
                    *(_text(curve.means(values)[-1]) for values in (curve.proxy, curve.gold)),
                ]
            )
    return table(head, rows)


def _peak_text(one: Peak | None, largest: float) -> str:
    if one is None:
        return "none"
    return f"{one.reward:.2f} at d = {one.d:.2f}" if one.d <= largest else f"beyond d = {largest:.1f}"


def _text(one: Estimate) -> str:
    return f"{one.value:.2f}" + ("" if math.isnan(one.lo) else f" ± {one.half_width:.2f}")


def draw(
    path: Path, curves: Mapping[str, Mapping[str, Curve]], fits: Mapping[str, Mapping[str, Mapping[str, Fit]]]
) -> None:
    """A panel for each way: proxy dashed and hollow, gold solid and filled, fits thin."""
    with new_figure(
        path, (10.5, 4.9), "Over-optimisation: means over seeds, 95% intervals; lines are the fitted forms"
    ) as figure:
        for axes, way in zip(figure.subplots(1, len(WAYS)), WAYS, strict=True):
            axes.axhline(0, color="#666666", linewidth=0.8)
            for index, (name, curve) in enumerate(curves[way].items()):
                for of, dashed in (("proxy", True), ("gold", False)):
                    if name == "gold" and dashed:
                        continue  # it is the same curve
                    _draw_curve(axes, index, curve, of, fits[way][name][of], dashed, TITLES[name])
            axes.set_title(
                {"best-of-n": "best of n samples of the SFT model", "RL": "RLOO without a KL penalty"}[way]
            )
            axes.set_xlabel("sqrt(KL to the SFT model), sqrt(nats)")
            axes.set_ylabel("reward gained (SFT standard deviations)")
            axes.set_xlim(left=0)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="medium")


def _draw_curve(axes: Any, index: int, curve: Curve, of: str, fit: Fit, dashed: bool, title: str) -> None:
    d = curve.d.mean(axis=0)
    estimates = curve.means(getattr(curve, of))
    line = np.linspace(0, d.max(), 201)
    style = {"color": colour(index), "linestyle": "--" if dashed else "-", "linewidth": 1.2}
    points = {
        "color": colour(index),
        "marker": marker(index),
        "markersize": 6,
        "markerfacecolor": "white" if dashed else colour(index),
    }
    axes.plot(line, fit(line), **style)
    values, reach = [one.value for one in estimates], error_lengths(estimates)
    axes.errorbar(d, values, yerr=reach, linestyle="none", elinewidth=0.9, **points)
    label = f"{title}: {of}" if title != TITLES["gold"] else "gold reward as the reward"
    axes.plot([], [], **{**points, **style}, label=label)


if __name__ == "__main__":
    raise SystemExit(main())
