"""The Train tab: the settings, the forecast of a run with them, and a run from its start to its verdict."""

import dataclasses
import functools
import html
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import ipywidgets as w
import tomli_w

from bizassist_nb.assistant.loaded import unload
from bizassist_nb.core.errors import DataError, SettingsError
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.rendering import duration
from bizassist_nb.core.settings import PRESETS, Settings, user_path
from bizassist_nb.core.terms import explain
from bizassist_nb.notebook.panel.controls import Control, Entry, alert, control, fold, offer
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, problem_of
from bizassist_nb.notebook.views import RunView, copy_button, labelled, tiles
from bizassist_nb.results import summary
from bizassist_nb.runs.records import Preflight
from bizassist_nb.runs.run import RunDirectory, check_alone, check_name
from bizassist_nb.training.forecast import Forecast, past
from bizassist_nb.training.launch import WARNED, start

_FIRST: Final = ("model", "data", "subset", "rank")
"""The settings that are always visible; the rest are under "More settings"."""
_SETTLED: Final = 0.5
"""Seconds without a change of the settings before their rows are counted."""
_UPLOAD: Final = """<p class="bn-muted">It is copied into the folder <code>uploads</code> beside the folder of runs.
JupyterLab and Notebook pass on at most 10 MB, and say nothing of a larger file: put that beside the notebook with the
file browser, choose "other …" as data, and write its path.</p>"""


class SettingsForm:
    """A control for every setting, a name for the run, and both as a cell to copy."""

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        hint = "letters, digits, '.', '-' and '_'; the run's folder gets this name"
        self._name = labelled(w.Text, "name of the run", hint, placeholder="made from the data's name")
        self._name_entry = Entry(self._name)
        self.controls: dict[str, Control] = {f.name: control(f) for f in dataclasses.fields(Settings)}
        for name, shown in self.controls.items():
            shown.put(getattr(state.settings or Settings(), name))
        hint = "the same settings as a %%finetune cell"
        self._cell = labelled(w.Textarea, "as a cell", hint, rows=7).add_class("bn-code")
        hint = "a run whose settings are to be loaded into the form"
        self._from = labelled(w.Dropdown, "settings of run", hint)
        load = update_loop.button("Load", self._load, tooltip="load that run's settings into the form")
        first = [self._name_entry.view, *(self.controls[name].view for name in _FIRST)]
        more = [c.view for name, c in self.controls.items() if name not in _FIRST]
        source = w.Box([self._from, load]).add_class("bn-row")
        self._upload = labelled(w.FileUpload, "Upload", "copy a file of rows from your own computer")
        post = update_loop.post
        self._upload.observe(lambda change: change["new"] and post(self._on_upload), "value")
        copied = fold("Copy as cell", self._cell, w.HTML(copy_button(".bn-folded", "textarea")))
        folded = [fold("More settings", *more), copied, fold("From run", source)]
        folded.append(fold("Upload rows", self._upload, w.HTML(_UPLOAD)))
        self.view = w.VBox([w.HTML("<h3>Settings</h3>"), self._presets(update_loop), *first, *folded])
        self._written = ""
        """The cell as it was written last."""
        self._raw: Mapping[str, Any] = {}
        self._changed_at = 0.0
        self.name_problem = ""

    @property
    def name(self) -> str | None:
        """The name in the form, if there is one."""
        return self._name.value.strip() or None

    @property
    def valid(self) -> bool:
        """Whether a run could be started with these."""
        return self._state.settings is not None and not self.name_problem

    def update(self) -> None:
        """Read the controls, show what is wrong beside each, and have the rows counted once nothing changes."""
        raw = {name: shown.read() for name, shown in self.controls.items()}
        if raw != self._raw:
            self._raw, self._changed_at = raw, time.monotonic()
            problems: dict[str, str] = {}
            try:
                self._state.settings = Settings(**raw)
            except SettingsError as error:
                self._state.settings = None
                problems = {problem.partition(" ")[0]: problem for problem in error.problems}
            for name, shown in self.controls.items():
                shown.complain(problems.get(name, ""))
        self.name_problem = problem_of(lambda: check_name(self.name or "x"))
        self._name_entry.complain(self.name_problem)
        state = self._state
        state.unsettled = time.monotonic() - self._changed_at < _SETTLED
        state.watch.want(None if state.unsettled else state.settings)
        if not state.unsettled:
            state.save_form()
        offer(self._from, list(reversed(state.runs)))
        cell = f"%%finetune {self.name or ''}".rstrip() + "\n"
        settings = state.settings
        cell = cell + tomli_w.dumps(settings.changed()) if settings else "(the settings are not valid yet)"
        if cell != self._written:  # what a person has typed or selected in it stays
            self._written = self._cell.value = cell

    def _presets(self, update_loop: UpdateLoop) -> Any:
        """A row of buttons, each of which puts settings to begin with into the form."""
        buttons = [
            update_loop.button(name, functools.partial(self._put, Settings.from_toml(toml)), tooltip=hint)
            for name, (hint, toml) in PRESETS.items()
        ]
        return w.Box(buttons).add_class("bn-chips")

    def _load(self) -> None:
        if self._from.value:
            self._put(self._state.runs[self._from.value].settings)

    def _on_upload(self) -> None:
        """Write the file into the folder `uploads` beside that of the runs, and have `data` name it."""
        value = self._upload.value
        files = value if isinstance(value, tuple) else [{"name": name} | value[name] for name in value]  # ipywidgets 7
        self._upload.set_trait("value", type(value)())  # the kernel would keep its content
        for file in files:
            path = user_path(self._state.runs_dir).parent / "uploads" / Path(file["name"]).name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_atomic(path, functools.partial(Path.write_bytes, data=file["content"]))
            elif path.read_bytes() != file["content"]:  # a run may have been trained on it
                raise DataError(f"{path} is there already, with other rows; rename your file and upload it again")
            self.controls["data"].put(str(path))

    def _put(self, settings: Settings) -> None:
        for name in self.controls.keys() - {"runs_dir"}:  # it goes on showing the same folder
            self.controls[name].put(getattr(settings, name))


