"""The Train tab: settings, what they lead to, and a run from its start to its verdict."""

import dataclasses
import html
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import ipywidgets as w
import tomli_w

from bizassist_nb.assistant.loaded import unload
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import BizassistError, SettingsError
from bizassist_nb.core.rendering import duration
from bizassist_nb.core.settings import Settings
from bizassist_nb.notebook.panel.controls import Control, control, fold, tip
from bizassist_nb.notebook.panel.state import State, over
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked
from bizassist_nb.results import summary
from bizassist_nb.results.verdict_card import rising
from bizassist_nb.runs.run import RunDirectory, check_name
from bizassist_nb.training.forecast import Forecast, past_speed
from bizassist_nb.training.launch import start
from bizassist_nb.training.preflight import Estimate

_FIRST: Final = ("model", "data", "subset", "rank")
"""The settings that are seen at once; the rest are under "More settings"."""
_FACTS: Final = (
    "model",
    "engine",
    "processes",
    "data",
    "preflight",
    "fit",
    "parameters",
    "away",
    "back",
    "unsaved",
    "damaged",
)
"""Events by which what is said of a run in training changes."""
_SETTLED: Final = 0.5
"""Seconds for which settings have to stay as they are before their rows are counted."""
_PLOT_EVERY: Final = 0.5
"""Seconds between redraws of the plot."""


class Train:
    """Settings on the left, the run on the right; below each other where it is narrow."""

    title = "Train"

    def __init__(self, state: State, update_loop: UpdateLoop):
        """Build the widgets."""
        self._settings = SettingsForm(state, update_loop)
        self._run = RunView(state, update_loop, self._settings)
        self.view = w.Box([self._settings.view, self._run.view])
        self.view.add_class("bn-split")

    def update(self) -> None:
        """Bring both sides up to date."""
        self._settings.update()
        self._run.update()


class SettingsForm:
    """A control for every setting, a name for the run, and the same as a cell."""

    def __init__(self, state: State, update_loop: UpdateLoop):
        """Show the defaults, in the state's folder of runs."""
        self._state = state
        self._name = w.Text(
            description="name of the run",
            placeholder="made from the data's name",
            **tip("letters, digits, '.', '-' and '_'; the run's folder gets this name"),
        )
        self._name_problem = w.HTML()
        self._name_problem.add_class("bn-problem")
        self.controls: dict[str, Control] = {f.name: control(f) for f in dataclasses.fields(Settings)}
        if state.settings:
            self.controls["runs_dir"].put(state.settings.runs_dir)
        self._cell = w.Textarea(
            description="as a cell", rows=7, **tip("the same settings as a %%finetune cell: select it all and copy it")
        )
        self._cell.add_class("bn-code")
        self._from = w.Dropdown(
            description="settings of run", **tip("a run whose settings are to be loaded into the form")
        )
        load = w.Button(description="Load", tooltip="load that run's settings into the form")
        clicked(load, update_loop, self._load)
        more = [c.view for name, c in self.controls.items() if name not in _FIRST]
        source = w.Box([self._from, load])
        source.add_class("bn-row")
        folded = [fold("More settings", *more), fold("Copy as cell", self._cell), fold("From run", source)]
        name = w.VBox([self._name, self._name_problem])
        name.add_class("bn-field")
        self.view = w.VBox([w.HTML("<h3>Settings</h3>"), name, *(self.controls[n].view for n in _FIRST), *folded])
        self._raw: Mapping[str, Any] = {}
        self._changed_at = 0.0
        self.name_problem = ""

    @property
    def name(self) -> str | None:
        """The name asked for, if one was."""
        return self._name.value.strip() or None

    @property
    def valid(self) -> bool:
        """Whether a run could be started with these."""
        return self._state.settings is not None and not self.name_problem

    def update(self) -> None:
        """Read the controls, say what is wrong beside each, and have the rows counted once nothing changes any more."""
        raw = {name: shown.read() for name, shown in self.controls.items()}
        if raw != self._raw:
            self._raw, self._changed_at = raw, time.monotonic()
            self._take(raw)
        self._check_name()
        self._state.unsettled = time.monotonic() - self._changed_at < _SETTLED
        if not self._state.unsettled or self._state.settings is None:
            self._state.watch.want(self._state.settings)
        names = list(reversed(self._state.runs))
        if list(self._from.options) != names:
            self._from.options = names
        self._cell.value = self._as_cell()

    def _take(self, raw: Mapping[str, Any]) -> None:
        problems: dict[str, str] = {}
        try:
            self._state.settings = Settings(**raw)
        except SettingsError as error:
            self._state.settings = None
            problems = {problem.partition(" ")[0]: problem for problem in error.problems}
        for name, shown in self.controls.items():
            shown.complain(problems.get(name, ""))

    def _check_name(self) -> None:
        self.name_problem = ""
        if self.name:
            try:
                check_name(self.name)
            except BizassistError as error:
                self.name_problem = str(error)
        shown = f'<span role="alert">⚠ {html.escape(self.name_problem)}</span>' if self.name_problem else ""
        self._name_problem.value = shown

    def _as_cell(self) -> str:
        if not self._state.settings:
            return "(the settings are not valid yet)"
        return f"%%finetune {self.name or ''}".rstrip() + "\n" + tomli_w.dumps(self._state.settings.changed())

    def _load(self) -> None:
        if self._from.value:
            settings = self._state.runs[self._from.value].settings
            for name, shown in self.controls.items():
                if name != "runs_dir":  # the runs that are shown stay those
                    shown.put(getattr(settings, name))


