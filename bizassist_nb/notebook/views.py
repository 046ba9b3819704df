"""What a cell shows: live through one widget while its loop runs, static HTML and PNG when it ends.

A widget survives a reload of the page, which display updates do not; static output survives everything else.
Only the cell's own loop writes to it: Colab drops what other threads send (googlecolab/colabtools#3373).
"""

import base64
import functools
import html
import time
from collections.abc import Callable, Iterable
from importlib import resources
from typing import Any, Final

import ipywidgets as w
from IPython.display import DisplayHandle, display, update_display

from bizassist_nb.assistant.comparison import Comparison, Comparisons, comparison_html
from bizassist_nb.core import rendering
from bizassist_nb.core.rendering import duration
from bizassist_nb.core.terms import explain
from bizassist_nb.results.ballot import CHOICES, KEYS, Ballot, blind_html, choice_of
from bizassist_nb.results.summary import (
    elapsed,
    facts_html,
    headline,
    progress,
    run_html,
    run_text,
    status_words,
)
from bizassist_nb.results.verdict_card import rising
from bizassist_nb.runs.run import ENDED, RunDirectory

PLOT_EVERY: Final = 0.5
"""Seconds between redraws of the plot."""
_STATIC_EVERY: Final = 120.0
"""Seconds between updates of what a saved notebook shows of a run in training."""
_TEXT_EVERY: Final = 0.1
"""Seconds between updates of streaming answers: smooth to the eye, and few messages."""
_TABLE_EVERY: Final = 0.5
"""The same of a table of many answers, which takes longer to render."""
_NOTHING: Final = {"text/plain": ""}


def show_widget(widget: Any, text: str, page: str = "") -> None:
    """Display a widget; a saved notebook shows the text, or the page of HTML, where no kernel runs."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    page = page or f"<i>{html.escape(text)}</i>"
    bundle = {"application/vnd.jupyter.widget-view+json": view, "text/html": page, "text/plain": text}
    display(bundle, raw=True, display_id=widget.model_id)


def clear(live: Any) -> None:
    """Empty the output that displays the widget; the cell's other outputs stay."""
    update_display({"text/plain": ""}, display_id=live.model_id, raw=True)
    close(live)


# A kernel that ends leaves the widgets' elements, each with an icon of a broken link, and this style with them.
_STATIC_STYLE: Final = """<style>
.{name}.jupyter-widgets-disconnected > * {{ display: none !important; }}
.{name}.jupyter-widgets-disconnected::before {{ content: "{ended}"; font: inherit; font-style: italic; }}
:root:has(.{name}:not(.jupyter-widgets-disconnected)) :is(.{name}-static,
  :is(.jp-OutputArea-child, .output_area, .display_data):has(.{name}-static) + *) {{ display: none; }}
</style>"""


class StaticOutputs:
    """A run's summary and plot as outputs below a live view, hidden by its `style` while the view's kernel runs.

    They are what a saved notebook shows, and a page whose kernel has ended.
    """

    def __init__(self, view: Any, ended: str):
        """`ended` stands in place of the view once its kernel has ended."""
        self._name = f"bn-{view.model_id}"
        view.add_class(self._name)
        self.style = _STATIC_STYLE.format(name=self._name, ended=ended)
        self._handles = [DisplayHandle(f"{self._name}-{part}") for part in ("summary", "plot")]
        self._data = [_NOTHING, _NOTHING]
        self._shown: tuple[object, ...] = ()
        self._shown_at = 0.0

    def show(self) -> None:
        """Display them in this cell, below the view."""
        for handle, data in zip(self._handles, self._data, strict=True):
            handle.display(data, raw=True)

    def update(self, run: RunDirectory) -> None:
        """Show the run as it is now, if it has changed; in training every two minutes."""
        state, now = (len(run.events), run.path, run.status, bool(run.steps)), time.monotonic()
        soon = run.status not in ENDED and state[1:] == self._shown[1:] and now - self._shown_at < _STATIC_EVERY
        if soon or state == self._shown:
            return
        self._shown, self._shown_at = state, now
        words = "" if run.status in ENDED else f"<p><i>As of {time.strftime('%Y-%m-%d %H:%M')}.</i></p>"
        page = f'<div class="{self._name}-static">{run_html(run)}{words}</div>'
        self.put({"text/html": page, "text/plain": run_text(run)}, plot_bundle(run) if run.steps else _NOTHING)

    def put(self, summary: dict[str, str], plot: dict[str, str]) -> None:
        """Show these bundles."""
        self._data = [summary, plot]
        for handle, data in zip(self._handles, self._data, strict=True):
            handle.update(data, raw=True)


