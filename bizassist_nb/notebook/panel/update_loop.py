"""The one writer of widgets: callbacks post what is to be done, and the pump does it and brings the views up to date.

Two writers on one widget lose updates silently, and which thread a callback runs on depends on ipykernel's version. So
a callback only posts; the pump runs on the kernel's main thread, between cells, as a task of its event loop.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from IPython import get_ipython

from bizassist_nb.core.errors import BizassistError, without_secrets

_IDLE: Final = 0.2
"""Seconds between turns."""
_BUSY: Final = 0.02
"""Seconds between turns while one does work of its own: as long as the kernel takes to look at its messages."""


class UpdateLoop:
    """Does what was posted, then lets every view bring itself up to date, again and again."""

    def __init__(self, update: Callable[[], None], *, working: Callable[[], bool], following: Callable[[], bool]):
        """`update` writes the views, and may raise; `working` is whether its next call has more to do at once.

        `following` is whether something goes on that the views have to keep up with.
        """
        self._update, self._working, self._following = update, working, following
        self._posted: deque[Callable[[], None]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._driving = False
        self.problem = ""
        """What went wrong with what was posted last, for a person to read."""

    def post(self, act: Callable[[], None]) -> None:
        """Have this done on the main thread, soon; any thread may call it."""
        self._posted.append(act)
        if in_colab() and not self._driving:
            self._drive()

    def start(self) -> None:
        """Begin; to be called in a cell, whose event loop is the kernel's. If it has begun, it goes on."""
        self.turn()
        if in_colab():
            self._drive()
        elif self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def turn(self) -> None:
        """Do what was posted, and bring the views up to date."""
        while self._posted:
            self.problem = ""
            self._guarded(self._posted.popleft())
        self._guarded(self._update)

    async def _run(self) -> None:
        while True:
            self.turn()
            await asyncio.sleep(_BUSY if self._working() else _IDLE)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BizassistError as error:
            self.problem = str(error)
        except Exception as error:  # noqa: BLE001 - without its pump the panel would look alive and do nothing
            self.problem = without_secrets(f"{type(error).__name__}: {error}")

    def _drive(self) -> None:
        """Run in the callback itself for as long as there is something to follow.

        Colab shows what a running cell or callback writes, but not always what is written between them
        (googlecolab/colabtools#3373). Clicks are served meanwhile; cells wait.
        """
        from jupyter_ui_poll import ui_events

        self._driving = True
        try:
            with ui_events() as serve:
                going = True
                while going:
                    going = self._working() or self._following()
                    self.turn()  # after the look: what ended in between is shown, too
                    serve(10)
                    time.sleep(_BUSY)
                    # The turn may have begun something, and what was served waits for another.
                    going = going or self._following() or bool(self._posted)
        except KeyboardInterrupt:
            pass  # the view stops here; the run goes on
        finally:
            self._driving = False
            # jupyter_ui_poll holds cells back until the cell that it runs in has ended; here it runs in none.
            get_ipython().events.trigger("post_run_cell", None)


def in_colab() -> bool:
    """Whether the front end is Google Colab's."""
    return "google.colab" in sys.modules


def clicked(button: Any, update_loop: UpdateLoop, act: Callable[[], None]) -> None:
    """Have the pump do `act` when the button is clicked."""
    button.on_click(lambda _: update_loop.post(act))
