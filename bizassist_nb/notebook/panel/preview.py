"""The Preview tab: the rows that would be trained on, and one of them as the model reads it, token by token."""

import html
from typing import Final

import ipywidgets as w

from bizassist_nb.core import rendering
from bizassist_nb.data.rows import Row
from bizassist_nb.notebook.panel.controls import tip
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked
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
        """Build the widgets."""
        self._state = state
        self._place = w.BoundedIntText(
            value=1, min=1, max=1, description="row", **tip("place in the order of training")
        )
        back = w.Button(description="Previous", icon="chevron-left", tooltip="the row before")
        on = w.Button(description="Next", icon="chevron-right", tooltip="the row after")
        clicked(back, update_loop, lambda: self._go(-1))
        clicked(on, update_loop, lambda: self._go(1))
        chooser = w.Box([self._place, back, on])
        chooser.add_class("bn-buttons")
        self._table, self._tokens = w.HTML(), w.HTML()
        self._table.add_class("bn-rows")
        self.view = w.VBox([chooser, self._table, self._tokens])
        self._shown: tuple[object, ...] = ()

    def _go(self, by: int) -> None:
        self._place.value = min(max(self._place.value + by, 1), self._place.max)

    def update(self) -> None:
        """Show what the settings lead to now."""
        found, problem = self._state.watch.found, self._state.watch.problem
        if found is None:
            words = (
                f"⚠ {problem}" if problem else "Reading the rows …" if self._state.settings else "No valid settings."
            )
            self._table.value, self._tokens.value, self._shown = rendering.plain(words), "", ()
            return
        self._place.max = len(found.training)
        shown = (id(found.training), found.settings, self._place.value)
        if shown != self._shown:
            place = self._place.value - 1
            self._table.value = _page(found, place)
            self._tokens.value = _row(found, found.training[place])
            self._shown = shown


def _page(found: Forecast, place: int) -> str:
    first = place // _PAGE * _PAGE
    rows = [
        [
            ("▶ " if i == place else "") + str(i + 1),
            str(row.number),
            *map(_short, (row.instruction, row.context, row.response)),
        ]
        for i, row in enumerate(found.training[first : first + _PAGE], first)
    ]
    head = ["row", "of the data", "instruction", "context", "response"]
    return f"<p>{html.escape(found.source)}: {len(found.training):,} rows drawn</p>" + rendering.table(rows, head)


def _row(found: Forecast, row: Row) -> str:
    example = found.example(row)
    shown = tokens(found.chat, example)
    learned = sum(label >= 0 for label in example.labels)
    count = len(example.input_ids)
    cut = ", cut at max_length" if example.truncated else ""
    spans = [
        f'<span class="bn-token{" bn-learned" if is_learned else ""}">{_visible(text)}</span>'
        for text, is_learned in shown[:_MANY]
    ]
    more = f" … and {len(shown) - _MANY:,} more" if len(shown) > _MANY else ""
    return (
        f"<p>Row {row.number} as the model reads it: {count:,} tokens{cut}, {learned:,} of them learned "
        f'(<span class="bn-token bn-learned">marked like this</span>)</p>'
        f'<div class="bn-tokens">{"".join(spans)}{more}</div>'
    )


def _visible(text: str) -> str:
    return html.escape(text).replace("\n", "⏎\n")


def _short(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 1] + "…"
