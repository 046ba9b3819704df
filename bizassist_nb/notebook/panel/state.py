"""What the panel's tabs share: the settings, the list of runs, and the run that is shown."""

import contextlib
import dataclasses
import hashlib
import os
import time
from typing import Final

from bizassist_nb.core.errors import QuestionError, RunError, SettingsError
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.settings import DEMO, Settings, cache, user_path
from bizassist_nb.runs.journal import machine
from bizassist_nb.runs.run import RunDirectory, list_runs
from bizassist_nb.training import preflight
from bizassist_nb.training.forecast import ForecastThread

_RUNS_EVERY: Final = 5.0
"""Seconds between looks at which runs there are; all are read only if one is not over, or has changed its files."""
_UNCHANGED_EVERY: Final = 60.0
"""Seconds between looks at runs that are over and seem unchanged: a vote changes no folder."""


class State:
    """Read and written by the update loop only, except `ForecastThread`, which has its own thread."""

    def __init__(self, runs_dir: str):
        # Not in the folder of runs, which may be a mount that is gone for now.
        folder = hashlib.sha256(str(user_path(runs_dir).absolute()).encode("utf-8", "replace")).hexdigest()[:32]
        self._form = cache() / "forms" / f"{folder}.toml"
        self.exports = cache() / "exports" / "-".join((folder, *machine()))  # the cache may be shared with others
        """Where an export keeps its state, which outlives this kernel."""
        try:
            self._in_form = Settings.from_toml(self._form.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, SettingsError):  # there is none yet, or one of another version
            first = Settings.from_toml(DEMO if preflight.device().name == "cpu" else "")
            self._in_form = dataclasses.replace(first, runs_dir=runs_dir)
        self.settings: Settings | None = self._in_form
        """The settings in the form; None while they are not valid."""
        self.unsettled = False
        """Whether the settings have just been changed."""
        self.watch = ForecastThread()
        self.runs: dict[str, RunDirectory] = {}
        """The runs that can be read, by name, oldest first."""
        self.tuned: list[str] = []
        """Names of the runs that have an adapter, newest first."""
        self._open: list[RunDirectory] = []
        self.damaged: list[RunDirectory] = []
        """The runs that cannot be read."""
        self.problem = ""
        """Why the folder of runs cannot be read."""
        self.followed: RunDirectory | None = None
        """The run that the Train tab shows."""
        self.live: RunDirectory | None = None
        """The run whose worker is alive on this machine, if any."""
        self.working = False
        """Whether a tab has more to do at once."""
        self.exporting = False
        self.runs_dir = self._in_form.runs_dir
        self.looked = 0.0
        """When the runs were last listed."""
        self._checked, self._folders = 0.0, dict[str, int]()
        self.look()
        self.followed = self.live or next(reversed(self.runs.values()), None)

    def save_form(self) -> None:
        """Save valid settings that have changed in the form: the panel of the next kernel opens with them."""
        if self.settings is None or self.settings == self._in_form:
            return
        self._in_form = settings = self.settings
        with contextlib.suppress(OSError):  # without it the panel opens with the defaults
            self._form.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._form, lambda part: part.write_text(settings.to_toml(), "utf-8"))

    def look(self) -> None:
        """See which run is alive, and list the runs when that, their folders or the folder of runs change."""
        before, runs_dir = self.live, self.settings.runs_dir if self.settings else self.runs_dir
        now = time.monotonic()
        stale = now - self.looked >= (_RUNS_EVERY if self._open else _UNCHANGED_EVERY)
        if not stale and now - self._checked >= _RUNS_EVERY:
            folders, self._checked, self._folders = self._folders, now, _changed(runs_dir)
            stale = folders != self._folders
        if stale or runs_dir != self.runs_dir:
            self._list(runs_dir)
        # Only those are looked at that were not over when they were listed, or are shown.
        self.live = next((run for run in self._open if run.alive and not run.elsewhere), None)
        if self.live is None and self.followed and self.followed.alive:
            self.live = self.followed
        if self.live is not before:
            self._list(runs_dir)

    def refresh(self) -> None:
        """Have the runs listed and the rows read anew."""
        self.looked = 0.0
        self.watch.want(None)
        if self.settings:  # another object: what was found for that one does not stand for this
            self.settings = dataclasses.replace(self.settings)

    def _list(self, runs_dir: str) -> None:
        before = [*self.runs.values(), *self.damaged] if runs_dir == self.runs_dir else []
        known = {run.path: run for run in before}
        away = {run.name: run for run in known.values() if run.status == "out of reach" and run.alive}
        try:
            found, self.problem = [known.get(run.path, run) for run in list_runs(runs_dir)], ""
        except RunError as error:  # also where a mount has failed; runs with a live worker stay in the list
            found, self.problem = [], str(error)
        self.damaged = [run for run in found if run.damage]
        self.runs = {run.name: run for run in found if run not in self.damaged} | away
        self.tuned = [name for name, run in reversed(self.runs.items()) if run.adapter]
        self._open = [run for run in reversed(self.runs.values()) if not run.over]
        self.runs_dir, self.looked = runs_dir, time.monotonic()
        if self.followed and self.followed.name not in self.runs:
            self.followed = None

    def follow(self, run: RunDirectory) -> None:
        """Show this run from now on."""
        self.runs[run.name] = self.followed = self.live = run
        self._open.insert(0, run)

    @property
    def base(self) -> Settings:
        """Settings whose base answers where no tuned model is chosen: of the run that is shown, else of the form.

        Raises:
            QuestionError: if no run is shown and the form is not valid.
        """
        if self.followed:
            return self.followed.resolved
        if self.settings is None:
            raise QuestionError("which base answers? the settings on the Train tab are not valid yet: put them right")
        return self.settings

    @property
    def following(self) -> bool:
        """Whether anything goes on that the views show."""
        return self.live is not None or self.watch.busy or self.unsettled or self.exporting


def _changed(runs_dir: str) -> dict[str, int]:
    """When each folder of a run last had a file come, go or be replaced."""
    try:
        return {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(user_path(runs_dir))}
    except (OSError, ValueError):  # listing the runs says why
        return {}
