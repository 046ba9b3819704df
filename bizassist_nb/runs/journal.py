"""The writing end of a run directory: its events, the place for what cannot be written, and its worker's lock."""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import cache

EVENTS: Final = "events.jsonl"
"""Name of the file with a run's events."""


class Journal:
    """The writing end of events.jsonl: one line an event, opened anew for each, as the folder may have come anew, too.

    Raises:
        OSError: where it cannot be written.
    """

    def __init__(self, directory: Path):
        """Of the run in that directory."""
        self._path = directory / EVENTS

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; floats that JSON has no number for are refused with ValueError."""
        self.append(line_of(event, fields))

    def append(self, lines: bytes) -> None:
        """Append whole lines; a last line that a killed writer or a full disk left half-written is closed first."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                lines = b"\n" + lines
            while lines:
                lines = lines[os.write(descriptor, lines) :]
        finally:
            os.close(descriptor)


def line_of(event: str, fields: Mapping[str, Any]) -> bytes:
    """An event as the line that it is kept in."""
    line = json.dumps({"time": time.time(), "event": event, **fields}, ensure_ascii=False, allow_nan=False)
    return line.encode("utf-8", "replace") + b"\n"


def spool_folder(run_path: Path) -> Path:
    """Where this machine keeps what a worker cannot write into that directory (see `bizassist_nb.training.spool`)."""
    return cache() / "kept" / hashlib.sha256(str(run_path.absolute()).encode()).hexdigest()[:16]


def take_lock(path: Path, patience: float = 0.2) -> int:
    """Lock the run for one worker and give the lock's file descriptor, to be inherited by it.

    The lock (flock) belongs to the open file, so it lasts as long as any process holds this descriptor, and no longer.
    `patience` is how many seconds to wait: readers hold it for a moment, a worker that has ended until it is gone.

    Raises:
        RunError: if a worker holds it.
    """
    descriptor = os.open(path / "worker.lock", os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + patience
    while not _try_lock(descriptor, fcntl.LOCK_EX):
        if time.monotonic() > end:
            os.close(descriptor)
            break
        time.sleep(0.01)  # flock waits for ever or not at all
    else:
        return descriptor
    raise RunError(f"the run {path.name!r} is being trained by another process; wait for it or stop it")


def is_locked(path: Path) -> bool:
    """Whether a worker lives that holds the run's lock."""
    try:
        descriptor = os.open(path / "worker.lock", os.O_RDONLY)
    except OSError:  # not there, or out of reach
        return False
    try:
        return not _try_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_worker(lock: int, pid: int) -> None:
    """Write into the lock who holds it."""
    os.truncate(lock, 0)
    os.pwrite(lock, str(pid).encode(), 0)
