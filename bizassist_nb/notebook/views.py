"""What a cell shows: live through one widget while its loop runs, static HTML and PNG when it ends.

A widget survives a reload of the page, which display updates do not; static output survives everything else.
Only the cell's own loop writes to it: Colab drops what other threads send (googlecolab/colabtools#3373).
"""

import base64
import html
import time
from collections.abc import Iterable
from typing import Any, Final

from IPython.display import clear_output, display

from bizassist_nb.assistant.comparison import Comparison, comparison_html
from bizassist_nb.results.ballot import blind_html
from bizassist_nb.results.loss_plot import loss_png
from bizassist_nb.results.summary import headline, run_html, run_text
from bizassist_nb.runs.run import RunDirectory

_PLOT_EVERY: Final = 1.0
"""Seconds between redraws of the plot."""
_TEXT_EVERY: Final = 0.1
"""Seconds between updates of streaming answers: smooth to the eye, and few messages."""


class TrainingView:
    """A run in training, in one widget; call it with the run as often as you like."""

    def __init__(self) -> None:
        """Show an empty view."""
        self._live = _LiveHtml("A run in training; this view is live while its kernel runs.")
        self._plot = ""
        self._plotted: tuple[float, int] = (0.0, -1)
        self.run: RunDirectory | None = None
        """What was shown last."""

    def __call__(self, run: RunDirectory) -> None:
        """Bring the view up to date."""
        self.run = run
        shapes = len(run.steps) + len(run.held_out)
        if shapes != self._plotted[1] and time.monotonic() - self._plotted[0] >= _PLOT_EVERY and shapes:
            self._plot = _inline_png(loss_png(run), "loss against step")
            self._plotted = (time.monotonic(), shapes)
        self._live.show(run_html(run) + self._plot)

    def finish(self) -> None:
        """Replace the live view by static output: the plot, and for a run that failed what it was."""
        self._live.close()
        run = self.run
        if run and run.steps:
            png = base64.b64encode(loss_png(run)).decode()
            display({"image/png": png, "text/plain": f"loss curve of {headline(run)}"}, raw=True)
        if run and run.status in ("failed", "lost"):
            display({"text/html": run_html(run), "text/plain": run_text(run)}, raw=True)


class AnswerView:
    """Answers as they come, in adjacent columns."""

    def __init__(self, order: tuple[str, str] | None = None) -> None:
        """Show an empty view; with an `order`, the answers stand in it, and without names."""
        self._order = order
        self._live = _LiveHtml("Answers, while they are written.")
        self._shown = 0.0

    def __call__(self, comparison: Comparison) -> None:
        """Bring the view up to date, not more often than the eye can follow."""
        if time.monotonic() - self._shown >= _TEXT_EVERY:
            named = comparison_html(comparison, finished=False)
            self._live.show(blind_html(comparison, self._order) if self._order else named)
            self._shown = time.monotonic()

    def follow(self, stream: Iterable[Comparison]) -> Comparison:
        """Show a stream of answers to its end; the whole one."""
        comparison = None
        for comparison in stream:
            self(comparison)
        assert comparison is not None  # a stream begins with empty answers
        return comparison

    def wait(self, text: str) -> None:
        """Say what is being waited for."""
        self._live.show(f"<i>{html.escape(text)}</i>")

    def finish(self) -> None:
        """Take the live view away; the cell's value is the static one."""
        self._live.close()


class _LiveHtml:
    """One HTML widget; what is put in it has been escaped or cleaned."""

    def __init__(self, fallback: str):
        import ipywidgets

        self._widget: Any = ipywidgets.HTML()
        display(widget_bundle(self._widget, f"<i>{html.escape(fallback)}</i>", fallback), raw=True)

    def show(self, content: str) -> None:
        if self._widget.value != content:
            self._widget.value = content

    def close(self) -> None:
        clear_output()
        close(self._widget)


def close(widget: Any) -> None:
    """Let go of a widget with all that belongs to it: a kernel keeps it, and what it shows, for as long as it lives."""
    import ipywidgets

    for value in widget.trait_values().values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, ipywidgets.Widget):
                close(part)
    widget.close()


def widget_bundle(widget: Any, html_without: str, text: str) -> dict[str, Any]:
    """A widget as a cell's output, with what a notebook shows that is reopened without its widgets."""
    view = {"version_major": 2, "version_minor": 0, "model_id": widget.model_id}
    return {"application/vnd.jupyter.widget-view+json": view, "text/html": html_without, "text/plain": text}


def _inline_png(png: bytes, text: str) -> str:
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