class RunView:
    """A run, from its start to its verdict: widgets for its progress, its loss curve and its facts.

    Each is written only when it changes, so that what a person has unfolded stays open.
    """

    def __init__(self, none: str = "") -> None:
        """`none` is what stands there while no run is shown."""
        self._none = f'<p class="bn-muted">{html.escape(none)}</p>' if none else ""
        self._head, self._plot, self._tail = self.parts = [w.HTML(), w.HTML(), w.HTML()]
        self._plotted: tuple[RunDirectory | None, int, float] = (None, -1, 0.0)
        self._told: tuple[object, ...] = ()

    def show(self, run: RunDirectory | None) -> None:
        """Bring the widgets up to date."""
        if run is None:
            self._head.value, self._plot.value, self._tail.value = self._none, "", ""
            return
        ended = run.over
        self._head.value = "" if ended else progress_html(run)
        points, now = len(run.steps) + len(run.held_out), time.monotonic()
        of, drawn, at = self._plotted
        if run is not of or (points != drawn and (ended or now - at >= PLOT_EVERY)):
            from bizassist_nb.results.loss_plot import loss_svg  # matplotlib, which is needed only for a curve

            self._plot.value = loss_svg(run) if points else ""
            self._plotted = (run, points, now)
        told = (run, ended and run.status, len(run.events))
        if told != self._told:
            folded = f"<details><summary>what it trains on, and with what</summary>{facts_html(run)}</details>"
            self._tail.value = run_html(run) if ended else folded
            self._told = told


class TrainingView:
    """A run in training as a cell shows it; call it with the run as often as you like."""

    def __init__(self) -> None:
        view, style = RunView("Starting …"), w.HTML()
        self._show = view.show
        self._live = w.VBox([style, *view.parts]).add_class("bizassist")
        self._static = StaticOutputs(self._live, "This view ended with its kernel; what it showed last stands below.")
        style.value = f"<style>{css()}</style>{self._static.style}"
        show_widget(self._live, "A run in training; this view is live while its kernel runs.")
        self._static.show()
        self.run: RunDirectory | None = None
        """The run shown last."""

    def __call__(self, run: RunDirectory) -> None:
        """Bring the view up to date."""
        self.run = run
        self._show(run)
        self._static.update(run)

    def finish(self) -> None:
        """Replace the live view by static output: the plot and, if the run failed, its summary."""
        clear(self._live)
        run = self.run
        failed = run and run.status in ("failed", "lost")
        self._static.put(
            {"text/html": run_html(run), "text/plain": run_text(run)} if run and failed else _NOTHING,
            plot_bundle(run) if run and run.steps else _NOTHING,
        )


def progress_html(run: RunDirectory) -> str:
    """A run in training: what it is doing, and its figures."""
    now, since = progress(run), elapsed(run)
    doing = html.escape(status_words(run))
    head = f"<p><b>{html.escape(run.name)}</b>: {doing}{f', {since}' if since else ''}</p>"
    if now is None:
        return explain(head) + rendering.bar(0.0)
    held_out = run.held_out
    figures = [
        ("step", f"{now.step:,} / {now.total:,}"),
        ("loss", f"{now.loss:.3f}"),
        ("held-out loss", f"{held_out[-1][1]:.3f}" if held_out else "–"),
        ("tokens/s", f"{now.tokens_per_second:,.0f}"),
        ("training left", duration(now.seconds_left)),
    ]
    rises = f'<p role="status">{html.escape(words)}</p>' if (words := rising(run)) else ""
    return explain(head + rendering.bar(now.step / now.total) + tiles(figures) + rises)


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Figures, each below its label."""
    shown = "".join(
        f"<div><span>{html.escape(label)}</span> <b>{html.escape(value)}</b></div>" for label, value in pairs
    )
    return f'<div class="bn-tiles">{shown}</div>'


def scrolled(page: str) -> str:
    """HTML that may be wide, which keys can scroll where it has the focus."""
    return f'<div tabindex="0" style="overflow-x: auto">{page}</div>'


_COPY: Final = """<button class="jupyter-button widget-button" onclick="
const box = this.closest('{around}').querySelector('{box}'), say = words => {{ this.textContent = words; }};
box.select ? (box.focus(), box.select()) : getSelection().selectAllChildren(box);
const text = box.value ?? this.nextElementSibling.textContent;
(navigator.clipboard ? navigator.clipboard.writeText(text) : Promise.reject())
  .then(() => say('Copied'), () => say('Selected: press Ctrl+C'));">Copy</button>"""


