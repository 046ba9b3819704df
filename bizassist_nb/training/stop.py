"""Whether a worker was asked to stop, and where it may."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no library's handler takes it for an error of its own."""


class Stop:
    """Whether a stop was asked for. Where it is not deferred, it raises Stopped at once.

    Ranks other than 0 do not listen: rank 0 broadcasts what it was asked. SIGTERM ends such a rank at once, even while
    it waits for rank 0: so its launcher ends it when another has died.
    """

    def __init__(self, *, listens: bool = True) -> None:
        """Take SIGTERM for a request, deferred until `listen`; ignore interrupts, which `launch` passes on."""
        self.asked = False
        self._deferrals = 1
        if listens:
            signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the launcher blocked it until now

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.check()

    def listen(self) -> None:
        """Raise Stopped from now on, and now if a stop was asked for while this process was starting."""
        self._deferrals -= 1
        self.check()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let this block end before a stop: a step, a save."""
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
        """Raise Stopped if a stop was asked for, deferred or not: for places where everything is saved."""
        if self.asked:
            raise Stopped
