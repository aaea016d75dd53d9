"""eval: policies and reward models on the same held-out prompts, every figure with its interval."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf
from rich.console import Console

from rlhf_cli import build
from rlhf_cli.commands.context import Context
from rlhf_cli.commands.eval_reward_model import RewardModelReport, evaluate_reward_model, show_reward_model
from rlhf_cli.commands.show import display_path
from rlhf_cli.commands.train import make_job, say
from rlhf_cli.config.schema import RunConfig
from rlhf_cli.errors import RequestError, bad_choice
from rlhf_cli.evaluation.policies import Measured, Policy, Questions, measure, summarise
from rlhf_cli.evaluation.statistics import Estimate, resolution_note
from rlhf_cli.models.loading import load_causal_lm, resolve_path
from rlhf_cli.report.plots import FrontPoint, reward_bars, reward_vs_kl
from rlhf_cli.report.tables import PolicyRow, policy_table
from rlhf_cli.rewards.ensemble import load_scorer
from rlhf_cli.rewards.model import Scorer
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.stages import file_digest, resolve_rm, resolve_sft
from rlhf_cli.train.recorder import RunRecorder, recorded_run
from rlhf_cli.train.seeding import derive_seed

# Folders of a run that hold models of their own.
_PARTS = ("front", "members", "iterations")

_SHOWN = ("reward/mean", "gold/mean", "kl/full", "length/mean", "perplexity/preferred", "distinct/2")

Cells = Mapping[str, tuple[Estimate, Estimate | None]]


@dataclass(frozen=True)
class _Subject:
    """A policy to evaluate, before its model is loaded."""

    name: str
    path: str
    upstream: Mapping[str, Artifact]  # by stage, as its run.json has them


def run_eval(config: RunConfig, context: Context) -> None:
    """Measures, writes summary.json, per_prompt.jsonl and plots, prints a table."""
    job = make_job(config, context)
    _check_split(job)
    subjects = _named([_subject(path) for path in config.policies])
    reference = _reference(job, subjects)
    sft = functools.cache(lambda: _sft(job, subjects))
    rm = _reward_model(job, subjects, sft)
    sampler = (reference or sft()) if config.eval.best_of_n else None
    base = reference or sampler
    upstream = {"rm": rm} | ({"reference": base} if base else {})
    total = len(subjects) + (1 if subjects else 0) + 1 + (sampler is not None)
    with recorded_run(job.request("eval", config.seed, total, (), upstream)) as recorder:
        (recorder.run.path / "per_prompt.jsonl").unlink(missing_ok=True)  # an evaluation starts over
        reward_model = load_scorer("rm.path", rm.path, job.precision.device, build.scalar_format(config))
        report = evaluate_reward_model(job, reward_model, sampler, recorder)
        table: dict[str, Cells] = {}
        if subjects:
            assert reference is not None
            table = _evaluate_policies(job, subjects, reference, reward_model, recorder, 1 + (sampler is not None))
        recorder.summary(_flat_summary(table, report.figures))
        paths = [*_plots(recorder.run.plots, table), *report.plots]
    files = [recorder.run.path / name for name in ("summary.json", "per_prompt.jsonl")]
    _show(table, report, [*files, *report.files, *paths])


def _evaluate_policies(
    job: Job,
    subjects: Sequence[_Subject],
    reference: Artifact,
    reward_model: Scorer,
    recorder: RunRecorder,
    done: int,
) -> dict[str, Cells]:
    """`done`: steps of the progress bar before these."""
    config, data, device = job.config, job.data, job.precision.device
    prompts = data.prompts_test[config.eval.split][: config.eval.num_prompts]
    if len(prompts) < config.eval.num_prompts:
        say(f"eval.num_prompts={config.eval.num_prompts}: the {config.eval.split} split has {len(prompts)}")
    questions = Questions(
        prompts=prompts,
        preferred=data.pairs_test[config.eval.split][: config.eval.num_prompts],
        max_prompt_tokens=data.max_prompt_tokens,
        max_completion_tokens=data.max_completion_tokens,
        sampling=replace(job.sampling, temperature=config.eval.temperature),
        samples_per_prompt=config.eval.samples_per_prompt,
        seed=derive_seed(config.seed, "eval"),
    )
    name = "sft" if config.reference.path is None else "reference"
    base = Policy(name, *load_causal_lm("reference.path", reference.path, device))
    measured: list[Measured] = []
    for place, subject in enumerate([None, *subjects]):
        policy = (
            base if subject is None else Policy(subject.name, *load_causal_lm("policies", subject.path, device))
        )
        one = measure(policy, base, reward_model, data.gold, questions, job.precision)
        measured.append(one)
        _append_rows(recorder.run.path / "per_prompt.jsonl", one)
        recorder.progress.update(done + place + 1, {})
        del policy
    return summarise(measured, base.name, config.eval.num_resamples, config.seed)


def _append_rows(path: Path, measured: Measured) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in measured.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _check_split(job: Job) -> None:
    split = job.config.eval.split
    if split not in job.data.pairs_test or split not in job.data.prompts_test:
        raise bad_choice("eval.split", split, job.data.pairs_test)


def _subject(path: str) -> _Subject:
    resolved = resolve_path("policies", path)
    folder = Path(path).expanduser()
    inside = ""
    if not (folder / "run.json").is_file() and (run := _run_around(folder.absolute())):
        inside, folder = f"-{folder.absolute().name}", run
    record = folder / "run.json"
    if not record.is_file():
        return _Subject(folder.absolute().name, resolved, {})
    values = json.loads(record.read_text(encoding="utf-8"))
    upstream = {
        stage: Artifact(_upstream_path(folder, artifact["path"]), artifact["digest"])
        for stage, artifact in values.get("upstream", {}).items()
    }
    return _Subject(_run_name(folder, values) + inside, resolved, upstream)


def _run_around(folder: Path) -> Path | None:
    """The run that a model in its front/, members/ or iterations/ belongs to; None for any other folder."""
    for part in folder.parents[:3]:
        if part.name in _PARTS and (part.parent / "run.json").is_file():
            return part.parent
    return None


def _upstream_path(folder: Path, path: str) -> str:
    """A path from run.json: relative to where the run was started or, if that has moved, to here."""
    hydra = folder / ".hydra" / "hydra.yaml"
    if not hydra.is_file():
        return path
    there = Path(OmegaConf.load(hydra).hydra.runtime.cwd) / path
    return str(there) if there.exists() else path


def _run_name(folder: Path, record: Mapping[str, object]) -> str:
    return str(record.get("name") or folder.absolute().name)


def _named(subjects: Sequence[_Subject]) -> list[_Subject]:
    """Two policies of one name get their folders' names; equal ones even then, a number."""
    names = [subject.name for subject in subjects]
    result: list[_Subject] = []
    for subject in subjects:
        name = subject.name
        if names.count(name) > 1:
            folder = Path(subject.path)
            name = (folder.parent if folder.name == "model" else folder).name
        taken = {one.name for one in result} | {"sft", "reference", "rm"}
        unique, number = name, 2
        while unique in taken:
            unique, number = f"{name}-{number}", number + 1
        result.append(_Subject(unique, subject.path, subject.upstream))
    return result


