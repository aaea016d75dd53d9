"""sweep: multirun of a command, then sweep.csv, summary.csv, a table and a plot of reward against KL."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from rlhf_cli.commands.job import ERROR_FILE
from rlhf_cli.commands.launch import FAILED, OK, WRONG_REQUEST, launch_into
from rlhf_cli.commands.show import display_path
from rlhf_cli.errors import bad_choice
from rlhf_cli.evaluation.statistics import Estimate, mean_interval_over_seeds
from rlhf_cli.report.plots import FrontPoint, SweepGroup, reward_vs_kl, sweep_reward_vs_kl
from rlhf_cli.report.tables import sweep_table, write_csv

COMMANDS = ("train-sft", "train-rm", "train-policy", "eval")

# Shown in the table, where a job's summary has them; sweep.csv has every figure.
_SHOWN = (
    "reward/mean",
    "gold/mean",
    "kl/full",
    "length/mean",
    "dpo/accuracy",
    "samples_generated",
    "rm/accuracy",
    "loss",
    "perplexity",
)


@dataclass(frozen=True)
class JobRow:
    """One job of a sweep."""

    number: int
    overrides: Mapping[str, str]
    seed: int | None
    status: str
    error: str | None
    summary: Mapping[str, float | None]


def sweep(arguments: Sequence[str]) -> int:
    """Runs the sweep and collects it; returns the exit status."""
    if not arguments or arguments[0] not in COMMANDS:
        given = arguments[0] if arguments else ""
        print(f"rlhf: {bad_choice('sweep COMMAND', given, COMMANDS)}", file=sys.stderr)
        return WRONG_REQUEST
    status, folder = launch_into(arguments[0], arguments[1:], multirun=True)
    if folder is None or not folder.is_dir():
        return status
    try:
        return max(status, collect(folder))
    except OSError as error:  # the disk is full
        print(f"rlhf: failed: {error}", file=sys.stderr)
        return FAILED


def collect(folder: Path) -> int:
    """Writes the tables and the plot of a sweep's folder, prints them; FAILED where a job did not finish."""
    jobs = read_jobs(folder)
    if not jobs:
        return OK
    keys = swept_keys(jobs)
    metrics = list(dict.fromkeys(name for job in jobs for name in job.summary))
    rows = [_row(job, keys, metrics) for job in jobs]
    write_csv(folder / "sweep.csv", rows, ["job", *keys, "seed", "status", *metrics, "error"])
    groups = grouped(jobs, keys, [metric for metric in metrics if not _is_end_of_interval(metric, metrics)])
    write_csv(folder / "summary.csv", groups)
    shown = [metric for metric in _SHOWN if metric in metrics and _says_something(metric, jobs)]
    labels = [key for key in keys if key != "seed"]
    console = Console(highlight=False)
    console.print(
        sweep_table(
            [{name: row.get(name) for name in ("job", *keys, "status", *shown)} for row in rows],
            ["job", *keys, "status"],
            title="Jobs",
        )
    )
    if any(int(str(group["seeds"])) > 1 for group in groups):
        console.print(
            sweep_table(
                [{name: group.get(name) for name in (*labels, "seeds", *shown)} for group in groups],
                [*labels, "seeds"],
                title="Mean over seeds",
            )
        )
    paths = [folder / "sweep.csv", folder / "summary.csv"]
    if plot := _plot(folder, jobs, labels, groups):
        paths.append(plot)
    if front := _front_plot(folder, jobs, keys):
        paths.append(front)
    for path in paths:
        console.print(str(display_path(path)), markup=False, soft_wrap=True)
    failed = [job for job in jobs if job.status != "finished"]
    for job in failed:
        console.print(
            f"job {job.number} {job.status}: {job.error or 'no reason recorded'}",
            markup=False,
            soft_wrap=True,
        )
    return FAILED if failed else OK


def _says_something(metric: str, jobs: Sequence[JobRow]) -> bool:
    """A budget is shown where the jobs do not have the same one."""
    return metric != "samples_generated" or len({job.summary.get(metric) for job in jobs if job.summary}) > 1


def _is_end_of_interval(metric: str, metrics: Sequence[str]) -> bool:
    """A run's interval over its prompts; a group has one over its seeds, under the same names."""
    return metric.endswith(("_lo", "_hi")) and metric[:-3] in metrics


def read_jobs(folder: Path) -> list[JobRow]:
    """The jobs 0..n-1 of a sweep's folder, by number."""
    numbers = sorted(int(path.name) for path in folder.iterdir() if path.is_dir() and path.name.isdigit())
    return [_read_job(folder / str(number), number) for number in numbers]


