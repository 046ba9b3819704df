"""Tables that a line magic returns: HTML in a notebook, text elsewhere."""

import dataclasses
from collections.abc import Iterable

from bizassist_nb import doctor, render
from bizassist_nb.comparing import runs_section, runs_text
from bizassist_nb.runs import Run


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


def runs_table(runs: Iterable[Run]) -> Shown:
    """The runs there are."""
    runs = list(runs)
    section = runs_section(runs)
    return Shown(render.body(section) if runs else "<p>no runs yet</p>", runs_text(runs))


def doctor_table() -> Shown:
    """What this machine has."""
    lines = doctor.report()
    return Shown(render.table(lines), doctor.as_text(lines))
