"""Artifacts that stages have trained, each in a folder whose name is a digest of all that decides it.

Jobs that need the same artifact at the same time wait on a file lock, which dies with its process; an artifact appears
under its name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf_cli.errors import RequestError
from rlhf_cli.files import LOCK_FILE, replace_folder_atomic
from rlhf_cli.runs.job import Artifact, Job
from rlhf_cli.stages.keys import StageKey
from rlhf_cli.train.distributed import stop_if_asked
from rlhf_cli.train.run_folder import RunFolder

_KEY_FILE = "stage.json"

# A larger seed was derived, not typed.
_LARGEST_TYPED = 10**9

Say = Callable[[str], None]


def cached(job: Job, key: StageKey, say: Say, train: Callable[[Path], None]) -> Artifact:
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
    own_kind = f"{key.stage}-{'[0-9a-f]' * 12}"  # rm-... is not rm-member-...
    for file in sorted(cache.glob(f"{own_kind}/{_KEY_FILE}")):
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


def _difference(name: str, before: Any, now: Any) -> str:
    """A changed key with its values; digests and derived seeds say nothing to a person."""
    if any(isinstance(value, str) and len(value) >= 64 for value in (before, now)):
        return name
    if any(isinstance(value, int) and value > _LARGEST_TYPED for value in (before, now)):
        return name
    return f"{name} {before} -> {now}"
