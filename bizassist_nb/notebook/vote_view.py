"""A blind vote in a notebook: four buttons, and a field in which one key votes.

The vote is on disk before the view changes. `widget` can stand in another view; `show` displays it as a cell's output,
which after the vote is replaced by static HTML, so that the saved notebook shows the vote without a kernel.
"""

import secrets
from collections.abc import Callable
from typing import Any

from IPython.display import display, update_display

from bizassist_nb.notebook.views import close, widget_bundle
from bizassist_nb.results.ballot import CHOICES, KEYS_IN_WORDS, Ballot, Choice, choice_of


class BallotView:
    """A ballot with what it is cast by."""

    def __init__(self, ballot: Ballot, on_vote: Callable[[Ballot], None] = lambda _: None):
        """`on_vote` is called once, with the ballot, after the vote."""
        import ipywidgets

        self._ballot, self._on_vote = ballot, on_vote
        self._html: Any = ipywidgets.HTML(ballot.html(), layout=ipywidgets.Layout(width="100%"))
        self._key: Any = ipywidgets.Text(
            description="or a key",
            placeholder=KEYS_IN_WORDS,
            layout=ipywidgets.Layout(width="320px"),
        )
        self._key.observe(self._on_key, "value")
        buttons = [self._button(choice, words) for choice, words in CHOICES.items()]
        row = ipywidgets.HBox([*buttons, self._key], layout=ipywidgets.Layout(flex_flow="row wrap"))
        self.widget: Any = ipywidgets.VBox([self._html, row])
        self._display_id: str | None = None

    def show(self) -> None:
        """Display it as the cell's output."""
        self._display_id = secrets.token_hex(8)
        bundle = widget_bundle(self.widget, self._ballot.html(), repr(self._ballot))
        display(bundle, raw=True, display_id=self._display_id)

    def _button(self, choice: Choice, words: str) -> Any:
        import ipywidgets

        button = ipywidgets.Button(description=words, layout=ipywidgets.Layout(width="auto"))
        button.on_click(lambda _: self._cast(choice))
        return button

    def _on_key(self, change: Any) -> None:
        if choice := choice_of(change["new"]):
            self._cast(choice)
        elif change["new"]:
            self._key.value = ""

    def _cast(self, choice: Choice) -> None:
        if self._ballot.vote is not None:  # a second click was on its way when the first arrived
            return
        self._ballot.cast(choice)
        self._html.value = self._ballot.html()
        if self._display_id:
            static = {"text/html": self._ballot.html(), "text/plain": repr(self._ballot)}
            update_display(static, display_id=self._display_id, raw=True)
            close(self.widget)
        else:
            self.widget.children = (self._html,)
        self._on_vote(self._ballot)