def _reference(job: Job, subjects: Sequence[_Subject]) -> Artifact | None:
    """What differences are measured to: the given model, or the SFT model behind the first policy."""
    given = job.config.reference.path
    if given is not None:
        path = resolve_path("reference.path", given)
        return Artifact(path, file_digest(path))
    if not subjects:
        return None
    sft = subjects[0].upstream.get("sft")
    if sft is None:
        raise RequestError(
            f"reference.path=null: {subjects[0].path} does not say which SFT model it comes from; give one"
        )
    path = resolve_path("reference.path", sft.path)
    return Artifact(path, file_digest(path))


def _reward_model(job: Job, subjects: Sequence[_Subject], sft: Callable[[], Artifact]) -> Artifact:
    """The given reward model, the one behind a policy, or one from the cache: some policies have none behind them."""
    if job.config.rm.path is None:
        for subject in subjects:
            if "rm" in subject.upstream:
                path = resolve_path("rm.path", subject.upstream["rm"].path)
                say(f"rm: using {path} (behind {subject.name})")
                return Artifact(path, file_digest(path))
    return resolve_rm(job, sft, say)


def _sft(job: Job, subjects: Sequence[_Subject]) -> Artifact:
    """The SFT model that a reward model is built on: the given one, the first policy's, or one from the cache."""
    if job.config.sft.path is None and subjects and "sft" in subjects[0].upstream:
        sft = subjects[0].upstream["sft"]
        path = resolve_path("sft.path", sft.path)
        say(f"sft: using {path} (behind {subjects[0].name})")
        return Artifact(path, sft.digest)  # the digest that reward models on it are known by
    return resolve_sft(job, say)


def _flat_summary(table: Mapping[str, Cells], pairs: Mapping[str, Estimate]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, cells in table.items():
        for metric, (value, delta) in cells.items():
            flat |= _spread(f"{name}/{metric}", value)
            if delta is not None:
                flat |= _spread(f"{name}/{metric}_delta", delta)
    for metric, estimate in pairs.items():
        flat |= _spread(metric, estimate)
    return flat


def _spread(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_lo": estimate.lo, f"{name}_hi": estimate.hi}


def _plots(folder: Path, table: Mapping[str, Cells]) -> list[Path]:
    if not table:
        return []
    names = list(table)
    reward = [table[name]["reward/mean"][0] for name in names]
    gold = [table[name]["gold/mean"][0] for name in names] if "gold/mean" in table[names[0]] else None
    bars, front = folder / "reward.png", folder / "reward_kl.png"
    reward_bars(bars, names, reward, gold)
    points = [
        FrontPoint(name, "", table[name]["kl/full"][0], reward[i], None if gold is None else gold[i])
        for i, name in enumerate(names)
        if "kl/full" in table[name]
    ]
    reward_vs_kl(front, points)
    return [bars, front]


def _show(table: Mapping[str, Cells], report: RewardModelReport, paths: Sequence[Path]) -> None:
    console = Console(highlight=False)
    if table:
        rows = [
            PolicyRow(
                name,
                {m: cells[m][0] for m in _SHOWN if m in cells},
                {m: delta for m in _SHOWN if m in cells and (delta := cells[m][1]) is not None},
            )
            for name, cells in table.items()
        ]
        console.print(policy_table(rows))
        last = list(table.values())[-1]
        delta = last.get("gold/mean", last["reward/mean"])[1]
        if delta is not None:
            metric = "gold/mean" if "gold/mean" in last else "reward/mean"
            console.print(f"{metric}: {resolution_note(delta)}", markup=False)
    show_reward_model(report, console)
    for path in paths:
        if path.exists():
            console.print(str(display_path(path)), markup=False, soft_wrap=True)
