"""Files and folders that are whole or absent: written aside, on the disk, and only then in their place."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bizassist_nb.core.errors import RunError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, then put it in place: readers see the old one or the new one.

    It is on the disk before it is in place, so this holds for a machine that loses its power, too.
    """
    beside = path.with_name(f".{path.name}.part")
    try:
        write(beside)
        sync_entries(beside)
        beside.replace(path)
        sync_entries(path.parent)
    except OSError:
        beside.unlink(missing_ok=True)  # half of it, on a full disk
        raise


def sync(path: Path) -> None:
    """Have a file, or a folder with all that is in it, on the disk before anything else is done."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    sync_entries(path)


def sync_entries(path: Path) -> None:
    """Have a file on the disk, or of a folder the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it."""
    write_atomic(
        path, lambda part: part.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8", "replace")
    )


def replace_folder(part: Path, target: Path) -> None:
    """Put a folder that has been filled in the place of `target`, which stays there until then.

    Whoever may read other files of this person may read those in it: safetensors gives its own to them alone.
    """
    readable = part.stat().st_mode & 0o666  # as the umask has it: the folder was made by `mkdir`
    for file in part.rglob("*"):
        if file.is_file() and readable & ~file.stat().st_mode:
            with contextlib.suppress(OSError):  # file systems that know no such thing refuse it
                file.chmod(readable)
    sync(part)
    if target.is_dir():  # a folder cannot be put in the place of one that is not empty
        old = _old(target)
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target)
    sync_entries(target.parent)
    shutil.rmtree(_old(target), ignore_errors=True)


def recover(target: Path) -> None:
    """Bring back the folder that was there before, where a worker was killed while it put another in its place."""
    if _old(target).is_dir() and not target.is_dir():
        _old(target).rename(target)


def discard(folder: Path) -> None:
    """Delete a folder, which is gone at once: half of a checkpoint would look like a damaged one."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, gone afterwards unless it was renamed; one process at a time has it.

    The lock (flock) is on the folder itself and ends with the process: what a killed one left is then emptied.

    Raises:
        RunError: if `target` is there, or another process is at it.
    """
    part = target.with_name(f".{target.name}.part")
    part.mkdir(exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"{target} is being written by another process; wait for it") from error
        try:
            if target.exists():
                raise RunError(f"{target} exists already; move it away to have it made anew")
            for left in part.iterdir():
                left.unlink()
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(descriptor)
