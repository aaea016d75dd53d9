"""Writing so that a reader, or a kill at any instant, sees the old state or the new one, never a part."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from rlhf_cli.errors import RequestError

# Held while a run is written.
LOCK_FILE = ".lock"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What the disk refuses inside (it is full, read-only, gone) is raised as an OSError that names `path`.

    A write that fails names no file in Python, and safetensors, which writes in Rust, raises an error of its own.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None) or _errno_of(str(error))
        if number is None:  # not the disk's doing
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: temporary file beside it, fsync, rename.

    Raises OSError that names `path`; the old file is then untouched.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with naming(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json_atomic(path: Path, obj: object) -> None:
    """Replace the file at `path` by `obj` as indented JSON in the order of its keys.

    Raises ValueError where `obj` holds nan or an infinity, which JSON has no word for.
    """
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A lone surrogate, which JSON escapes can smuggle into a text, has no UTF-8 form.
    write_bytes_atomic(path, text.encode("utf-8", errors="replace"))


def take_folder(folder: Path) -> FileLock:
    """Lock a run's folder for this process; a lock dies with its process. Taken again, it counts.

    Raises RequestError where another process has it.
    """
    lock = FileLock(folder.absolute() / LOCK_FILE, is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RequestError(f"run_dir={folder}: another process is still writing this run") from None
    return lock


def replace_folder_atomic(tmp: Path, final: Path) -> None:
    """Let the complete folder `tmp` become `final`; both lie in the same parent.

    Everything in `tmp` reaches the disk before the rename. Where `final` does not exist yet (the usual case)
    the rename is the one instant at which it appears, whole. An existing `final` steps aside under a hidden
    name (.NAME.old) first, because no portable call exchanges two folders: killed between the two renames, there is
    no `final`, and whoever wrote it has to be able to write it again.
    """
    assert tmp.is_dir(), f"{tmp} is not a folder"
    assert tmp.parent.resolve() == final.parent.resolve(), "a rename is atomic within one parent only"
    for root, _, files in os.walk(tmp):
        # As readable as the folder: some libraries write files that are their owner's alone
        mode = Path(root).stat().st_mode & 0o666
        for name in files:
            (Path(root) / name).chmod(mode)
            sync_file(Path(root) / name)
        _sync_folder(Path(root))
    aside = final.parent / f".{final.name}.old"
    if final.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    tmp.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def write_folder_atomic(write: Callable[[Path], object], target: Path) -> None:
    """Writes a folder so that `target` is always a whole one, the old or the new; raises OSError that names it."""
    building = target.with_name(f".{target.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        with naming(target):
            write(building)
            replace_folder_atomic(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def sync_file(path: Path) -> None:
    """Bring what was written into a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    """Bring a folder's entries to the disk, where the platform lets folders be opened."""
    if os.name == "posix":
        sync_file(path)


def _errno_of(text: str) -> int | None:
    """The errno in Rust's words, "No space left on device (os error 28)", or in those of shutil, "[Errno 28] ..."."""
    match = re.search(r"(?:\(os error |\[Errno )(\d+)[)\]]", text)
    return None if match is None else int(match.group(1))
