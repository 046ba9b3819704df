"""The panel: everything that can be done with a run, without code. Each tab is a class, listed in `TABS`."""

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import ipywidgets as w

from bizassist_nb.core.errors import BizassistError
from bizassist_nb.core.settings import user_path
from bizassist_nb.notebook.panel.chat import Chat
from bizassist_nb.notebook.panel.controls import alert
from bizassist_nb.notebook.panel.export import Export
from bizassist_nb.notebook.panel.preview import Preview
from bizassist_nb.notebook.panel.runs import Runs
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.train import Train
from bizassist_nb.notebook.panel.update_loop import UpdateLoop
from bizassist_nb.notebook.views import StaticOutputs, close, css, show_widget

TABS: Final[tuple[Any, ...]] = (Train, Preview, Chat, Runs, Export)
"""Each is built with (state, update loop) and has a `title`, a `view`, and `update`, which alone writes its widgets."""
_FALLBACK: Final = "The bizassist panel is live only while its kernel runs: run %bizassist to bring it back."
_FOR_SCREEN_READERS: Final = """
const panel = this.closest('.bizassist'), mend = () => {
  panel.querySelectorAll('[role=slider]').forEach(
    e => e.ariaLabel ||= e.closest('.widget-inline-hbox').querySelector('label').textContent);
  panel.querySelectorAll('.bn-newest > .widget-html-content').forEach(e => e.ariaLive ||= 'polite'); };
mend();
new MutationObserver(mend).observe(panel, { childList: true, subtree: true });"""
"""ipywidgets gives the handle of a slider no name, and no widget can say that it is read out when it changes."""

# What a thread logs is printed into whichever cell is at work: the hub's "Retrying in 1s", whose error the panel shows.
logging.getLogger("huggingface_hub.utils._http").addFilter(
    lambda record: not (record.threadName or "").startswith("bizassist-")
)


class Panel:
    """The panel of a folder of runs; show it as often as you like, in any number of cells.

    There is one a folder: a new one closes the one before.
    """

    def __init__(self, runs_dir: str = "runs"):
        """Build it; nothing runs before it is shown."""
        self.state = State(runs_dir)
        self.update_loop = UpdateLoop(self.state)
        self.tabs: list[Any] = [tab(self.state, self.update_loop) for tab in TABS]
        self._problem = w.HTML()
        tabs = w.Tab([tab.view for tab in self.tabs])
        for i, tab in enumerate(self.tabs):
            tabs.set_title(i, tab.title)
        hint = "bring the panel up to date"
        refresh = self.update_loop.button("Refresh", self.state.refresh, icon="refresh", tooltip=hint)
        head = w.Box([w.HTML("<h2>bizassist</h2>"), refresh]).add_class("bn-head")
        style = w.HTML()
        self.view = w.VBox([style, head, self._problem, tabs]).add_class("bizassist")
        self._static = StaticOutputs(self.view, _FALLBACK)
        style.value = f'<style onload="{_FOR_SCREEN_READERS}">{css()}</style>{self._static.style}'
        tabs_updates = [tab.update for tab in self.tabs]
        self.update_loop.updates = [self.state.look, *tabs_updates, self._update_static, self._show_problems]
        for control in _controls(self.view):
            control.observe(lambda _: self.update_loop.wake(), "value")
        self._folder = user_path(runs_dir).absolute()
        if before := _open.pop(self._folder, None):
            before.close()
        _open[self._folder] = self

    @classmethod
    def of(cls, runs_dir: str) -> "Panel":
        """The open panel of that folder, or a new one."""
        return _open.get(user_path(runs_dir).absolute()) or cls(runs_dir)

    def close(self) -> None:
        """Close its widgets and end its loop; runs and exports go on."""
        if _open.get(self._folder) is self:
            del _open[self._folder]
        self.update_loop.end()
        self.state.watch.want(None)
        close(self.view)

    def show(self) -> None:
        """Show it in this cell.

        Raises:
            BizassistError: outside a notebook, or once it is closed.
        """
        if _open.get(self._folder) is not self:
            raise BizassistError("this panel is closed; show that of its folder with %bizassist, or make a new Panel")
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise BizassistError(
                "the panel can only be shown in a notebook (JupyterLab, Notebook, Colab); "
                "in a terminal, use the command line: bizassist --help"
            ) from None
        show_widget(self.view, _FALLBACK)
        self._static.show()
        self.update_loop.start()

    _ipython_display_ = show

    def _update_static(self) -> None:
        if run := self.state.followed:
            self._static.update(run)

    def _show_problems(self) -> None:
        problems = dict.fromkeys(filter(None, [*self.update_loop.problems, self.state.problem]))
        self._problem.value = "".join(map(alert, problems))


_open: Final[dict[Path, Panel]] = {}
"""The panels that are not closed, by folder."""


def _controls(widget: Any) -> Iterator[Any]:
    """All widgets within this one in which a person sets a value."""
    if hasattr(widget, "children"):
        for child in widget.children:
            yield from _controls(child)
    elif hasattr(widget, "value") and not isinstance(widget, w.HTML):
        yield widget