class Train:
    """The settings on the left; on the right, or below, their forecast, the buttons, and the run that is followed."""

    title = "Train"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        self.settings = SettingsForm(state, update_loop)
        self._before = w.HTML().add_class("bn-before")
        self._start = update_loop.button("Start", self._on_start, button_style="primary", icon="play")
        self._resume = update_loop.button("Resume", self._on_resume, icon="step-forward")
        self._stop = w.Button(icon="stop")
        self._stop.on_click(lambda _: self._on_stop())  # only a signal, so at once, whatever the kernel is busy with
        self._stoppable: RunDirectory | None = None
        """The run that the button names."""
        self._asked: RunDirectory | None = None
        """The run that was asked to stop here."""
        self._warned: float | None = None
        """Since when it says that it would end that run at once."""
        self._choice = labelled(w.Dropdown, "run", "the run that is shown here")
        buttons = w.Box([self._start, self._stop, self._resume, self._choice]).add_class("bn-buttons")
        self._run = RunView("No run yet. Choose the settings, then press Start.")
        run = w.VBox([w.HTML("<h3>Training</h3>"), self._before, buttons, *self._run.parts])
        self.view = w.Box([self.settings.view, run]).add_class("bn-split")
        self._known: tuple[object, ...] = ()
        self._chosen: str | None = None

    def update(self) -> None:
        """Bring both sides up to date."""
        self.settings.update()
        self._choose()
        watch, run, live = self._state.watch, self._state.followed, self._state.live
        known = (watch.found, watch.problem, self.settings.valid, self._state.looked)
        if known != self._known:  # the time is taken from earlier runs, all of which are looked at for it
            self._known, self._before.value = known, self._forecast()
        why_not = self._why_not_started()
        self._start.disabled, self._start.tooltip = bool(why_not), why_not or "train with these settings"
        self._offer_stop(run if run and run.alive else None)
        why_not = _why_not_resumed(run, live)
        self._resume.disabled, self._resume.tooltip = bool(why_not), why_not or "go on from the last checkpoint"
        self._resume.description = f"Resume {run.name}" if run and not why_not else "Resume"
        self._run.show(run)

    def _why_not_started(self) -> str | None:
        if live := self._state.live:
            return f"{live.name} is being trained; one run at a time"
        if not self.settings.valid:
            return "the settings are not valid yet"
        if problem := self._state.watch.problem:
            return f"{problem} (Refresh looks again)"
        return None

    def _offer_stop(self, run: RunDirectory | None) -> None:
        """Have the Stop button name the run that is shown, and what it would do to it."""
        stopping = run is not None and (run is self._asked or run.stopping)
        self._stop.disabled = run is None
        self._stop.description = f"Stop {run.name}{' at once' if stopping else ''}" if run else "Stop"
        self._stop.tooltip = "end it now, without saving" if stopping else "finish the step, save, and end"
        if run is not self._stoppable or not stopping:
            self._warned = None
        if stopping and self._warned is None:
            self._warned = time.monotonic()
        self._stoppable, self._asked = run, self._asked if run else None

    def _choose(self) -> None:
        """Follow the run that was chosen in the list, and list all runs."""
        state = self._state
        if self._choice.value != self._chosen and self._choice.value in state.runs:
            state.followed = state.runs[self._choice.value]
        names, name = list(reversed(state.runs)), state.followed.name if state.followed else None
        offer(self._choice, names)
        self._choice.layout.display = None if names else "none"
        self._choice.value = self._chosen = name

    # The forecast.

    def _forecast(self) -> str:
        """The figures that are known before training, and the memory and time that it will probably take."""
        found, problem = self._state.watch.found, self._state.watch.problem
        if not self.settings.valid:
            return '<span class="bn-muted">The settings are not valid yet: see what stands beside them.</span>'
        if problem:
            return f'<span role="alert">⚠ {html.escape(str(problem))}</span>'
        if found is None:
            return '<span class="bn-muted">Reading the rows …</span>'
        alerts, read = "".join(map(alert, found.warnings)), _read(found)
        expected, fit, telling = found.expected, found.fit, found.power
        if expected is None or fit is None or telling is None:
            return explain(tiles([("time, memory, what can be seen", "counting the rows …")]) + alerts + read)
        time_needed, source = self._time(found, expected)
        seen = f"≥ {1 - math.exp(-telling.change):.0%} of perplexity" if telling.change else "nothing: too few rows"
        figures = [
            time_needed,
            (expected.memory, f"≈ {expected.peak:.1f} of {expected.free:.1f} GiB free"),
            (f"change that {telling.rows} held-out rows can show", seen),
        ]
        sizes = f'min="0" high="{expected.free}" max="{max(expected.free, expected.peak)}" value="{expected.peak}"'
        meter = f'<meter {sizes} aria-label="memory needed, of what is free"></meter>'
        rows = "1 row" if fit.micro_batch == 1 else f"{fit.micro_batch} rows"
        words = f"{rows} at once ({fit.reason}). {source} {telling.sentence}."
        detail = f"<details><summary>how that is known</summary><p>{html.escape(words)}</p></details>"
        if expected.peak > expected.free:
            detail = alert(f"This does not seem to fit: {words}")
        return explain(tiles(figures) + meter + alerts + read) + detail

    def _time(self, found: Forecast, expected: Preflight) -> tuple[tuple[str, str], str]:
        """The time that the run will take, or its training where the rest is not known; a sentence on its source."""
        epochs, known = found.settings.epochs, past(list(self._state.runs.values()), found.base.name)
        if known:
            seconds = found.epoch_tokens * epochs / known.speed
            source = f"Time at the {known.speed:,.0f} tokens/s of {known.run}"
        elif expected.seconds is not None:
            seconds, source = expected.seconds * epochs, "Time from this device's figures"
        else:
            return ("time", "not known"), "The time is known once a first run of this model has been trained here."
        if known is None or known.beside is None:
            return ("training time", f"≈ {duration(seconds)}"), f"{source}; loading, scoring and answering come on top."
        beside = f"and the {duration(known.beside)} that it took to load, score, answer and save"
        return ("time", f"≈ {duration(seconds + known.beside)}"), f"{source}, {beside}."

    # The buttons.

    def _on_start(self) -> None:
        if self._state.settings and not self._why_not_started():  # the second click of two in a hurry does nothing
            check_alone(self._state.settings.runs_dir)
            unload()
            self._state.follow(start(self._state.settings, self.settings.name))

    def _on_resume(self) -> None:
        run = self._state.followed
        if run and run.over:
            here = str(run.path.parent)  # where it is now; it may have been moved since it was trained
            check_alone(here)
            unload()
            start(dataclasses.replace(run.settings, runs_dir=here), run.name, resume=True)

    def _on_stop(self) -> None:
        run = self._stoppable
        if run and self._warned is None and run is not self._asked:
            self._asked = run
            run.stop()
        elif run and self._warned is not None and time.monotonic() - self._warned >= WARNED:
            run.kill()


def _read(found: Forecast) -> str:
    """What the run would read, in one line."""
    about = "" if found.finished else "≈ "
    name = found.base.name if len(found.base.name) <= 40 else "…" + found.base.name[-39:]
    rate = [f"learning rate {found.learning_rate:g}"] if found.finished else []
    counted = [f"{found.rows:,} rows", f"{found.steps:,} steps", f"{about}{found.epoch_tokens:,.0f} tokens an epoch"]
    line = [name, *counted, f"{about}{found.truncated_share:.1%} of the rows cut", *rate]
    return f'<p class="bn-muted">{html.escape(" · ".join(line))}</p>'


def _why_not_resumed(run: RunDirectory | None, live: RunDirectory | None) -> str | None:
    if live is not None or run is None or run.status not in ("stopped", "lost", "failed"):
        return "no stopped run is chosen"
    return summary.how_to_go_on(run) if summary.diverged(run) else None