def copy_button(around: str, box: str, text: str = "") -> str:
    """A button that copies what is typed in the box, else the text; where a page may not, the box is left selected.

    `box` is a CSS selector within the element `around` the button. Only the page can write to the clipboard.
    """
    return _COPY.format(around=around, box=box) + (f"<div hidden>{rendering.plain(text)}</div>" if text else "")


def css() -> str:
    """The style of the panel and of a run in a cell."""
    return resources.files("bizassist_nb.notebook.panel").joinpath("panel.css").read_text("utf-8")


def follow(
    stream: Iterable[tuple[list[Comparison], list[Comparison]]],
    live: Any,
    order: tuple[str, str] | None,
    answered: list[Comparison],
) -> None:
    """Show answers in the widget `live` as they grow, nameless if there is an `order`; then add them to `answered`.

    `stream` gives the comparisons that are whole and those that are growing, as `Assistant.each` does. Where an
    interrupt or an error ends it, what there is of them is added.
    """
    done, growing, shown = list[Comparison](), list[Comparison](), 0.0
    try:
        for done, growing in stream:
            found = [*done, *growing]
            if time.monotonic() - shown >= (_TEXT_EVERY if len(found) == 1 else _TABLE_EVERY):
                page = Comparisons(found).page if len(found) > 1 else functools.partial(comparison_html, found[0])
                live.value = blind_html(found[0], order) if order else page(finished=False)
                shown = time.monotonic()
    except BaseException:  # an interrupt, too: what there is of the answers counts, and the error goes on
        answered += [*done, *(one.unfinished() for one in growing if any(one.answers.values()))]
        raise
    answered += [*done, *growing]


def vote_row(vote: Callable[[str], None], post: Callable[[Callable[[], None]], None]) -> Any:
    """Four buttons, and a field in which one key votes; `post` runs what a click or a key asks for."""
    buttons = []
    for choice, words in CHOICES.items():
        button = w.Button(description=words, layout=w.Layout(width="auto"))
        button.on_click(lambda _, choice=choice: post(functools.partial(vote, choice)))
        buttons.append(button)
    key = labelled(w.Text, "vote by key", "the first key typed here is your vote", layout=w.Layout(width="320px"))
    key.placeholder = " · ".join(f"{key} {choice}" for key, choice in KEYS.items())

    def typed(text: str) -> None:
        key.value = ""
        if choice := choice_of(text):
            vote(choice)

    key.observe(lambda change: post(functools.partial(typed, change["new"])), "value")
    return w.Box([*buttons, key], layout=w.Layout(flex_flow="row wrap"))


def show_ballot(ballot: Ballot) -> None:
    """Display a ballot with its buttons. Its vote is on disk before static HTML takes the place of all that."""

    def vote(choice: str) -> None:
        if ballot.vote is None:  # a second click was on its way when the first arrived
            ballot.cast(choice)
            answers.value = ballot._repr_html_()
            update_display({"text/html": answers.value, "text/plain": repr(ballot)}, display_id=view.model_id, raw=True)
            close(view)

    answers = w.HTML(ballot._repr_html_(), layout=w.Layout(width="100%"))
    view = w.VBox([answers, vote_row(vote, lambda act: act())])
    show_widget(view, repr(ballot), answers.value)


def plot_bundle(run: RunDirectory) -> dict[str, str]:
    """The loss plot as a cell's output."""
    from bizassist_nb.results.loss_plot import loss_figure  # matplotlib, which answers do without

    png = base64.b64encode(loss_figure(run)._repr_png_()).decode()
    return {"image/png": png, "text/plain": f"loss curve of {headline(run)}"}


def close(widget: Any) -> None:
    """Close a widget and all widgets in it; the kernel would store them, and what they show, until it ends."""
    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, w.Widget):
                close(part)
    widget.close()


def labelled(kind: Any, name: str, hint: str, **state: Any) -> Any:
    """An input with its label and its tooltip, which ipywidgets 7 calls otherwise."""
    tooltip = "tooltip" if int(w.__version__.partition(".")[0]) >= 8 else "description_tooltip"
    return kind(description=name, **{tooltip: hint}, **state)
