"""A journal that spools events and checkpoints on this machine while the run directory cannot be written.

A Drive that has dropped, a full disk or a folder that may no longer be written does not end training. `RunDirectory`
reads the spool too. What is in it is delivered when the directory is back, even if the worker was killed before that.
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.runs.journal import EVENTS, Journal, is_locked, line_of, spool_folder, take_lock, write_worker
from bizassist_nb.training.checkpoints import Checkpoint, checkpoints, newest_checkpoint, save_checkpoint

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk, or a person's share of it, says that has no room."""
_EVERY: Final = 1.0
"""Seconds between attempts."""
_PATIENCE: Final = 3600.0
"""Seconds for which a worker that has nothing else to do waits for its directory."""


class SpoolingJournal(Journal):
    """A journal that keeps what cannot be written yet; checkpoints likewise."""

    def __init__(self, run_path: Path, between: Callable[[], None] = lambda: None):
        """Deliver what an earlier worker of the run left, if there is any.

        `between` is called while waiting for the directory; what it raises ends that.
        """
        super().__init__(run_path)
        self._run_path, self._kept, self._between = run_path, spool_folder(run_path), between
        self._waiting: list[bytes] = []
        with contextlib.suppress(OSError):
            self._waiting = (self._kept / EVENTS).read_bytes().splitlines(keepends=True)
        self._spooled = len(self._waiting)  # so many of them are in the file here, too
        self._tried = float("-inf")
        self.deliver()

    def append(self, lines: bytes) -> None:
        """Append whole lines, or keep them, behind those that are kept already."""
        if not self._waiting:
            try:
                super().append(lines)
                return
            except OSError as error:
                self._keep(line_of("away", {"reason": brief(error)}))
        self._keep(lines)
        self.deliver()

    def _keep(self, lines: bytes) -> None:
        self._waiting.append(lines)
        with contextlib.suppress(OSError):  # then they are kept in memory alone, until there is room here
            self._kept.mkdir(parents=True, exist_ok=True)
            while self._spooled < len(self._waiting):
                Journal(self._kept).append(self._waiting[self._spooled])
                self._spooled += 1

    def checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Save one of this step: in the run's directory, else here; else training goes on without, and says so."""
        problems = []
        for place in (self._run_path, self._kept):
            try:
                if place is self._kept:
                    place.mkdir(parents=True, exist_ok=True)
                save_checkpoint(place, step, write)
            except OSError as error:
                problems.append(f"in {place}: {brief(error)}")
                continue
            self.write("checkpoint", step=step, kept=str(place) if place is self._kept else None)
            return
        self.unsaved(f"the checkpoint of step {step}", "; ".join(problems))

    def newest_checkpoint(self) -> Checkpoint | None:
        """The newest whole one, wherever it is; each newer one that is damaged is named in an event."""

        def damaged(checkpoint: Checkpoint, reason: str) -> None:
            self.write("damaged", checkpoint=str(checkpoint.path), reason=reason)

        found = [newest_checkpoint(place, damaged) for place in (self._run_path, self._kept)]
        return max((one for one in found if one), key=lambda one: one.step, default=None)

    def unsaved(self, what: str, reason: str) -> None:
        """Say what could not be saved, and why, where training goes on without it."""
        print(f"{what} was not saved: {reason}", file=sys.stderr)
        self.write("unsaved", what=what, reason=reason)

    def deliver(self, *, now: bool = False) -> bool:
        """Write what is kept into the run's directory if it can be, `now` or if the last attempt was a while ago.

        Whether nothing is left.
        """
        if not self._waiting and not self._kept.is_dir():
            return True
        if not now and time.monotonic() - self._tried < _EVERY:
            return False
        self._tried = time.monotonic()
        try:
            self._take_lock_anew()
            self._deliver_events()
            self._deliver_checkpoint()
        except (OSError, RunError):
            return False
        shutil.rmtree(self._kept, ignore_errors=True)
        return True

    def _take_lock_anew(self) -> None:
        """A folder that was mounted anew has another lock file, which says that there is no worker."""
        if not is_locked(self._run_path):
            write_worker(take_lock(self._run_path), os.getpid())

    def _deliver_events(self) -> None:
        if not self._waiting:
            return
        path = self._run_path / EVENTS
        known = set(path.read_bytes().splitlines(keepends=True)) if path.exists() else set()
        super().append(b"".join(line for line in self._waiting if line not in known))
        self._waiting.clear()
        self._spooled = 0
        (self._kept / EVENTS).unlink(missing_ok=True)
        super().append(line_of("back", {}))

    def _deliver_checkpoint(self) -> None:
        kept, there = newest_checkpoint(self._kept), checkpoints(self._run_path)
        if kept and not (there and there[0].step >= kept.step):
            save_checkpoint(
                self._run_path, kept.step, lambda part: shutil.copytree(kept.path, part, dirs_exist_ok=True)
            )

    def insist(self, what: str, write: Callable[[], object]) -> None:
        """Have `write` write into the run's directory, waiting for that for as long as it is away.

        Raises:
            RunError: if the directory is there and it cannot be written even so, or after an hour.
        """
        while True:
            try:
                write()
                return
            except OSError as error:
                if self._in_reach():
                    raise RunError(
                        f"{what} could not be written to {self._run_path} ({brief(error)}). Make room there, or see to "
                        "it that it can be written, and go on with --resume: what was trained is in the last checkpoint"
                    ) from error
            self._wait(self._in_reach)

    def settle(self) -> None:
        """Wait until all that is kept is delivered.

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
                    f"{self._run_path} could not be written for an hour; what was meant for it is in {self._kept} and "
                    "will be put there when the run is resumed on this machine"
                )
            time.sleep(_EVERY)

    def _in_reach(self) -> bool:
        """Whether the directory can be written but for want of room."""
        probe = self._run_path / ".probe"
        try:
            probe.write_bytes(b"?")
            probe.unlink()
        except OSError as error:
            return error.errno in _FULL
        return True


class Silent(SpoolingJournal):
    """The journal of all ranks but the first, which alone writes."""

    def __init__(self) -> None:
        """Of nothing."""

    def write(self, event: str, **fields: Any) -> None:
        """Write nothing."""

    def checkpoint(self, step: int, write: Callable[[Path], object]) -> None:
        """Save nothing."""

    def newest_checkpoint(self) -> Checkpoint | None:
        """None: it is the first that knows."""
        return None

    def insist(self, what: str, write: Callable[[], object]) -> None:
        """Write nothing."""
