"""The writing end of a run directory: its events, the place for what cannot be written, and its worker's lock."""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.files import try_lock, write_json
from bizassist_nb.core.settings import cache
from bizassist_nb.runs.records import Event, Heartbeat, Record, Took, decode

EVENTS: Final = "events.jsonl"
"""Name of the file with a run's events."""
HEARTBEAT: Final = "heartbeat.json"
"""Name of the file with its worker's last sign of life."""
_FRESH: Final = 300.0
"""Seconds after its last sign of life for which a worker on another machine is taken to live: a Drive syncs late."""


class Journal:
    """The writing end of events.jsonl: one line an event.

    Raises:
        OSError: where it cannot be written.
    """

    def __init__(self, directory: Path):
        """Of the run in that directory."""
        self._path = directory / EVENTS

    def write(self, event: Event) -> None:
        """Append one event; floats that JSON has no number for are refused with ValueError."""
        self.append(event_line(event))

    @contextlib.contextmanager
    def took(self, what: str) -> Iterator[None]:
        """Write how long something took, once it is done."""
        began = time.monotonic()
        yield
        self.write(Took(what=what, seconds=time.monotonic() - began))

    def append(self, lines: bytes) -> None:
        """Append whole lines."""
        append_lines(self._path, lines)


def append_lines(path: Path, lines: bytes, *, sync: bool = False) -> None:
    """Append whole lines to a file; `sync` waits until they are on the disk.

    The file is opened each time, because its folder may have been mounted again. A last line that a killed writer or a
    full disk left half-written is closed first.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            lines = b"\n" + lines
        while lines:
            lines = lines[os.write(descriptor, lines) :]
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def event_line(event: Event) -> bytes:
    """The line of an event that happens now."""
    return json_line(msgspec.structs.replace(event, time=time.time()))


def json_line(record: Record) -> bytes:
    """A record as a line of JSON; ValueError for a float that JSON has no number for."""
    text = json.dumps(msgspec.to_builtins(record), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "replace") + b"\n"


def spool_folder(run_path: Path) -> Path:
    """Where this machine spools what a worker cannot write into that directory (see `bizassist_nb.training.spool`)."""
    return cache() / "kept" / hashlib.sha256(str(run_path.absolute()).encode()).hexdigest()[:16]


def take_lock(path: Path, patience: float = 0.2) -> int:
    """Lock the run for one worker and give the lock's file descriptor, to be inherited by it.

    The lock (flock) belongs to the open file, so it lasts as long as any process holds this descriptor, and no longer.
    `patience` is how many seconds to wait: readers hold it for a moment, a worker that has ended until it is gone.

    Raises:
        RunError: if a worker holds it, here or on another machine, or the file system has no locks.
    """
    if other := elsewhere(path):
        raise RunError(
            f"the run {path.name!r} is being trained on another machine ({other.host}, since {_clock(other.since)}); "
            f"stop it there. If that machine is gone, try again after {_clock(other.time + _FRESH)}"
        )
    descriptor = os.open(path / "worker.lock", os.O_RDWR | os.O_CREAT, 0o666)
    end = time.monotonic() + patience
    try:
        while not try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise RunError(f"the run {path.name!r} is being trained by another process; wait for it or stop it")
            time.sleep(0.01)  # flock waits for ever or not at all
    except BaseException:  # an interrupt, too, leaves no file open; the error goes on
        os.close(descriptor)
        raise
    return descriptor


def is_locked(path: Path) -> bool:
    """Whether a worker of this machine lives that holds the run's lock."""
    try:
        with (path / "worker.lock").open("rb") as file:
            return not try_lock(file.fileno(), fcntl.LOCK_SH)
    except (OSError, RunError):  # not there, out of reach, or on a file system without locks, where nobody holds one
        return False


def beat(path: Path, since: float) -> None:
    """Write a heartbeat: a worker on this machine, which started at `since`, lives."""
    host, boot = machine()
    write_json(path / HEARTBEAT, Heartbeat(host=host, boot=boot, since=since, time=time.time()))


def elsewhere(path: Path) -> Heartbeat | None:
    """The last sign of life of a worker on another machine; None without one, or if it is too old."""
    try:
        last = decode((path / HEARTBEAT).read_bytes(), Heartbeat)
    except (OSError, ValueError):  # no worker has written one, or it is out of reach
        return None
    return last if (last.host, last.boot) != machine() and abs(time.time() - last.time) < _FRESH else None


def machine() -> tuple[str, str]:
    """(name of this machine, what tells its starts apart)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:  # macOS
        import psutil

        boot = f"{psutil.boot_time():.0f}"
    return socket.gethostname(), boot


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def write_worker(lock: int, pid: int) -> None:
    """Write the worker's process id into the lock's file."""
    os.truncate(lock, 0)
    os.pwrite(lock, str(pid).encode(), 0)
