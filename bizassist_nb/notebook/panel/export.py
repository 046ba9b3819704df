"""The Export tab: `bizassist export` in a process of its own, with its progress and its result.

Not in the kernel: a merged model is compared with the tuned assistant, which the chat may be using.
"""

import html
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote

import ipywidgets as w
from jupyter_core.paths import jupyter_runtime_dir

from bizassist_nb.assistant.loaded import unload
from bizassist_nb.core.rendering import duration
from bizassist_nb.notebook.panel.controls import alert, offer
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, in_colab
from bizassist_nb.notebook.views import labelled
from bizassist_nb.results.model_card import parity_words
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory, check_alone
from bizassist_nb.training.launch import child_environment

_EXPORTS: Final = [
    ("a merged 16-bit model", "merged"),
    ("the adapter's folder, with a model card", "adapter"),
    ("the Hugging Face hub (the adapter)", "hub"),
    ("a GGUF file, for llama.cpp and Ollama", "gguf"),
]
_BASES: Final = [("the 4-bit weights it was trained on", "trained"), ("the 16-bit originals of those", "original")]
_NONE: Final = '<p class="bn-muted">No tuned model yet: train one on the Train tab.</p>'
_SHOWN: Final = 4000
"""Bytes read from the end of a process's output."""


class Export:
    """What to export and where to, and the progress."""

    title = "Export"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state = state
        self._job: Job | None = None
        self._run = labelled(w.Dropdown, "run", "the run whose tuned model is exported")
        self._to = labelled(w.Dropdown, "export to", "what the export makes", options=_EXPORTS, value="adapter")
        self._base = labelled(w.Dropdown, "merge into", "the weights that the adapter is merged into", options=_BASES)
        self._repo = labelled(w.Text, "repository", "on the hub; created if there is none", placeholder="OWNER/NAME")
        self._private = labelled(w.Checkbox, "private", "make the repository private")
        self._start = update_loop.button("Export", self._on_start, button_style="primary", icon="download")
        stop = "end the export; the run stays as it is"
        self._cancel = update_loop.button("Cancel", self._on_cancel, icon="stop", tooltip=stop)
        hint = "save it on your own computer; a folder as one .zip"
        self._download = update_loop.button("Download", self._on_download, icon="save", tooltip=hint)
        buttons = w.Box([self._start, self._cancel, self._download]).add_class("bn-buttons")
        form = w.VBox([self._run, self._to, self._base, self._repo, self._private]).add_class("bn-options")
        self._needs, self._status = w.HTML(), w.HTML()
        self._asked: tuple[object, ...] = ()
        self.view = w.VBox([form, self._needs, buttons, self._status])

    def update(self) -> None:
        """Show the runs, the options of the export that is chosen, and its progress."""
        names, to = self._state.tuned, self._to.value
        offer(self._run, names)
        for widget, wanted in ((self._base, to == "merged"), (self._repo, to == "hub"), (self._private, to == "hub")):
            widget.layout.display = None if wanted else "none"
        self._state.exporting = going = self._job is not None and self._job.going
        self._start.disabled = going or not names
        self._cancel.layout.display = None if going else "none"
        done = self._job.result if self._job else None
        self._download.layout.display = None if done and in_colab() else "none"
        asked = (self._state.looked, self._run.value, to, going)
        if asked != self._asked:  # it reads files, of all runs: not at every turn
            self._asked = asked
            self._needs.value = self._needed(self._state.runs[self._run.value], to) if self._run.value else ""
        self._status.value = self._job.html() if self._job else "" if names else _NONE

    def _needed(self, run: RunDirectory, to: str) -> str:
        """What the export takes, and whether the hub's token is there, as HTML."""
        if to == "hub":
            from huggingface_hub import get_token

            return "" if get_token() else alert("You are not logged in: set HF_TOKEN, or run hf auth login")
        counted, size = run.last(records.Parameters), 0
        if to == "adapter":
            size = sum(path.stat().st_size for path in run.adapter.iterdir()) if run.adapter else 0
        elif counted:  # two bytes a weight, once merged and once as GGUF
            size = 2 * (counted.total - counted.trainable) * (2 if to == "gguf" else 1)
        alike = [other for other in self._state.runs.values() if other.model == run.model]
        took = [merge.seconds for other in alike for merge in other.every(records.Merge)] if to != "adapter" else []
        free = shutil.disk_usage(run.path).free
        words = f"It takes about {max(size / 1e9, 0.01):.2f} GB of disk, of {free / 1e9:,.0f} GB free"
        words += f", and about {duration(took[-1])} as the last time" if took else ""
        return f'<p class="bn-muted">{words}.</p>' if free > size else alert(words)

    def _on_download(self) -> None:
        if self._job and (done := self._job.result):
            whole = shutil.make_archive(str(done), "zip", done)
            importlib.import_module("google.colab.files").download(whole)

    def _on_start(self) -> None:
        if self._run.value and not (self._job and self._job.going):
            run = self._state.runs[self._run.value]
            if self._to.value in ("merged", "gguf"):
                check_alone(run.path.parent)
                unload()  # the process loads the base itself
            options = {
                "merged": ["--base", self._base.value],
                "hub": ["--repo", self._repo.value.strip(), *(["--private"] if self._private.value else [])],
            }.get(self._to.value, [])
            self._job = Job(run, self._to.value, options)

    def _on_cancel(self) -> None:
        if self._job:
            self._job.cancel()


