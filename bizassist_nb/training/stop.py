"""Whether a worker was asked to stop, and where it may."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no library's handler takes it for an error of its own."""


class Stop:
    """Whether a stop was asked for. Where it is not deferred, it raises Stopped at once."""

    def __init__(self) -> None:
        """Take SIGTERM for a request; all are deferred until `listen`. An interrupt is the launcher's to pass on."""
        self.asked = False
        self._deferrals = 1
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the launcher blocked it until now

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.check()

    def listen(self) -> None:
        """Raise Stopped from now on; one may have been asked for while this process was being started."""
        self._deferrals -= 1
        self.check()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Cut nothing short in this block: a step, a save."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1

    def check(self) -> None:
        """Raise Stopped if a stop was asked for and is not deferred."""
        if self.asked and not self._deferrals:
            raise Stopped

    def raise_if_asked(self) -> None:
        """Raise Stopped if a stop was asked for, deferred or not: where what has been done is safe already."""
        if self.asked:
            raise Stopped


class FollowerStop(Stop):
    """Stop for ranks other than 0: it is never asked, because rank 0 broadcasts what it was asked.

    SIGTERM ends such a rank at once, even while it waits for rank 0: so its launcher ends it when another has died.
    """

    def __init__(self) -> None:
        """Leave SIGTERM to the system."""
        self.asked, self._deferrals = False, 1
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
