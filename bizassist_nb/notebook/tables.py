"""Tables that a line magic returns: HTML in a notebook, text elsewhere."""

import dataclasses
from collections.abc import Iterable

from bizassist_nb.core import rendering
from bizassist_nb.results.run_comparison import runs_section, runs_text
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import doctor


@dataclasses.dataclass(frozen=True)
class Shown:
    """The same in HTML and as text."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        """The text."""
        return self.text


def runs_table(runs: Iterable[RunDirectory]) -> Shown:
    """The runs there are."""
    runs = list(runs)
    section = runs_section(runs)
    return Shown(rendering.body(section) if runs else "<p>no runs yet</p>", runs_text(runs))


def doctor_table() -> Shown:
    """What this machine has."""
    lines = doctor.report()
    return Shown(rendering.table(lines), doctor.as_text(lines))