class RunView:
    """What the settings lead to, the buttons, and the run that is followed."""

    def __init__(self, state: State, update_loop: UpdateLoop, form: SettingsForm):
        """Build the widgets."""
        self._state, self._form = state, form
        self._before = w.HTML()
        self._before.add_class("bn-before")
        self._start = w.Button(description="Start", button_style="primary", icon="play")
        self._stop = w.Button(description="Stop", icon="stop")
        self._resume = w.Button(description="Resume", icon="step-forward")
        clicked(self._start, update_loop, self._on_start)
        clicked(self._resume, update_loop, self._on_resume)
        self._stop.on_click(lambda _: self._on_stop())  # only a signal, so at once, whatever the kernel is busy with
        self._stopping: RunDirectory | None = None
        self._choice = w.Dropdown(description="run", **tip("the run that is shown here"))
        buttons = w.Box([self._start, self._stop, self._resume, self._choice])
        buttons.add_class("bn-buttons")
        self._head, self._plot, self._tail = w.HTML(), w.HTML(), w.HTML()
        self.view = w.VBox([w.HTML("<h3>Training</h3>"), self._before, buttons, self._head, self._plot, self._tail])
        self._plotted: tuple[RunDirectory | None, int, float] = (None, -1, 0.0)
        self._told: tuple[object, ...] = ()
        self._chosen: str | None = None

    def update(self) -> None:
        """Bring it up to date."""
        self._choose()
        self._before.value = self._before_words()
        run, live = self._state.followed, self._state.live
        self._start.disabled = not self._form.valid or live is not None
        self._start.tooltip = _why_not(self._form.valid, live)
        self._stop.disabled = live is None
        stopping = live is not None and self._stopping is live
        self._stop.description = "Stop at once" if stopping else "Stop"
        self._stop.tooltip = "end it now, without saving" if stopping else "finish the step, save, and end"
        why_not = _why_not_resumed(run, live)
        self._resume.disabled, self._resume.tooltip = bool(why_not), why_not or "go on from the last checkpoint"
        if live is None:
            self._stopping = None
        self._show(run)

    def _choose(self) -> None:
        """Follow what was chosen in the list; list what there is."""
        state = self._state
        if self._choice.value != self._chosen and self._choice.value in state.runs:
            state.followed = state.runs[self._choice.value]
        names, name = list(reversed(state.runs)), state.followed.name if state.followed else None
        if list(self._choice.options) != names:
            self._choice.options = names
        self._choice.layout.display = None if names else "none"
        self._choice.value = self._chosen = name

    # What the settings lead to.

    def _before_words(self) -> str:
        watch, settings = self._state.watch, self._state.settings
        if settings is None or not self._form.valid:
            return '<span class="bn-muted">The settings are not valid yet: see what stands beside them.</span>'
        if watch.problem:
            return f'<span role="alert">⚠ {html.escape(str(watch.problem))}</span>'
        if watch.found is None:
            return '<span class="bn-muted">Reading the rows …</span>'
        return self._consequences(watch.found)

    def _consequences(self, found: Forecast) -> str:
        """What is known before training: figures, and the memory and time that they are expected to take."""
        about = "" if found.finished else "≈ "
        figures = [
            ("model", _short(found.base.name)),
            ("rows", f"{found.rows:,}"),
            ("tokens an epoch", f"{about}{found.epoch_tokens:,.0f}"),
            ("steps", f"{found.steps:,}"),
            ("rows cut", f"{about}{found.truncated_share:.1%}"),
        ]
        if bad := len(found.unusable) + len(found.too_long):
            figures.append(("rows not usable", f"{bad:,}"))
        expected = found.expected
        if expected is None:
            return _tiles([*figures, ("memory and time", "counting the rows …")])
        figures.append((expected.memory, f"≈ {expected.peak:.1f} of {expected.free:.1f} GiB free"))
        time_needed, source = self._time(found, expected)
        rows = "1 row" if expected.fit.micro_batch == 1 else f"{expected.fit.micro_batch} rows"
        words = f"{rows} at once ({expected.fit.reason}). {source}"
        detail = f'<div class="bn-muted">{html.escape(words)}</div>'
        if expected.peak > expected.free:
            detail = f'<div class="bn-alert" role="alert">⚠ This does not seem to fit: {html.escape(words)}</div>'
        return _tiles([*figures, ("time", time_needed)]) + detail

    def _time(self, found: Forecast, expected: Estimate) -> tuple[str, str]:
        """How long training will take, and where that is known from."""
        epochs = found.settings.epochs
        if speed := past_speed(list(self._state.runs.values()), found.base.name):
            seconds = found.epoch_tokens * epochs / speed.tokens_per_second
            return f"≈ {duration(seconds)}", f"Time at the {speed.tokens_per_second:,.0f} tokens/s of {speed.run}."
        if expected.seconds is not None:
            return f"≈ {duration(expected.seconds * epochs)}", "Time from this device's figures."
        return "not known", "The time is known once a first run of this model has been trained here."

    # The buttons.

    def _on_start(self) -> None:
        if self._state.settings and self._form.valid:
            unload()
            self._state.follow(start(self._state.settings, self._form.name))

    def _on_resume(self) -> None:
        run = self._state.followed
        if run and over(run):
            unload()
            here = str(run.path.parent)  # where it lies now; it may have been trained from another folder
            start(dataclasses.replace(run.settings, runs_dir=here), run.name, resume=True)

    def _on_stop(self) -> None:
        live = self._state.live
        if live and self._stopping is live:
            live.kill()
        elif live:
            self._stopping = live
            live.stop()

    # The run.

    def _show(self, run: RunDirectory | None) -> None:
        if run is None:
            self._head.value = '<p class="bn-muted">No run yet. Choose the settings, then press Start.</p>'
            self._plot.value = self._tail.value = ""
            return
        ended = over(run)
        self._head.value = "" if ended else self._progress(run)
        points = len(run.steps) + len(run.held_out)
        now = time.monotonic()
        of, drawn, at = self._plotted
        if run is not of or (points != drawn and (ended or now - at >= _PLOT_EVERY)):
            self._plot.value = _plot(run) if points else ""
            self._plotted = (run, points, now)
        told = (run, ended, run.status if ended else None, [run.last(kind) for kind in _FACTS])
        if told != self._told:  # seldom: what was unfolded in it is folded up again by a change
            self._tail.value = _outcome(run) if ended else rendering.table(summary.facts(run))
            self._told = told

    def _progress(self, run: RunDirectory) -> str:
        now, state = summary.progress(run), run.last("state")
        stopping = self._stopping is run
        doing = "stopping: it finishes its step and saves" if stopping else summary.headline(run).partition(": ")[2]
        doing = doing.partition(" · ")[0]
        since = f", for {duration(time.time() - state['time'])}" if state and run.status != "training" else ""
        head = f"<p><b>{html.escape(run.name)}</b>: {html.escape(doing)}{since}</p>"
        if now is None:
            return head + _bar(0.0)
        held_out = run.held_out
        tiles = [
            ("step", f"{now.step:,} / {now.total:,}"),
            ("loss", f"{now.loss:.3f}"),
            ("held-out loss", f"{held_out[-1][1]:.3f}" if held_out else "–"),
            ("tokens/s", f"{now.tokens_per_second:,.0f}"),
            ("time left", duration(now.seconds_left)),
        ]
        rises = f'<p role="status">{html.escape(words)}</p>' if (words := rising(run)) else ""
        return head + _bar(now.share) + _tiles(tiles) + rises


