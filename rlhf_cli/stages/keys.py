"""What decides an artifact.

A digest covers what changes the artifact: settings, rows, seed, precision and the upstream artifacts' digests, plus a
schema version that is raised when code changes what comes out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf_cli.build import rm_base, starts_from_sft
from rlhf_cli.data.dataset import rows_digest
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.models.settings import INDEX_FILE, ModelSettings, PeftSettings
from rlhf_cli.rewards.settings import DistributionalRm, EnsembleRm, Grades, Margins, RmConfig, Standardize
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.settings import ReadOut, TrainSettings

# Raised when a change of code changes an artifact for the same settings.
SCHEMA_VERSION = 3  # 3: reward models have a temperature

# What a model folder is loaded from: weights, configs, and the several forms of a tokenizer.
_MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})


@dataclass(frozen=True)
class StageKey:
    """Everything that decides an artifact."""

    stage: str  # sft | rm | rm-start | rm-member
    parts: Mapping[str, Any]  # flat: dotted key -> JSON value

    @property
    def digest(self) -> str:
        """Hex digest of the parts."""
        text = json.dumps(dict(self.parts), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def folder_name(self) -> str:
        """Name in the cache."""
        return f"{self.stage}-{self.digest[:12]}"


def sft_key(job: Job) -> StageKey:
    """What decides the SFT model."""
    config, data = job.config, job.data
    return StageKey(
        "sft",
        _flat(
            {
                "schema": SCHEMA_VERSION,
                "seed": config.sft.seed,
                "precision": job.precision.name,
                "model": _backbone("model", config.model),
                "data.rows": rows_digest(data.sft, data.sft_validation),
                "data.max_prompt_tokens": data.max_prompt_tokens,
                "data.max_completion_tokens": data.sft_completion_tokens,
                "sft.train": _training(config.sft.train),
                **({"sft.snapshots": config.sft.snapshots} if config.sft.snapshots else {}),
                **_adapter("sft.peft", config.sft.peft, config.model.path),
            }
        ),
    )


def rm_key(job: Job, sft: Artifact) -> StageKey:
    """What decides a single reward model: it starts from the SFT model, is scaled on its samples, or both."""
    rm = job.config.rm
    parts = _rm_parts(job, rm) | _scaling(job) | {"rm.calibrate": rm.calibrate}
    parts |= {
        "rm.probe_steps": rm.probe_steps,
        **({"rm.probe_lr": rm.probe_lr} if rm.probe_steps else {}),
        "rm.model": "sft" if starts_from_sft(job.config) else _backbone("rm.model", rm.model),
        **_adapter("rm.peft", rm.peft, rm_base(job.config, sft.path)),
    }
    if starts_from_sft(job.config) or rm.standardize is Standardize.sft_samples:
        parts["sft"] = sft.digest
    return StageKey("rm", _flat(parts))


def rm_start_key(job: Job, sft: Artifact) -> StageKey:
    """What decides the start that members share: the backbone, and a head that is probed on it."""
    config, rm = job.config, job.config.rm
    parts: dict[str, Any] = {
        "seed": rm.seed,
        "rm.num_labels": rm.num_labels,
        "rm.probe_steps": rm.probe_steps,
        "rm.model": "sft" if starts_from_sft(config) else _backbone("rm.model", rm.model),
        **_text(job, rm),
    }
    if rm.probe_steps:
        parts |= {**_learning(job, rm), "rm.probe_lr": rm.probe_lr, "rm.train.batch_size": rm.train.batch_size}
    if starts_from_sft(config):
        parts["sft"] = sft.digest
    return StageKey("rm-start", _flat(parts))


def rm_member_key(
    job: Job, member: RmConfig, start: Artifact, snapshot: Artifact | None, base: str | None
) -> StageKey:
    """What decides one of several reward models; not how many there are, so that it serves more of them too."""
    parts = _rm_parts(job, member) | {"start": start.digest, **_adapter("rm.peft", member.peft, base)}
    if snapshot is not None:
        parts["snapshot"] = snapshot.digest
    return StageKey("rm-member", _flat(parts))


def merged_rm_key(job: Job, sft: Artifact, members: Sequence[Artifact]) -> StageKey:
    """What decides a reward model that is made of members."""
    rm = job.config.rm
    parts: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "precision": job.precision.name,
        "rm.name": rm.name,
        "members": "-".join(member.digest for member in members),
        "rm.selection": rm.selection,
        "rm.calibrate": rm.calibrate,
        "data.pairs_validation": rows_digest(job.data.pairs_validation),
        **_grades(rm),
        **_read_out(rm),
        **_scaling(job),
    }
    if isinstance(rm, EnsembleRm):
        parts["rm.disagreement_penalty"] = rm.disagreement_penalty
    if rm.standardize is Standardize.sft_samples:
        parts["sft"] = sft.digest
    return StageKey("rm", _flat(parts))


def _rm_parts(job: Job, rm: RmConfig) -> dict[str, Any]:
    """What decides how one model is trained, wherever it starts."""
    return {
        "seed": rm.seed,
        "rm.name": rm.name,
        "rm.train": _training(rm.train),
        **({} if rm.dropout is None else {"rm.dropout": rm.dropout}),
        **_text(job, rm),
        **_learning(job, rm),
        **(_read_out(rm) if isinstance(rm, DistributionalRm) else {}),
    }


def _text(job: Job, rm: RmConfig) -> dict[str, Any]:
    data = job.data
    return {
        "schema": SCHEMA_VERSION,
        "precision": job.precision.name,
        "data.max_prompt_tokens": data.max_prompt_tokens,
        "data.max_completion_tokens": data.max_completion_tokens,
        "rm.append_eos": rm.append_eos,
    }


def _learning(job: Job, rm: RmConfig) -> dict[str, Any]:
    """Rows and loss."""
    parts: dict[str, Any] = {"data.rows": rows_digest(job.data.pairs, job.data.pairs_validation)}
    if rm.label_swap_rate:
        parts |= {"rm.label_swap_rate": rm.label_swap_rate, "rm.label_swap_seed": rm.label_swap_seed}
    if rm.num_labels == 1:
        assert isinstance(rm, Margins)
        return parts | {"rm.use_margin": rm.use_margin}
    return parts | _grades(rm)


def _grades(rm: RmConfig) -> dict[str, Any]:
    if rm.num_labels == 1:
        return {}
    assert isinstance(rm, Grades)
    return {"rm.num_grades": rm.num_grades, "rm.loss": rm.loss, "rm.entropy_bonus": rm.entropy_bonus}


def _read_out(rm: RmConfig) -> dict[str, Any]:
    if rm.num_labels == 1:
        return {}
    assert isinstance(rm, Grades)
    used = {ReadOut.mean_std: ("std_weight",), ReadOut.cvar: ("cvar_alpha",)}.get(rm.read_out, ())
    return {f"rm.{key}": getattr(rm, key) for key in ("read_out", *used)}


def _scaling(job: Job) -> dict[str, Any]:
    """The SFT samples that a reward is scaled on."""
    config, rm = job.config, job.config.rm
    if rm.standardize is not Standardize.sft_samples:
        return {"rm.standardize": rm.standardize}
    return {
        "rm.standardize": rm.standardize,
        "rm.standardize_samples": rm.standardize_samples,
        "seed": rm.seed,
        "data.prompts": rows_digest(job.data.prompts[: rm.standardize_samples]),
        "data.max_prompt_tokens": job.data.max_prompt_tokens,
        "rollout.temperature": config.rollout.temperature,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }


def file_digest(path: str) -> str:
    """Digest of a model folder's weights, config, tokenizer and chat template, and of the members that it has in
    folders of their own; of the name itself for a hub id.
    """
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    digest = hashlib.sha256()
    members = folder.glob("*/") if (folder / INDEX_FILE).is_file() else ()
    for file in (*_model_files(folder), *(file for member in sorted(members) for file in _model_files(member))):
        digest.update(str(file.relative_to(folder)).encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _model_files(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES)


def _backbone(key: str, settings: ModelSettings) -> dict[str, Any]:
    """What decides the starting weights: not where they lie, and not learning rates, which belong to the stages."""
    if settings.path is not None:
        return {"weights": file_digest(resolve_path(f"{key}.path", settings.path))}
    values = asdict(settings)
    return {key: value for key, value in values.items() if key not in ("name", "path", "lr", "encoder")}


def _training(settings: TrainSettings) -> dict[str, Any]:
    values = asdict(settings)
    del values["samples_every"]  # decides what is written beside the weights, not the weights
    del values["gradient_checkpointing"]  # the same weights with less memory
    if settings.warmup_steps is None:
        del values["warmup_steps"]  # warmup_ratio decides, as it did before there was this key
    return values


def _adapter(key: str, settings: PeftSettings, base: str | None) -> dict[str, Any]:
    """What an adapter adds to a key: nothing where there is none."""
    return {} if settings.name == "none" or base is None else {key: settings.used()}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value.value if isinstance(value, Enum) else value
    return flat
