"""The Preview tab: the training rows, one of them token by token, as the model reads it, and the data check."""

import html
from typing import Final

import ipywidgets as w

from bizassist_nb.core import rendering
from bizassist_nb.core.errors import cut
from bizassist_nb.data.rows import Row
from bizassist_nb.notebook.panel.controls import alert
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop
from bizassist_nb.notebook.views import labelled, scrolled
from bizassist_nb.training.forecast import Forecast, tokens

_PAGE: Final = 6
"""Rows shown at once."""
_LONG: Final = 160
"""Characters of a text that are shown in the table."""
_MANY: Final = 1500
"""Tokens of a row that are shown."""


class Preview:
    """A page of rows, and the tokens of one."""

    title = "Preview"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        self._place = labelled(w.BoundedIntText, "row", "place in the order of training", value=1, min=1, max=1)
        back = update_loop.button("Previous", lambda: self._go(-1), icon="chevron-left", tooltip="the row before")
        on = update_loop.button("Next", lambda: self._go(1), icon="chevron-right", tooltip="the row after")
        chooser = w.Box([self._place, back, on]).add_class("bn-buttons")
        self._table, self._tokens, self._check = w.HTML().add_class("bn-rows"), w.HTML(), w.HTML()
        self.view = w.VBox([chooser, self._table, self._tokens, self._check])
        self._shown: tuple[object, ...] = ()

    def _go(self, by: int) -> None:
        self._place.value = min(max(self._place.value + by, 1), self._place.max)

    def update(self) -> None:
        """Show the rows that the settings lead to."""
        found, problem = self._state.watch.found, self._state.watch.problem
        if found is None:
            words = "Reading the rows …" if self._state.settings else "Put the settings right on the Train tab first."
            self._table.value = alert(str(problem)) if problem else rendering.plain(words)
            self._tokens.value, self._check.value, self._shown = "", "", ()
            return
        self._place.max = len(found.training)
        shown = (id(found.training), found.settings, self._place.value, found.findings is None)
        if shown != self._shown:
            place = self._place.value - 1
            self._table.value = page_html(found, place)
            self._tokens.value = row_html(found, found.training[place])
            self._check.value = check_html(found)
            self._shown = shown


def page_html(found: Forecast, place: int) -> str:
    """The page of rows on which the row in that place is."""
    first = place // _PAGE * _PAGE
    rows = [
        [
            ("▶ " if i == place else "") + str(i + 1),
            str(row.number),
            *(cut(text, _LONG) for text in (row.instruction, row.context, row.response)),
        ]
        for i, row in enumerate(found.training[first : first + _PAGE], first)
    ]
    head = ["row", "of the data", "instruction", "context", "response"]
    drawn = f"<p>{html.escape(found.table.source)}: {len(found.training):,} rows drawn</p>"
    return drawn + scrolled(rendering.table(rows, head))


def check_html(found: Forecast) -> str:
    """What the data check found among the training rows."""
    if found.findings is None:
        return "<p>Checking the rows …</p>"
    heading = f"<p>Data check of the {len(found.training):,} rows drawn and of all that cannot be used: "
    if not found.findings:
        return f"{heading}nothing odd.</p>"
    lines = rendering.table([finding.cells() for finding in found.findings], ("rows", "what", "which", "what to do"))
    return f"{heading}</p>{scrolled(lines)}"


def row_html(found: Forecast, row: Row) -> str:
    """The tokens of a row, with those that are learned marked."""
    example = found.example(row)
    shown = tokens(found.chat, example)
    learned = sum(label >= 0 for label in example.labels)
    count = len(example.input_ids)
    cut = ", cut at max_length" if example.truncated else ""
    spans = "".join(
        f'<span class="bn-token{" bn-learned" if is_learned else ""}">{html.escape(text)}</span>'
        for text, is_learned in shown[:_MANY]
    ).replace("\n", "⏎\n")
    more = f" … and {len(shown) - _MANY:,} more" if len(shown) > _MANY else ""
    return (
        f"<p>Row {row.number} as the model reads it: {count:,} tokens{cut}, {learned:,} of them learned "
        f'(<span class="bn-token bn-learned">marked like this</span>)</p>'
        f'<div class="bn-tokens">{spans}{more}</div>'
    )
