"""What the panel's tabs share: the settings as they stand, the runs there are, and the one that is followed."""

import time
from typing import Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.runs.run import ENDED, RunDirectory, list_runs
from bizassist_nb.training.forecast import ForecastThread

_RUNS_EVERY: Final = 1.0
"""Seconds between looks at which runs there are."""


class State:
    """Read and written by the update loop only, but for `ForecastThread`, which has a thread of its own."""

    def __init__(self, runs_dir: str):
        """Look for runs; follow the one in training, if there is one."""
        self.settings: Settings | None = Settings(runs_dir=runs_dir)
        """As chosen; None while they are not valid."""
        self.unsettled = False
        """Whether the settings were changed a moment ago."""
        self.watch = ForecastThread()
        self.runs: dict[str, RunDirectory] = {}
        """By name, oldest first; those that can be read."""
        self.damaged: list[RunDirectory] = []
        """Those that cannot."""
        self.problem = ""
        """Why there are none, if the folder cannot be read."""
        self.followed: RunDirectory | None = None
        self.live: RunDirectory | None = None
        """The run whose worker is at work, if any is."""
        self.working = False
        """Whether a tab's next turn has more to do at once."""
        self.exporting = False
        self._runs_dir = runs_dir
        self.looked = 0.0
        """When the runs were last listed."""
        self.look()
        self.followed = self.live or next(reversed(self.runs.values()), None)

    def look(self) -> None:
        """See which run is at work and, if it has been a while, which there are."""
        self._list()
        self.live = next((run for run in reversed(self.runs.values()) if run.alive), None)

    def _list(self) -> None:
        runs_dir = self.settings.runs_dir if self.settings else self._runs_dir
        if runs_dir == self._runs_dir and time.monotonic() - self.looked < _RUNS_EVERY:
            return
        before = [*self.runs.values(), *self.damaged] if runs_dir == self._runs_dir else []
        known = {run.path: run for run in before}
        away = {run.name: run for run in known.values() if run.status == "out of reach" and run.alive}
        try:
            found, self.problem = [known.get(run.path, run) for run in list_runs(runs_dir)], ""
        except RunError as error:  # also a mount that has failed; those whose workers live are told of it
            found, self.problem = [], str(error)
        self.damaged = [run for run in found if run.damage]
        self.runs = {run.name: run for run in found if run not in self.damaged} | away
        self._runs_dir, self.looked = runs_dir, time.monotonic()
        if self.followed and self.followed.name not in self.runs:
            self.followed = None

    def follow(self, run: RunDirectory) -> None:
        """Show this run from now on."""
        self.runs[run.name] = self.runs.pop(run.name, run)
        self.followed = self.live = self.runs[run.name]

    @property
    def following(self) -> bool:
        """Whether something goes on that the views have to keep up with."""
        return self.live is not None or self.watch.busy or self.unsettled or self.exporting

    @property
    def tuned(self) -> list[str]:
        """Names of the runs that have an adapter, newest first."""
        return [name for name, run in reversed(self.runs.items()) if run.adapter]


def over(run: RunDirectory) -> bool:
    """Whether it has ended and its worker is gone: only then can it be resumed."""
    return run.status in ENDED and not run.alive
