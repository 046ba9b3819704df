"""Files and folders that are whole or absent: written beside their place, synced to the disk, and then renamed."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from bizassist_nb.core.errors import RunError

_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What flock raises on file systems without locks: some network file systems, some of FUSE."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` fill a file beside `path`, then put it in place: readers see the old one or the new one.

    The file is synced before it is renamed, so this is true after a power failure, too.
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
    """Sync a file, or a folder with all that is in it, to the disk."""
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    sync_entries(path)


def sync_entries(path: Path) -> None:
    """Sync a file to the disk, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write JSON, records too, so that a reader never sees half of it."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=msgspec.to_builtins)
    write_atomic(path, lambda part: part.write_text(text, "utf-8", "replace"))


def replace_folder(part: Path, target: Path) -> None:
    """Rename the filled folder `part` to `target`, replacing what is there.

    Its files become as readable as the folder itself: safetensors makes them readable by their owner alone.
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
    """Bring back the former folder where a worker was killed while it replaced it."""
    if _old(target).is_dir() and not target.is_dir():
        _old(target).rename(target)


def discard(folder: Path) -> None:
    """Delete a folder by renaming it first: a half-deleted checkpoint would look like a damaged one."""
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def try_lock(descriptor: int, kind: int) -> bool:
    """Lock an open file or folder (flock); False where another process has it.

    Raises:
        RunError: on a file system that has no locks.
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise RunError(
            f"the file system has no locks ({error.strerror}), which keep two processes from writing the same run; "
            "take a runs_dir on another disk, and copy the run there"
        ) from error
    return True


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill, put in the place of `target` when the block ends, or deleted if an error ends it.

    It is locked to one process at a time. The lock (flock) is on the folder itself and ends with the process: the next
    one empties what a killed one left.

    Raises:
        RunError: if `target` is there, or another process is at it.
    """
    part = target.with_name(f".{target.name}.part")
    part.mkdir(exist_ok=True)
    with contextlib.ExitStack() as at_end:
        descriptor = os.open(part, os.O_RDONLY)
        at_end.callback(os.close, descriptor)
        if not try_lock(descriptor, fcntl.LOCK_EX):
            raise RunError(f"{target} is being written by another process; wait for it")
        at_end.callback(shutil.rmtree, part, ignore_errors=True)
        if target.exists():
            raise RunError(f"{target} exists already; move it away to have it made anew")
        for left in part.iterdir():
            left.unlink()
        yield part
        replace_folder(part, target)


def make_once(folder: Path, make: Callable[[Path], object]) -> None:
    """Have `make` fill the folder if it is not there; one process does, others wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # it ends with the process
        part = folder.parent / ".part"
        shutil.rmtree(part, ignore_errors=True)
        if folder.is_dir():
            return
        part.mkdir()
        try:
            make(part)
            replace_folder(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