class Job:
    """One `bizassist export`, from its start to its result."""

    def __init__(self, run: RunDirectory, to: str, options: list[str]):
        self._run, self._to, self._cancelled = run, to, False
        self._began = time.monotonic()
        self._took: float | None = None
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115 - gone with this job
        where = ["export", run.name, "--runs-dir", str(run.path.parent), "--to", to]
        self._process = subprocess.Popen(  # noqa: S603 - no shell, our own module
            [sys.executable, "-m", "bizassist_nb", *where, *options],
            stdin=subprocess.DEVNULL,
            env=child_environment(),
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,  # interrupting a cell does not interrupt it
        )

    @property
    def going(self) -> bool:
        """Whether the process still runs."""
        if self._took is None and self._process.poll() is not None:
            self._took = time.monotonic() - self._began
        return self._took is None

    @property
    def result(self) -> Path | None:
        """The folder that it has made; None for an upload, and before it has ended well."""
        made = not self.going and not self._cancelled and not self._process.returncode and self._to != "hub"
        return Path(_end(self._out)) if made else None

    def cancel(self) -> None:
        """End it; the next export of this run deletes its unfinished files."""
        self._cancelled = True
        os.killpg(self._process.pid, signal.SIGTERM)  # with any processes that it has started

    def html(self) -> str:
        """Its progress, or its result."""
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
        where = html.escape(_end(self._out))
        link = f'<a href="{where}" target="_blank" rel="noopener">{where}</a>'
        place = link if self._to == "hub" else f"<code>{where}</code>"
        result = f"<p>✓ {name} is in {place} ({duration(self._took or 0)}).</p>{_links(self.result)}"
        merged = self._run.last(records.Merge)
        verdict = parity_words(merged.parity) if merged and self._to in ("merged", "gguf") else ""
        return f'<div role="status">{result}<p>{html.escape(verdict)}</p></div>'


def _links(folder: Path | None) -> str:
    """Links to the files of a folder, where the notebook server that has started this kernel shows them."""
    server = Path(jupyter_runtime_dir()) / f"jpserver-{os.environ.get('JPY_PARENT_PID', '')}.json"
    try:
        known = json.loads(server.read_text("utf-8"))
        files = sorted(file.absolute().relative_to(known["root_dir"]) for file in folder.iterdir()) if folder else []
    except (OSError, ValueError, KeyError):  # another front end, or a folder that the server does not show
        return ""
    places = [(file.name, f"{known['base_url']}files/{quote(file.as_posix())}?download=1") for file in files]
    links = [f'<li><a href="{html.escape(place)}" download>{html.escape(name)}</a></li>' for name, place in places]
    return f"<ul>{''.join(links)}</ul>"


def _end(file: IO[bytes]) -> str:
    """The end of the file, read without moving its position, which the writing process shares."""
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), _SHOWN, max(0, size - _SHOWN)).decode("utf-8", "replace").strip()