def _plot(run: RunDirectory) -> str:
    from bizassist_nb.results.loss_plot import loss_svg  # matplotlib, which is not needed before there is a curve

    return loss_svg(run)


def _outcome(run: RunDirectory) -> str:
    """How it ended; for a failure with the last lines of its log, whatever the reason."""
    told = summary.run_html(run)
    if run.status in ("failed", "lost") and (lines := run.log(12)):
        log = html.escape("\n".join(lines))
        told += f"<details><summary>the last lines of its log</summary><pre>{log}</pre></details>"
    return told


def _why_not(valid: bool, live: RunDirectory | None) -> str:
    if live:
        return f"{live.name} is being trained; one run at a time"
    return "train with these settings" if valid else "the settings are not valid yet"


def _why_not_resumed(run: RunDirectory | None, live: RunDirectory | None) -> str | None:
    if live is not None or run is None or run.status not in ("stopped", "lost", "failed"):
        return "no stopped run is chosen"
    return summary.how_to_go_on(run) if summary.diverged(run) else None


def _bar(share: float) -> str:
    return (
        f'<div class="bn-bar" role="progressbar" aria-label="training" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{100 * share:.0f}"><div style="width: {share:.1%}"></div></div>'
    )


def _tiles(pairs: Iterable[tuple[str, str]]) -> str:
    shown = "".join(
        f"<div><span>{html.escape(label)}</span> <b>{html.escape(value)}</b></div>" for label, value in pairs
    )
    return f'<div class="bn-tiles">{shown}</div>'


def _short(name: str) -> str:
    """A model's name; of a path its end."""
    return name if len(name) <= 40 else "…" + name[-39:]
