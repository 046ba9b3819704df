"""The Runs tab: a table of all runs, and a comparison of those that are chosen."""

from typing import Final

import ipywidgets as w

from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop
from bizassist_nb.notebook.views import labelled
from bizassist_nb.results.run_comparison import RunComparison, runs_section

_NONE: Final = '<p class="bn-muted">No run yet: train one on the Train tab.</p>'


class Runs:
    """The table, newest run first, and a comparison on request."""

    title = "Runs"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        self.table = w.HTML().add_class("bn-scroll")
        hint = "hold Ctrl or Shift to choose several; the others are compared with the first"
        self._choice = labelled(w.SelectMultiple, "runs to compare", hint, rows=5).add_class("bn-wide")
        self._compare = update_loop.button("Compare", self._on_compare, icon="balance-scale")
        self._comparison = w.HTML().add_class("bn-scroll")
        row = w.Box([self._choice, self._compare]).add_class("bn-row")
        self.view = w.VBox([self.table, row, self._comparison])
        self._looked = -1.0

    def update(self) -> None:
        """Show the runs when they have been listed anew; an unchanged table is not sent again."""
        if self._looked == self._state.looked:
            return
        self._looked = self._state.looked
        sound = list(reversed(self._state.runs.values()))
        runs = [*sound, *self._state.damaged]
        self.table.value = runs_section(runs).page() if runs else _NONE
        names = [run.name for run in sound]
        if list(self._choice.options) != names:
            chosen = [name for name in self._choice.value if name in names]
            self._choice.options = names
            self._choice.value = chosen
        self._compare.disabled = not sound

    def _on_compare(self) -> None:
        runs = self._state.runs
        chosen = [runs[name] for name in self._choice.value if name in runs] or list(runs.values())
        self._comparison.value = RunComparison(chosen)._repr_html_()
