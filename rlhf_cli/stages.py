"""sft -> rm -> policy: finds the model a stage needs, or trains it once and keeps it under a digest.

The digest covers what changes the artifact: settings, rows, seed, precision and the upstream artifacts' digests, plus
a schema version that is raised when code changes what comes out. Jobs that need the same artifact at the same time
wait on a file lock, which dies with its process; an artifact appears under its name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_cli.build import rm_base, starts_from_sft
from rlhf_cli.config.schema import Standardize
from rlhf_cli.data.dataset import rows_digest
from rlhf_cli.errors import RequestError
from rlhf_cli.files import LOCK_FILE, replace_folder_atomic
from rlhf_cli.models.loading import resolve_path
from rlhf_cli.models.settings import ModelSettings, PeftSettings
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.runs.reward import train_rm
from rlhf_cli.runs.sft import train_sft
from rlhf_cli.settings import TrainSettings
from rlhf_cli.train.distributed import stop_if_asked
from rlhf_cli.train.run_folder import RunFolder

# Raised when a change of code changes an artifact for the same settings.
SCHEMA_VERSION = 2  # 2: roles of a plain chat stand on lines of their own

_KEY_FILE = "stage.json"

# What a model folder is loaded from: weights, configs, and the several forms of a tokenizer.
_MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})

Say = Callable[[str], None]


@dataclass(frozen=True)
class StageKey:
    """Everything that decides an artifact."""

    stage: str  # sft | rm
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


def resolve_sft(job: Job, say: Say) -> Artifact:
    """The SFT model: the given one, a cached one, or one trained now."""
    config = job.config
    if config.sft.path is not None:
        return _given("sft.path", config.sft.path, say)
    key = sft_key(job)
    return _cached(job, key, say, lambda folder: train_sft(_stage_job(job, folder, "train-sft"), config.sft.seed))


def resolve_rm(job: Job, sft: Callable[[], Artifact], say: Say) -> Artifact:
    """The reward model: the given one, a cached one, or one trained now.

    Args:
        job: what needs it.
        sft: gives the SFT model; called only where the reward model is not given.
        say: takes lines for the person watching.
    """
    config = job.config
    if config.rm.path is not None:
        return _given("rm.path", config.rm.path, say)
    upstream = sft()
    key = rm_key(job, upstream)
    return _cached(
        job, key, say, lambda folder: train_rm(_stage_job(job, folder, "train-rm"), config.rm.seed, upstream)
    )


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
                **_adapter("sft.peft", config.sft.peft, config.model.path),
            }
        ),
    )


def rm_key(job: Job, sft: Artifact) -> StageKey:
    """What decides the reward model: it starts from the SFT model, is scaled on its samples, or both."""
    config, data = job.config, job.data
    rm = config.rm
    parts: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "seed": rm.seed,
        "precision": job.precision.name,
        "data.rows": rows_digest(data.pairs, data.pairs_validation),
        "data.max_prompt_tokens": data.max_prompt_tokens,
        "data.max_completion_tokens": data.max_completion_tokens,
        "rm.name": rm.name,
        "rm.append_eos": rm.append_eos,
        "rm.use_margin": rm.use_margin,
        "rm.standardize": rm.standardize,
        "rm.train": _training(rm.train),
        "rm.model": "sft" if starts_from_sft(config) else _backbone("rm.model", rm.model),
    }
    parts |= _adapter("rm.peft", rm.peft, rm_base(config, sft.path))
    scaled = rm.standardize is Standardize.sft_samples
    if scaled:
        parts |= {
            "rm.standardize_samples": rm.standardize_samples,
            "data.prompts": rows_digest(data.prompts[: rm.standardize_samples]),
            "rollout.temperature": config.rollout.temperature,
            "rollout.max_new_tokens": config.rollout.max_new_tokens,
        }
    if scaled or starts_from_sft(config):
        parts["sft"] = sft.digest
    return StageKey("rm", _flat(parts))


def file_digest(path: str) -> str:
    """Digest of a model folder's weights, config, tokenizer and chat template; of the name itself for a hub id."""
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    digest = hashlib.sha256()
    files = (file for file in folder.iterdir() if file.suffix in _MODEL_SUFFIXES)
    for file in sorted(files, key=lambda file: file.name):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _given(key: str, path: str, say: Say) -> Artifact:
    resolved = resolve_path(key, path)
    say(f"{key.split('.')[0]}: using {resolved} ({key} is set)")
    return Artifact(resolved, file_digest(resolved))