def swept_keys(jobs: Sequence[JobRow]) -> list[str]:
    """The override keys whose value differs between jobs, in the order they were given."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def grouped(jobs: Sequence[JobRow], keys: Sequence[str], metrics: Sequence[str]) -> list[dict[str, object]]:
    """A row per combination of the swept keys other than seed: number of seeds, and each metric over them."""
    rows: list[dict[str, object]] = []
    for labels, members in _groups(jobs, keys).items():
        row: dict[str, object] = dict(labels)
        row["seeds"] = len(members)
        for metric in metrics:
            estimate = over_seeds(members, metric)
            row[metric] = estimate
        rows.append(row)
    return rows


def over_seeds(jobs: Sequence[JobRow], metric: str) -> Estimate | None:
    """Mean over the finished jobs that have the metric, with a 95% interval from two on."""
    values = [value for job in jobs if (value := job.summary.get(metric)) is not None]
    return mean_interval_over_seeds(values) if values else None


def _groups(jobs: Sequence[JobRow], keys: Sequence[str]) -> dict[tuple[tuple[str, str], ...], list[JobRow]]:
    labels = [key for key in keys if key != "seed"]
    groups: dict[tuple[tuple[str, str], ...], list[JobRow]] = {}
    for job in jobs:
        if job.status == "finished":
            place = tuple((key, job.overrides.get(key, "")) for key in labels)
            groups.setdefault(place, []).append(job)
    return groups


def _plot(
    folder: Path, jobs: Sequence[JobRow], labels: Sequence[str], groups: Sequence[Mapping[str, object]]
) -> Path | None:
    """Reward against KL, a point per group; None where the command measures neither."""
    points = []
    members = _groups(jobs, labels)
    for group, inside in zip(groups, members.values(), strict=True):
        kl, reward, gold = group.get("kl/full"), group.get("reward/mean"), group.get("gold/mean")
        if not isinstance(kl, Estimate) or not isinstance(reward, Estimate):
            continue
        shown = ("kl/full", "reward/mean", *(("gold/mean",) if isinstance(gold, Estimate) else ()))
        seeds = [job.summary for job in inside if all(job.summary.get(name) is not None for name in shown)]
        points.append(
            SweepGroup(
                label=_label(group, labels),
                kl=kl,
                reward=reward,
                gold=gold if isinstance(gold, Estimate) else None,
                seed_kl=[summary["kl/full"] for summary in seeds],
                seed_reward=[summary["reward/mean"] for summary in seeds],
                seed_gold=[summary["gold/mean"] for summary in seeds] if isinstance(gold, Estimate) else (),
            )
        )
    if not points:
        return None
    path = folder / "plots" / "reward_kl.png"
    sweep_reward_vs_kl(path, points)
    return path


def _front_plot(folder: Path, jobs: Sequence[JobRow], keys: Sequence[str]) -> Path | None:
    """The output fronts of WARP runs: a line for each combination of the swept keys, means over seeds."""
    points = []
    for labels, members in _groups(jobs, keys).items():
        name = _label(dict(labels), [key for key, _ in labels])
        for eta in _etas(members):
            at = {
                figure: _over_seeds_with_own_interval(members, f"front/eta-{eta:g}/{figure}")
                for figure in ("kl/full", "reward/mean", "gold/mean")
            }
            kl, reward = at["kl/full"], at["reward/mean"]
            if kl is not None and reward is not None:
                points.append(FrontPoint(name, f"{eta:g}", kl, reward, at["gold/mean"]))
    if not points:
        return None
    path = folder / "plots" / "front.png"
    reward_vs_kl(path, points, "From the SFT model to the merged one, by eta, 95% intervals")
    return path


def _etas(jobs: Sequence[JobRow]) -> list[float]:
    """The points of the fronts, in order."""
    names = {key.split("/")[1] for job in jobs for key in job.summary if key.startswith("front/")}
    return sorted(float(name.removeprefix("eta-")) for name in names)


def _over_seeds_with_own_interval(jobs: Sequence[JobRow], metric: str) -> Estimate | None:
    """Mean over seeds; of one run its own interval, over prompts."""
    found = over_seeds(jobs, metric)
    if found is None or found.n > 1:
        return found
    ends = (over_seeds(jobs, f"{metric}{end}") for end in ("_lo", "_hi"))
    return Estimate(found.value, *(math.nan if end is None else end.value for end in ends), found.n)


def _label(group: Mapping[str, object], keys: Sequence[str]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]}={group[key]}" for key in keys if key != "seed") or "all"


def _row(job: JobRow, keys: Sequence[str], metrics: Sequence[str]) -> dict[str, object]:
    return {
        "job": job.number,
        **{key: job.overrides.get(key) for key in keys},
        "seed": job.seed,
        "status": job.status,
        **{metric: job.summary.get(metric) for metric in metrics},
        "error": job.error,
    }


def _read_job(folder: Path, number: int) -> JobRow:
    config = folder / ".hydra" / "config.yaml"
    seed = OmegaConf.load(config).get("seed") if config.is_file() else None
    record = _json(folder / "run.json") or _json(folder / ERROR_FILE)
    return JobRow(
        number=number,
        overrides=_overrides(folder / ".hydra" / "overrides.yaml"),
        seed=seed,
        status=str(record.get("status", "missing")),
        error=record.get("error"),
        summary=_json(folder / "summary.json"),
    )


def _overrides(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    pairs = [str(line).lstrip("+").partition("=") for line in OmegaConf.to_container(OmegaConf.load(file)) or []]
    return {key: value for key, _, value in pairs}


def _json(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    return json.loads(file.read_text(encoding="utf-8"))
