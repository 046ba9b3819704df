"""The Runs tab: a table of all runs, and those that are chosen held against each other."""

from typing import Any, Final

import ipywidgets as w

from bizassist_nb.core import rendering
from bizassist_nb.notebook.panel.controls import tip
from bizassist_nb.notebook.panel.state import State, over
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked
from bizassist_nb.results.run_comparison import RunComparison, runs_section
from bizassist_nb.runs.run import RunDirectory

_NONE: Final = '<p class="bn-muted">No run yet: train one on the Train tab.</p>'


class Runs:
    """The table, newest run first, and a comparison on request."""

    title = "Runs"

    def __init__(self, state: State, update_loop: UpdateLoop):
        """Build the widgets."""
        self._state = state
        self._table = w.HTML()
        self._table.add_class("bn-scroll")
        self._choice = w.SelectMultiple(
            description="runs to compare",
            rows=5,
            **tip("hold Ctrl or Shift to choose several; the first is the measure"),
        )
        self._choice.add_class("bn-wide")
        self._compare = w.Button(description="Compare", icon="balance-scale")
        clicked(self._compare, update_loop, self._on_compare)
        self._comparison = w.HTML()
        row = w.Box([self._choice, self._compare])
        row.add_class("bn-row")
        self.view = w.VBox([self._table, row, self._comparison])
        self._shown: list[tuple[Any, ...]] = []
        self._looked = -1.0

    def update(self) -> None:
        """Show the runs there are; written only when one of them has moved on."""
        if self._looked == self._state.looked:
            return
        self._looked = self._state.looked
        sound = list(reversed(self._state.runs.values()))
        runs = [*sound, *self._state.damaged]
        seen = [_moved(run) for run in runs]
        if seen == self._shown and self._table.value:
            return
        self._shown = seen
        section = runs_section(runs)
        self._table.value = rendering.body(section) if runs else _NONE
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


def _moved(run: RunDirectory) -> tuple[Any, ...]:
    """What changes when the run's line in the table does, but for its steps: those are counted when it is over."""
    evaluation = run.path / "evaluation.json"
    written = evaluation.stat().st_mtime_ns if evaluation.is_file() else 0
    return run.name, run.damage, run.status, over(run), len(run.held_out), written