def _cached(job: Job, key: StageKey, say: Say, train: Callable[[Path], None]) -> Artifact:
    """The artifact of a key from the cache; trained first where it is not there."""
    cache = Path(job.config.stages.cache_dir)
    folder = cache / key.folder_name
    artifact = Artifact(str(folder / "model"), key.digest)
    world = job.world
    if world.from_main(lambda: not _is_whole(folder)):
        if not job.config.stages.auto:
            raise RequestError(
                f"{key.stage}.path=null: expected a path, because stages.auto=false builds no missing stage"
            )
        world.from_main(lambda: _make_cache(cache))
        # Of several processes the main one holds the lock for all; they train the stage together.
        with _Lock(cache / f".{key.folder_name}.lock", key, say) if world.is_main else nullcontext():
            # another run may have trained it while this one waited
            if world.from_main(lambda: not _is_whole(folder)):
                say(f"{key.stage}: training once into {folder} ({_why_not_cached(cache, key)})")
                # What a process that died left there is continued: we have the lock, and the name says it is the same.
                building = folder.parent / f".building-{folder.name}"
                if not world.from_main(lambda: _is_trained(building)):  # killed before it was put in place
                    train(building)
                if world.is_main:
                    _put_in_place(building, folder, key)
                stop_if_asked(world)
                return artifact
    say(f"{key.stage}: reusing {folder} ({_description(folder)})")
    return artifact


def _is_trained(building: Path) -> bool:
    run = RunFolder(building)
    return run.record_path.is_file() and run.record().status == "finished"


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"stages.cache_dir={cache}: cannot be created ({error.strerror})") from None


def _put_in_place(building: Path, folder: Path, key: StageKey) -> None:
    """Moves a folder that is whole to its name in one step."""
    shutil.rmtree(building / "checkpoints", ignore_errors=True)
    (building / LOCK_FILE).unlink(missing_ok=True)
    (building / _KEY_FILE).write_text(json.dumps(dict(key.parts), indent=2, sort_keys=True), encoding="utf-8")
    replace_folder_atomic(building, folder)


def _is_whole(folder: Path) -> bool:
    """A folder gets its name by a rename after everything is in it."""
    return (folder / _KEY_FILE).is_file()


class _Lock:
    """Holds the artifact's lock; says so when it has to wait for another process."""

    def __init__(self, path: Path, key: StageKey, say: Say) -> None:
        self._lock = FileLock(path)
        self._key = key
        self._say = say

    def __enter__(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            self._say(f"{self._key.stage}: another process is training it, waiting")
            self._lock.acquire()
        except OSError as error:
            folder = Path(self._lock.lock_file).parent
            raise RequestError(f"stages.cache_dir={folder}: cannot be written to ({error.strerror})") from None

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _why_not_cached(cache: Path, key: StageKey) -> str:
    """The nearest cached artifact and what differs; "nothing cached" where there is none."""
    nearest: tuple[int, str, list[str]] | None = None
    for file in sorted(cache.glob(f"{key.stage}-*/{_KEY_FILE}")):
        parts = json.loads(file.read_text(encoding="utf-8"))
        names = sorted({*parts, *key.parts})
        different = [name for name in names if parts.get(name) != key.parts.get(name)]
        if nearest is None or len(different) < nearest[0]:
            shown = [_difference(name, parts.get(name), key.parts.get(name)) for name in different]
            nearest = (len(different), file.parent.name, shown)
    if nearest is None:
        return "nothing cached yet"
    count, name, shown = nearest
    more = f" and {count - 3} more" if count > 3 else ""
    return f"nearest cached: {name}, differs in {', '.join(shown[:3])}{more}"


def _description(folder: Path) -> str:
    """When a cached artifact was made, and in how long."""
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / _KEY_FILE).stat().st_mtime))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return f"same settings, rows, seed and precision; trained {made} in {summary['time_s']:.0f} s"


def _stage_job(job: Job, folder: Path, command: str) -> Job:
    return replace(job, folder=folder, command=command, tracked=False, resume=True)


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


def _difference(name: str, before: Any, now: Any) -> str:
    """A changed key with its values; digests say nothing to a person."""
    if any(isinstance(value, str) and len(value) == 64 for value in (before, now)):
        return name
    return f"{name} {before} -> {now}"
