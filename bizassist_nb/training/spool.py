"""A journal that spools events and checkpoints on this machine while the run directory cannot be written.

A Drive that has dropped, a full disk or a folder that may no longer be written does not end training. `RunDirectory`
reads the spool too. What is in it is delivered when the directory is back, even if the worker was killed before that.
"""

import contextlib
import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.runs import journal, records
from bizassist_nb.training.checkpoints import Checkpoint, newest_checkpoint, save_checkpoint

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, or of a person's share of it, that is full."""
_EVERY: Final = 1.0
"""Seconds between attempts."""
_TRIES: Final = 60
"""Attempts at a write that fails though the directory can be written: a Drive's errors pass."""
_BEAT: Final = 30.0
"""Seconds between signs of life."""
_PATIENCE: Final = 3600.0
"""Seconds for which a worker that has nothing else to do waits for its directory."""


class SpoolingJournal(journal.Journal):
    """A journal that spools the events and checkpoints that cannot be written yet."""

    def __init__(self, run_path: Path, between: Callable[[], None] = lambda: None):
        """Deliver what an earlier worker of the run spooled, if it did.

        `between` is called while waiting for the directory; what it raises ends that.
        """
        super().__init__(run_path)
        self._run_path, self._spool, self._between = run_path, journal.spool_folder(run_path), between
        self._waiting: list[bytes] = []  # lines that are not in the directory, in order
        with contextlib.suppress(OSError):
            self._waiting = (self._spool / journal.EVENTS).read_bytes().splitlines(keepends=True)
        self._spooled = len(self._waiting)  # so many of them are in the spool; the others in memory alone
        self._tried = float("-inf")
        self.deliver()

    def append(self, lines: bytes) -> None:
        """Append whole lines, or spool them behind those that wait already."""
        if not self._waiting:
            try:
                super().append(lines)
                return
            except OSError as error:
                self._waiting.append(journal.event_line(records.Away(reason=brief(error))))
        self._waiting.append(lines)
        with contextlib.suppress(OSError):  # then the spool is full, too, and the next event tries again
            self._spool.mkdir(parents=True, exist_ok=True)
            while self._spooled < len(self._waiting):
                journal.Journal(self._spool).append(self._waiting[self._spooled])
                self._spooled += 1
        self.deliver()

    def checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Save a checkpoint in the run's directory, or spool it; without room for either, an event says so."""
        problems = []
        for place, spool in ((self._run_path, None), (self._spool, str(self._spool))):
            try:
                if spool:
                    place.mkdir(parents=True, exist_ok=True)
                save_checkpoint(place, step, write)
            except OSError as error:
                problems.append(f"in {place}: {brief(error)}")
            else:
                self.write(records.Checkpoint(step=step, spool=spool))
                return
        self.unsaved(f"the checkpoint of step {step}", "; ".join(problems))

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole one of directory and spool; an event names each newer one that is damaged."""

        def damaged(checkpoint: Checkpoint, reason: str) -> None:
            self.write(records.Damaged(checkpoint=str(checkpoint.path), reason=reason))

        found = [newest_checkpoint(place, damaged) for place in (self._run_path, self._spool)]
        return max((one for one in found if one), key=lambda one: one.step, default=None)

    def unsaved(self, what: str, reason: str) -> None:
        """Write an event that says what could not be saved, and why, where training goes on without it."""
        print(f"{what} was not saved: {reason}", file=sys.stderr)
        self.write(records.Unsaved(what=what, reason=reason))

    def fail(self, why: records.Error) -> None:
        """Write that the run failed, and why."""
        self.write(why)
        self.write(records.State(state="failed"))
        self.deliver(now=True)

    def deliver(self, *, now: bool = False) -> bool:
        """Move the spool into the run's directory if that can be written; whether nothing is left to deliver.

        It tries `now`, or if the last attempt was a while ago.
        """
        if not self._waiting and not self._spool.is_dir():
            return True
        if not now and time.monotonic() - self._tried < _EVERY:
            return False
        self._tried = time.monotonic()
        try:
            if not journal.is_locked(self._run_path):  # a folder that was mounted anew has another lock file
                journal.write_worker(journal.take_lock(self._run_path), os.getpid())
            if self._waiting:
                path = self._run_path / journal.EVENTS
                # A worker that was killed, or ran out of room, may have delivered some of them.
                known = set(path.read_bytes().splitlines(keepends=True)) if path.exists() else set()
                super().append(b"".join(line for line in self._waiting if line not in known))
                self._waiting.clear()
                self._spooled = 0
                (self._spool / journal.EVENTS).unlink(missing_ok=True)
                super().append(journal.event_line(records.Back()))
            spooled, there = newest_checkpoint(self._spool), newest_checkpoint(self._run_path)
            if spooled and not (there and there.step >= spooled.step):
                source = spooled.path
                save_checkpoint(
                    self._run_path, spooled.step, lambda part: shutil.copytree(source, part, dirs_exist_ok=True)
                )
        except (OSError, RunError):
            return False
        shutil.rmtree(self._spool, ignore_errors=True)
        return True

    def insist(self, what: str, write: Callable[[], object]) -> None:
        """Have `write` write into the run's directory, again if that fails, and waiting for as long as it is away.

        Raises:
            RunError: at once if its disk is full, after a minute of attempts if something else is wrong with it, or
                after an hour of waiting.
        """
        failures = 0

        def written() -> bool:
            nonlocal failures
            try:
                write()
            except OSError as error:
                reach = self._in_reach()
                failures += reach
                if reach and (error.errno in _FULL or failures > _TRIES):
                    raise RunError(
                        f"{what} could not be written to {self._run_path} ({brief(error)}). Make room there, or see to "
                        "it that it can be written, and go on with --resume: what was trained is in the last checkpoint"
                    ) from error
                return False
            return True

        self._wait(written)

    def settle(self) -> None:
        """Wait until the whole spool is delivered.

        Raises:
            RunError: after an hour.
        """
        self._wait(lambda: self.deliver(now=True))

    def _wait(self, over: Callable[[], bool]) -> None:
        end = time.monotonic() + _PATIENCE
        while not over():
            self._between()
            if time.monotonic() > end:
                raise RunError(
                    f"{self._run_path} could not be written for an hour; what was meant for it is in {self._spool} and "
                    "will be put there when the run is resumed on this machine"
                )
            time.sleep(_EVERY)  # nothing tells when the file system has recovered

    def _in_reach(self) -> bool:
        """Whether the directory can be written, or could be if its disk were not full."""
        probe = self._run_path / ".probe"
        try:
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            return error.errno in _FULL
        return True


@contextlib.contextmanager
def heartbeats(run_path: Path) -> Iterator[None]:
    """Have another machine that has the same directory know that this process trains the run, while this block runs."""
    over, since = threading.Event(), time.time()

    def work() -> None:
        while True:
            with contextlib.suppress(OSError):  # away; it is written when it is back
                journal.beat(run_path, since)
            if over.wait(_BEAT):
                return

    thread = threading.Thread(target=work, name="bizassist-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(OSError):
            (run_path / journal.HEARTBEAT).unlink(missing_ok=True)


class Silent(SpoolingJournal):
    """The journal of ranks other than 0: it writes nothing, because rank 0 writes for all."""

    def __init__(self) -> None:
        """Of no directory."""

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    write = checkpoint = newest_checkpoint = insist = _nothing
