"""The only writer of widgets: callbacks post functions; the update loop runs them and brings the views up to date.

Two writers on one widget lose updates silently, and which thread a callback runs on depends on ipykernel's version. So
a callback only posts; the loop runs on the kernel's main thread, between cells, as a task of its event loop.
"""

import asyncio
import contextlib
import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import ipywidgets as w
from IPython import get_ipython

from bizassist_nb.core.errors import BizassistError, without_secrets
from bizassist_nb.notebook.panel.state import State

_IDLE: Final = 2.0
"""Seconds between turns while nothing goes on; what a person does wakes the loop."""
_FOLLOWING: Final = 1.0
"""Seconds between turns while there is something to follow."""
_BUSY: Final = 0.02
"""Seconds between turns while a tab works: enough for the kernel to look at its messages."""


class UpdateLoop:
    """Runs what was posted, then brings every view up to date, again and again."""

    def __init__(self, state: State):
        self._state = state
        self.updates: Sequence[Callable[[], None]] = ()
        """What writes the views, one after the other; where one raises, the others go on."""
        self._posted: deque[Callable[[], None]] = deque()
        self.task: asyncio.Task[None] | None = None
        self._woken: Callable[[], object] = lambda: None
        self._driving = False
        self._woken_again = False  # while it drives
        self._refused = ""  # the error message of what was posted last
        self.problems: list[str] = []
        """Error messages, empty ones among them: of what was posted last, and of this turn's updates so far."""

    def button(self, name: str, act: Callable[[], None], **looks: Any) -> Any:
        """A button; a click on it posts `act`."""
        button = w.Button(description=name, **looks)
        button.on_click(lambda _: self.post(act))
        return button

    def post(self, act: Callable[[], None]) -> None:
        """Have the main thread run `act` soon; any thread may call this."""
        self._posted.append(act)
        self.wake()

    def wake(self) -> None:
        """Have the next turn come soon; any thread may call this."""
        self._woken_again = True
        if in_colab() and not self._driving:
            self._drive()
        self._woken()

    def start(self) -> None:
        """Start the loop, if it does not run yet; call this in a cell, whose event loop is the kernel's."""
        self.turn()
        if in_colab():
            self._drive()
        elif self.task is None or self.task.done():
            self.task = asyncio.get_running_loop().create_task(self._run())

    def end(self) -> None:
        """End the loop."""
        self._woken = lambda: None
        if self.task:
            self.task.cancel()

    def turn(self) -> None:
        """Run what was posted, and bring the views up to date."""
        while self._posted:
            self._refused = problem_of(self._posted.popleft())
        self.problems = [self._refused]
        for update in self.updates:
            self.problems.append(problem_of(update))

    async def _run(self) -> None:
        woken = asyncio.Event()
        self._woken = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, woken.set)
        while True:
            self.turn()
            await asyncio.sleep(_BUSY)
            if not self._state.working:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(woken.wait(), _FOLLOWING if self._state.following else _IDLE)
            woken.clear()

    def _drive(self) -> None:
        """Loop within the callback itself while the views have something to follow.

        Colab shows what a running cell or callback writes, but not always what is written between them
        (googlecolab/colabtools#3373). Clicks are served meanwhile; cells wait.
        """
        from jupyter_ui_poll import ui_events

        self._driving = True
        try:
            with ui_events() as serve:
                going = True
                while going:
                    going = self._state.working or self._state.following
                    self._woken_again = False
                    self.turn()  # afterwards, so that what ended in between is shown, too
                    serve(10)
                    time.sleep(_BUSY)
                    # The turn may have begun something, and what was served waits for the next turn.
                    going = going or self._state.working or self._state.following or self._woken_again
        except KeyboardInterrupt:
            pass  # the view stops here; the run goes on
        finally:
            self._driving = False
            # jupyter_ui_poll delays other cells until the one that it runs in has ended; here it runs in none.
            get_ipython().events.trigger("post_run_cell", None)


def problem_of(act: Callable[[], object]) -> str:
    """Why this failed; empty if it did not."""
    try:
        act()
    except BizassistError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - without its loop the panel would look alive and do nothing
        return without_secrets(f"{type(error).__name__}: {error}")
    return ""


def in_colab() -> bool:
    """Whether the front end is Google Colab's."""
    return "google.colab" in sys.modules
