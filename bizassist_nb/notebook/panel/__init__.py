"""The panel: everything that can be done with a run, without typing code. Each tab is a class and a line in `TABS`."""

import asyncio
import base64
import html
from collections.abc import Iterator
from importlib import resources
from typing import Any, Final, Protocol

import ipywidgets as w
from IPython.display import display

from bizassist_nb.core.errors import BizassistError
from bizassist_nb.notebook.panel.chat import Chat
from bizassist_nb.notebook.panel.export import Export
from bizassist_nb.notebook.panel.preview import Preview
from bizassist_nb.notebook.panel.runs import Runs
from bizassist_nb.notebook.panel.state import State, over
from bizassist_nb.notebook.panel.train import Train
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked, in_colab
from bizassist_nb.results import summary
from bizassist_nb.runs.run import RunDirectory

TABS: Final = (Train, Preview, Chat, Runs, Export)
_FALLBACK: Final = "The bizassist panel is live only while its kernel runs: run %bizassist to bring it back."


class Tab(Protocol):
    """One tab: built with (state, pump); `update` is called by the pump alone, and alone writes the tab's widgets."""

    title: str
    view: w.Widget

    def update(self) -> None:
        """Bring the view up to date."""


class Panel:
    """The panel of a folder of runs; show it as often as you like, in any number of cells."""

    def __init__(self, runs_dir: str = "runs"):
        """Build it; nothing runs before it is shown."""
        self._state = State(runs_dir)
        self._update_loop = UpdateLoop(
            self._update, working=lambda: self._state.working, following=lambda: self._state.following
        )
        self._tabs: list[Tab] = [tab(self._state, self._update_loop) for tab in TABS]
        self._problem = w.HTML()
        tabs = w.Tab([tab.view for tab in self._tabs])
        for i, tab in enumerate(self._tabs):
            tabs.set_title(i, tab.title)
        refresh = w.Button(description="Refresh", icon="refresh", tooltip="bring what is shown up to date")
        clicked(refresh, self._update_loop, lambda: None)  # whatever is posted brings the views up to date
        head = w.Box([w.HTML("<h2>bizassist</h2>"), refresh])
        head.add_class("bn-head")
        self._view = w.VBox([w.HTML(f"<style>{_css()}</style>"), head, self._problem, tabs])
        self._view.add_class("bizassist")
        self._kept = Kept(self._view.model_id)
        if in_colab():  # where no task of the kernel's looks at the controls all the time
            for control in _controls(self._view):
                control.observe(lambda _: self._update_loop.post(lambda: None), "value")

    def show(self) -> None:
        """Show it in this cell.

        Raises:
            BizassistError: where there is no notebook to show it in.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise BizassistError(
                "the panel is shown in a notebook (JupyterLab, Notebook, Colab), and this is none; "
                "in a terminal, use the command line: bizassist --help"
            ) from None
        display(
            {
                "application/vnd.jupyter.widget-view+json": {
                    "version_major": 2,
                    "version_minor": 0,
                    "model_id": self._view.model_id,
                },
                "text/html": f"<i>{html.escape(_FALLBACK)}</i>",
                "text/plain": _FALLBACK,
            },
            raw=True,
        )
        self._kept.show()
        self._update_loop.start()

    def _ipython_display_(self) -> None:
        self.show()

    def _update(self) -> None:
        self._state.look()
        problem = html.escape(self._update_loop.problem or self._state.problem)
        self._problem.value = f'<div class="bn-alert" role="alert">⚠ {problem}</div>' if problem else ""
        for tab in self._tabs:
            tab.update()
        run = self._state.followed
        if run and over(run):
            self._kept.keep(run)


class Kept:
    """The last run's plot and summary as outputs of their own, which a saved notebook shows without a kernel."""

    def __init__(self, name: str):
        """`name` tells this panel's outputs from others'."""
        self._ids = (f"bizassist-plot-{name}", f"bizassist-summary-{name}")
        self._data: list[dict[str, Any]] = [{"text/html": ""}, {"text/html": ""}]
        self._of: tuple[object, ...] = ()

    def show(self) -> None:
        """Make room for them in this cell."""
        for data, name in zip(self._data, self._ids, strict=True):
            display(data, raw=True, display_id=name)

    def keep(self, run: RunDirectory) -> None:
        """Put this run, which has ended, in them, if it is not there already."""
        of = (run.path, run.status, len(run.events))
        if of == self._of:
            return
        self._of = of
        plot = run.path / "loss.png"
        png = {"image/png": base64.b64encode(plot.read_bytes()).decode()} if plot.is_file() else {"text/html": ""}
        self._data = [
            {**png, "text/plain": summary.headline(run)},
            {"text/html": _kept_html(run), "text/plain": summary.run_text(run)},
        ]
        for data, name in zip(self._data, self._ids, strict=True):
            display(data, raw=True, display_id=name, update=True)


def _kept_html(run: RunDirectory) -> str:
    return f'<div class="bn-kept">{summary.run_html(run)}</div>'


def _css() -> str:
    return resources.files(__package__).joinpath("panel.css").read_text("utf-8")


def _controls(widget: Any) -> Iterator[Any]:
    """The widgets in it that a person gives a value."""
    if hasattr(widget, "children"):
        for child in widget.children:
            yield from _controls(child)
    elif hasattr(widget, "value") and not isinstance(widget, w.HTML):
        yield widget
