"""The Export tab: what `bizassist export` makes of a run, in a process of its own, with its progress and its verdict.

Not in the kernel: a merged model is compared with the tuned assistant, which the chat may be using.
"""

import html
import os
import signal
import subprocess
import sys
import tempfile
import time
from typing import IO, Final, get_args

import ipywidgets as w

from bizassist_nb.api import Run
from bizassist_nb.assistant.loaded import unload
from bizassist_nb.core.rendering import duration
from bizassist_nb.notebook.panel.controls import tip
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked
from bizassist_nb.results.model_card import parity_words
from bizassist_nb.runs.run import RunDirectory

_WORDS: Final = {
    "adapter": "the adapter's folder, with a model card",
    "merged": "a merged 16-bit model",
    "gguf": "a GGUF file, for llama.cpp and Ollama",
    "hub": "the Hugging Face hub (the adapter)",
}
_BASES: Final = [("the 4-bit weights it was trained on", "trained"), ("the 16-bit originals of those", "original")]
_NONE: Final = '<p class="bn-muted">No tuned model yet: train one on the Train tab.</p>'
_SHOWN: Final = 4000
"""Bytes of a process's output, from its end, that are looked at."""


class Export:
    """What to export and where to, and how far it is."""

    title = "Export"

    def __init__(self, state: State, update_loop: UpdateLoop):
        """Build the widgets."""
        self._state = state
        self._job: Job | None = None
        self._run = w.Dropdown(description="run", **tip("the run whose tuned model is exported"))
        self._to = w.Dropdown(
            options=[(_WORDS[to], to) for to in get_args(Run.export.__annotations__["to"])],
            value="adapter",
            description="export to",
            **tip("what is made of it"),
        )
        self._base = w.Dropdown(
            options=_BASES, description="merge into", **tip("the weights that the adapter is folded into")
        )
        self._repo = w.Text(description="repository", placeholder="OWNER/NAME", **tip("of the hub; made if need be"))
        self._private = w.Checkbox(description="private", **tip("make the repository private"))
        self._start = w.Button(description="Export", button_style="primary", icon="download")
        self._cancel = w.Button(description="Cancel", icon="stop", tooltip="end the export; the run stays as it is")
        clicked(self._start, update_loop, self._on_start)
        clicked(self._cancel, update_loop, self._on_cancel)
        buttons = w.Box([self._start, self._cancel])
        buttons.add_class("bn-buttons")
        self._form = w.VBox([self._run, self._to, self._base, self._repo, self._private])
        self._form.add_class("bn-options")
        self._status = w.HTML()
        self.view = w.VBox([self._form, buttons, self._status])

    def update(self) -> None:
        """Show what can be chosen, and how far the export is."""
        names, to = self._state.tuned, self._to.value
        if list(self._run.options) != names:
            chosen = self._run.value
            self._run.options = names
            self._run.value = chosen if chosen in names else next(iter(names), None)
        for widget, wanted in ((self._base, to == "merged"), (self._repo, to == "hub"), (self._private, to == "hub")):
            widget.layout.display = None if wanted else "none"
        going = self._job is not None and self._job.going
        self._state.exporting = going
        self._start.disabled = going or not names
        self._cancel.layout.display = None if going else "none"
        self._status.value = self._job.html() if self._job else "" if names else _NONE

    def _on_start(self) -> None:
        if self._run.value and not (self._job and self._job.going):
            unload()  # the process loads the base itself
            self._job = Job(self._state.runs[self._run.value], self._to.value, self._options())

    def _on_cancel(self) -> None:
        if self._job:
            self._job.cancel()

    def _options(self) -> list[str]:
        if self._to.value == "merged":
            return ["--base", self._base.value]
        if self._to.value == "hub":
            return ["--repo", self._repo.value.strip(), *(["--private"] if self._private.value else [])]
        return []


class Job:
    """One `bizassist export`, from its start to its result."""

    def __init__(self, run: RunDirectory, to: str, options: list[str]):
        """Start it."""
        self._run, self._to, self._cancelled = run, to, False
        self._began = time.monotonic()
        self._took: float | None = None
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - gone with this job
        where = ["export", run.name, "--runs-dir", str(run.path.parent), "--to", to]
        self._process = subprocess.Popen(  # noqa: S603 - no shell, our own module
            [sys.executable, "-m", "bizassist_nb", *where, *options],
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # interrupting a cell is not meant for it
        )

    @property
    def going(self) -> bool:
        """Whether it is still at work."""
        if self._took is None and self._process.poll() is not None:
            self._took = time.monotonic() - self._began
        return self._took is None

    def cancel(self) -> None:
        """End it; the next export of this run clears away what it left half done."""
        self._cancelled = True
        os.killpg(self._process.pid, signal.SIGTERM)  # with what it may have started itself

    def html(self) -> str:
        """How far it is, or what came of it."""
        name = f"<b>{html.escape(self._run.name)}</b>"
        said = _end(self._err)
        if self.going:
            doing = next(reversed(said.replace("\r", "\n").split("\n")), "") or "starting"
            since = duration(time.monotonic() - self._began)
            return f'<p role="status">{name}: {html.escape(doing)} … ({since})</p>'
        if self._cancelled:
            return f'<p role="status">{name}: the export was cancelled.</p>'
        if self._process.returncode:
            _, ours, error = said.rpartition("bizassist: ")
            words = error if ours else f"the export ended with status {self._process.returncode}:\n{said}"
            return f'<div class="bn-alert" role="alert">⚠ {name}: <pre>{html.escape(words)}</pre></div>'
        result = f"<p>✓ {name} is in <code>{html.escape(_end(self._out))}</code> ({duration(self._took or 0)}).</p>"
        merged = self._run.last("merge")
        verdict = parity_words(merged["parity"]) if merged and self._to in ("merged", "gguf") else ""
        return f'<div role="status">{result}<p>{html.escape(verdict)}</p></div>'


def _end(file: IO[bytes]) -> str:
    """The end of what was written to it; the writer's place in it, which is ours too, stays where it is."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), _SHOWN, max(0, size - _SHOWN)).decode("utf-8", "replace").strip()
