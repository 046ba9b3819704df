"""Whether a worker was asked to stop, and where it may."""

import signal
from types import FrameType


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no library's handler takes it for an error of its own."""


class Stop:
    """Whether a stop was asked for; outside training it raises Stopped at once."""

    def __init__(self) -> None:
        """Listen for SIGTERM; an interrupt from a terminal is the launcher's to pass on."""
        self.asked = False
        self.patient = True  # True while nothing must be cut short: a step, a save, or at first getting this far
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the launcher blocked it until now

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.check()

    def check(self) -> None:
        """Raise Stopped if a stop was asked for and nothing would be lost."""
        if self.asked and not self.patient:
            raise Stopped

    def hurry(self) -> None:
        """Raise Stopped if a stop was asked for, where what has been done is safe already."""
        if self.asked:
            raise Stopped


class FollowerStop(Stop):
    """That of a rank which is not the first: a stop is for that one, which tells the others.

    SIGTERM ends it at once, even while it waits for the first: so its launcher ends it when another has died.
    """

    def __init__(self) -> None:
        """Never asked."""
        self.asked, self.patient = False, True
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
