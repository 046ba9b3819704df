"""The Runs tab: a table of all runs, what can be done with one of them, and a comparison of several."""

import html
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import ipywidgets as w

from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.terms import explain
from bizassist_nb.notebook.panel.controls import fold, offer
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop
from bizassist_nb.notebook.views import labelled, scrolled
from bizassist_nb.results.model_card import write_card
from bizassist_nb.results.run_comparison import RunComparison, runs_section
from bizassist_nb.runs.run import NOTE, RunDirectory, check_name

_NONE: Final = '<p class="bn-muted">No run yet: train one on the Train tab.</p>'
_NO_MATCH: Final = '<p class="bn-muted">No run has all these words: empty the filter.</p>'
_ORDERS: Final[Mapping[str, Callable[[RunDirectory], Any]]] = {
    "newest first": lambda _: 0,
    "by name": lambda run: run.name,
    "by change of loss": lambda run: run.evaluation.difference if run.evaluation else math.inf,
}


class Runs:
    """The table; rename, note, log and bin for one run; a comparison on request."""

    title = "Runs"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        self._filter = labelled(w.Text, "filter", "words that a run's name, status, model, data or note has")
        self._order = labelled(w.Dropdown, "order", "the order of the table", options=list(_ORDERS))
        self.table = w.HTML().add_class("bn-scroll")
        self._one = labelled(w.Dropdown, "chosen run", "the run that the buttons below are for")
        self._name = labelled(w.Text, "new name", "what the run is to be called")
        self._note = labelled(w.Text, "note", "a note of your own; it stands in the table")
        save = update_loop.button("Apply", self._on_save, icon="save", tooltip="give the run that name and that note")
        hint = "move it to the folder .bin beside it"
        delete = update_loop.button("Delete", self._on_delete, icon="trash", tooltip=hint)
        self._undo = update_loop.button("Undo", self._on_undo, icon="undo", tooltip="bring the deleted run back")
        rows = ((self._filter, self._order), (self._one, delete, self._undo), (self._name, self._note, save))
        filters, deleting, saving = (w.Box(row).add_class("bn-row") for row in rows)
        self._log = w.HTML()
        self._actions = w.VBox([deleting, saving, fold("Log", self._log)]).add_class("bn-field")
        hint = "hold Ctrl or Shift to choose several; the others are compared with the first"
        self._choice = labelled(w.SelectMultiple, "runs to compare", hint, rows=5).add_class("bn-wide")
        self._compare = update_loop.button("Compare", self._on_compare, icon="balance-scale")
        self._comparison = w.HTML().add_class("bn-scroll")
        comparing = w.Box([self._choice, self._compare]).add_class("bn-row")
        self.view = w.VBox([filters, self.table, self._actions, comparing, self._comparison])
        self._shown: tuple[object, ...] = ()
        self._told: str | None = None
        self._binned: list[tuple[Path, Path]] = []
        """Where deleted runs are, and where they were."""

    def update(self) -> None:
        """Show the runs when they have been listed anew; an unchanged table is not sent again."""
        asked = (self._state.looked, self._filter.value, self._order.value)
        if asked == self._shown and self._one.value == self._told:
            return
        if asked != self._shown:
            self._shown = asked
            self._list()
        if self._one.value != self._told:
            self._told = self._name.value = self._one.value
            self._note.value = self._run.note if self._run else ""
        self._undo.layout.display = None if self._binned else "none"
        log = "\n".join(self._run.log(200)) if self._run else ""
        self._log.value = f'<pre class="bn-log" tabindex="0">{html.escape(log) or "It has no log yet."}</pre>'

    def _list(self) -> None:
        newest_first = list(reversed(self._state.runs.values()))
        sound = sorted(newest_first, key=_ORDERS[self._order.value])
        runs = [run for run in [*sound, *self._state.damaged] if self._wanted(run)]
        none = _NO_MATCH if self._state.runs else _NONE
        self.table.value = scrolled(explain(runs_section(runs).page())) if runs else none
        names = [run.name for run in sound]
        offer(self._one, names)
        offer(self._choice, names)
        self._compare.disabled = not sound
        self._actions.layout.display = None if sound else "none"

    def _wanted(self, run: RunDirectory) -> bool:
        if not (words := self._filter.value.lower().split()):
            return True
        about = [run.name, run.note, *([] if run.damage else [run.status, run.model, run.settings.data])]
        return all(word in " ".join(about).lower() for word in words)

    @property
    def _run(self) -> RunDirectory | None:
        return self._state.runs.get(self._one.value)

    def _on_save(self) -> None:
        if not (run := self._run):
            return
        note, name, self._state.looked = self._note.value.strip(), self._name.value.strip(), 0.0
        if note != run.note:
            write_atomic(run.path / NOTE, lambda part: part.write_text(note, "utf-8", "replace"))
        if name != run.name:
            renamed = RunDirectory(run.move(run.path.with_name(check_name(name))))
            if (renamed.path / "README.md").is_file():  # its card names it; an adapter's does once it is exported anew
                write_card(renamed)
            if self._state.followed is run:
                self._state.followed = renamed
            self._one.options = [renamed.name]  # it stays the one that is chosen

    def _on_delete(self) -> None:
        if run := self._run:
            self._binned.append((run.move_to_bin(), run.path))
            self._state.looked = 0.0

    def _on_undo(self) -> None:
        if self._binned:
            binned, path = self._binned[-1]
            RunDirectory(binned).move(path)
            del self._binned[-1]
            self._state.looked = 0.0

    def _on_compare(self) -> None:
        runs = self._state.runs
        chosen = [runs[name] for name in self._choice.value if name in runs] or list(runs.values())
        self._comparison.value = RunComparison(chosen)._repr_html_()
