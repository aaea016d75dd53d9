"""Every method of `algo` on the embedded data, with several seeds and one table.

    python scripts/compare_methods.py --seeds 0 1 2

For each seed all stages are trained with it: one SFT model and one reward model, then each method from them, with its
default settings and the same number of generated samples; then one evaluation of all policies on the same prompts with
the same noise. The table has means over seeds with 95% intervals (Student's t), as Markdown and as CSV. A run that is
there already is kept, so an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from study import cell, mean, read, rlhf, table

from rlhf_cli.evaluation.statistics import Estimate, mean_interval_over_seeds

# Name in the table -> arguments: the defaults of each method; DPO on the data's pairs, and on pairs of its own samples
METHODS: dict[str, list[str]] = {
    "reinforce": ["algo=reinforce"],
    "rloo": ["algo=rloo"],
    "warp": ["algo=warp"],
    "raft": ["algo=raft"],
    "ppo": ["algo=ppo"],
    "vanilla_pg": ["algo=vanilla_pg"],
    "dpo": ["algo=dpo"],
    # as many samples as the others generate: 4 for each of 1,500 prompts, and of the 100 that validate
    "dpo_on_policy": ["algo=dpo", "algo.pairs=on_policy", "algo.num_prompts=1500"],
}

# Models that a method's run has beside model/: row -> folder. They are measured as policies of their own.
MORE = {"warp": {"warp-eta-1": "warp/front/eta-1"}}

# Column -> metric of the evaluation, digits
EVALUATED = {
    "gold": ("gold/mean", 2),
    "reward": ("reward/mean", 2),
    "KL, nats": ("kl/full", 1),
    "length": ("length/mean", 1),
    "distinct-2": ("distinct/2", 3),
    "perplexity, preferred": ("perplexity/preferred", 2),
    "perplexity, samples": ("perplexity/samples", 2),
}


@dataclass(frozen=True)
class Row:
    """A method's figures over the seeds."""

    name: str
    figures: Mapping[str, Estimate]  # column -> mean over seeds
    samples: float | None  # generated in training
    time_s: float | None


def main() -> int:
    """Runs what is missing, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    parser.add_argument("extra", nargs="*", help="overrides for every run, after --")
    options = parser.parse_args()
    for seed in options.seeds:
        run_seed(options.out / f"seed-{seed}", seed, options.methods, options.extra)
    rows = collect([options.out / f"seed-{seed}" for seed in options.seeds], options.methods)
    write_csv(options.out / "table.csv", rows)
    shown = markdown(rows)
    (options.out / "table.md").write_text(shown, encoding="utf-8")
    print(shown)
    return 0


def run_seed(folder: Path, seed: int, methods: Sequence[str], extra: Sequence[str]) -> None:
    """Trains and evaluates one seed; what is finished is not run again."""
    stages = [f"sft.seed={seed}", f"rm.seed={seed}", f"seed={seed}", "resume=auto", *extra]
    for name in methods:
        rlhf("train-policy", *METHODS[name], f"name={name}", f"run_dir={folder / name}", *stages)
    policies = ",".join(str(folder / place) for place in measured(methods).values())
    rlhf("eval", f"policies=[{policies}]", f"run_dir={folder / 'eval'}", *stages)


def measured(methods: Sequence[str]) -> dict[str, str]:
    """Rows of the evaluation, each with its folder."""
    places: dict[str, str] = {}
    for name in methods:
        places |= {name: name} | MORE.get(name, {})
    return places


def collect(folders: Sequence[Path], methods: Sequence[str]) -> list[Row]:
    """The figures of all seeds, by method."""
    evaluations = [read(folder / "eval") for folder in folders]
    rows = []
    for name in ("sft", *measured(methods)):
        figures = {
            column: mean_interval_over_seeds([one[f"{name}/{metric}"] for one in evaluations])
            for column, (metric, _) in EVALUATED.items()
        }
        if name not in methods:
            rows.append(Row(name, figures, None, None))
            continue
        runs = [read(folder / name) for folder in folders]
        samples = [run["samples_generated"] for run in runs]
        times = [run["time_s"] + run.get("time/pairs_s", 0.0) for run in runs]
        rows.append(Row(name, figures, mean(samples), mean(times)))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The table as the README has it."""
    head = ["method", *EVALUATED, "generated", "time, s", "samples/s"]
    lines = []
    for row in rows:
        cells = [f"`{row.name}`"]
        for column, (_, digits) in EVALUATED.items():
            cells.append(cell(row.figures[column], digits))
        cells += ["", "", ""] if row.time_s is None else [*trained(row)]
        lines.append(cells)
    return table(head, lines)


def trained(row: Row) -> tuple[str, str, str]:
    """What training took: samples, seconds, samples a second."""
    assert row.samples is not None and row.time_s is not None
    if row.samples == 0:
        return "0", f"{row.time_s:.0f}", ""
    return f"{row.samples:,.0f}", f"{row.time_s:.0f}", f"{row.samples / row.time_s:.0f}"


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """The same with every digit."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        ends = ("", "_lo", "_hi")
        writer.writerow(
            ["method", *(f"{column}{end}" for column in EVALUATED for end in ends), "samples", "time_s"]
        )
        for row in rows:
            figures = [value for one in row.figures.values() for value in (one.value, one.lo, one.hi)]
            writer.writerow([row.name, *figures, row.samples, row.time_s])


if __name__ == "__main__":
    raise SystemExit(main())
