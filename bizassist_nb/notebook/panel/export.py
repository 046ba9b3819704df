"""The Export tab: `bizassist export` in a process of its own, with its progress and its result.

Not in the kernel: a merged model is compared with the tuned assistant, which the chat may be using.
"""

import fcntl
import html
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final
from urllib.parse import quote

import ipywidgets as w
from jupyter_core.paths import jupyter_runtime_dir

from bizassist_nb.assistant.loaded import unload
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.files import try_lock, write_json
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
_JOB: Final = "export.json"
"""Which export it is, in the folder of its state; `out` and `err` are what its process prints."""


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
        update_loop.post(self._find)

    def update(self) -> None:
        """Show the runs, the options of the export that is chosen, and its progress."""
        names, to = self._state.tuned, self._to.value
        offer(self._run, names)
        for widget, wanted in ((self._base, to == "merged"), (self._repo, to == "hub"), (self._private, to == "hub")):
            widget.layout.display = None if wanted else "none"
        self._state.exporting = going = self._job is not None and self._job.going
        self._start.disabled = going or not names
        self._cancel.layout.display = None if going else "none"
        done = in_colab() and self._job is not None and Path(self._job.result or "-").exists()
        self._download.layout.display = None if done else "none"
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

    def _find(self) -> None:
        """Show the export that another kernel has begun and that still runs, if there is one."""
        place = self._state.exports
        if (place / _JOB).is_file() and (job := Job(place)).going:
            self._job = job

    def _on_download(self) -> None:
        if self._job and (done := self._job.result):
            whole = shutil.make_archive(done, "zip", done)
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
            self._job = Job.begin(self._state.exports, run, self._to.value, options)

    def _on_cancel(self) -> None:
        if self._job:
            self._job.cancel()


class Job:
    """One `bizassist export`, from its start to its result, in a process that outlives this kernel.

    The process holds a lock (flock) on what it prints to, so any kernel of this machine sees whether it still runs.
    """

    def __init__(self, place: Path, process: "subprocess.Popen[bytes] | None" = None):
        """The export whose state is in that folder, with its process if this kernel has begun it."""
        state = json.loads((place / _JOB).read_text("utf-8"))
        self._run, self._to, self._began = RunDirectory(Path(state["run"])), state["to"], state["began"]
        self._group, self._process = state["process"], process
        self._out, self._err = place / "out", place / "err"
        self._ended: tuple[float, str, str] | None = None
        """Seconds it took, and the ends of what it printed; the files are those of the next export then."""
        self._cancelled = False

    @classmethod
    def begin(cls, place: Path, run: RunDirectory, to: str, options: list[str]) -> "Job":
        """Begin an export, whose state is kept in that folder.

        Raises:
            RunError: if another kernel's export of a run of this folder still runs.
        """
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bizassist_nb", "export", run.name, "--runs-dir", str(run.path.parent)]
        with (place / "out").open("ab") as out, (place / "err").open("ab") as err:
            if not try_lock(out.fileno(), fcntl.LOCK_EX):
                raise RunError("another kernel's export of a run in this folder still runs; wait for it")
            out.truncate(0)
            err.truncate(0)
            (place / _JOB).unlink(missing_ok=True)
            process = subprocess.Popen(  # noqa: S603 - no shell, our own module
                [*command, "--to", to, *options],
                stdin=subprocess.DEVNULL,
                env=child_environment(),
                stdout=out,
                stderr=err,
                start_new_session=True,  # interrupting a cell does not interrupt it
            )
        state = {"run": str(run.path.absolute()), "to": to, "began": time.time(), "process": process.pid}
        write_json(place / _JOB, state)
        return cls(place, process)

    @property
    def going(self) -> bool:
        """Whether the process still runs."""
        if self._ended is None:
            with self._out.open("rb") as out:
                ended = try_lock(out.fileno(), fcntl.LOCK_SH)
            if ended and (self._process is None or self._process.poll() is not None):
                self._ended = time.time() - self._began, _end(self._out), _end(self._err)
        return self._ended is None

    @property
    def result(self) -> str:
        """The folder, or the address on the hub, that it has made; empty before it has ended well."""
        made = self._ended[1] if self._ended and not self._cancelled else ""
        return made if self._to == "hub" or (made and Path(made).exists()) else ""

    def cancel(self) -> None:
        """End it; the next export of this run deletes its unfinished files."""
        if self.going:
            self._cancelled = True
            os.killpg(self._group, signal.SIGTERM)  # with any processes that it has started

    def html(self) -> str:
        """Its progress, or its result."""
        name = f"<b>{html.escape(self._run.name)}</b>"
        if self.going or self._ended is None:
            doing = _end(self._err).replace("\r", "\n").rpartition("\n")[2] or "starting"
            since = duration(time.time() - self._began)
            return f'<p role="status">{name}: {html.escape(doing)} … ({since})</p>'
        if self._cancelled:
            return f'<p role="status">{name}: the export was cancelled.</p>'
        took, _, said = self._ended
        if not self.result:
            _, ours, error = said.rpartition("bizassist: ")
            words = error if ours else f"the export ended without a result:\n{said}"
            return f'<div class="bn-alert" role="alert">⚠ {name}: <pre>{html.escape(words)}</pre></div>'
        where = html.escape(self.result)
        link = f'<a href="{where}" target="_blank" rel="noopener">{where}</a>'
        place = link if self._to == "hub" else f"<code>{where}</code>"
        result = f"<p>✓ {name} is in {place} ({duration(took)}).</p>{_links(Path(self.result))}"
        merged = self._run.last(records.Merge)
        verdict = parity_words(merged.parity) if merged and self._to in ("merged", "gguf") else ""
        return f'<div role="status">{result}<p>{html.escape(verdict)}</p></div>'


def _links(folder: Path) -> str:
    """Links to the files of a folder, where the notebook server that has started this kernel shows them."""
    server = Path(jupyter_runtime_dir()) / f"jpserver-{os.environ.get('JPY_PARENT_PID', '')}.json"
    try:
        known = json.loads(server.read_text("utf-8"))
        files = sorted(file.absolute().relative_to(known["root_dir"]) for file in folder.iterdir())
    except (OSError, ValueError, KeyError):  # another front end, or a folder that the server does not show
        return ""
    places = [(file.name, f"{known['base_url']}files/{quote(file.as_posix())}?download=1") for file in files]
    links = [f'<li><a href="{html.escape(place)}" download>{html.escape(name)}</a></li>' for name, place in places]
    return f"<ul>{''.join(links)}</ul>"


def _end(file: Path) -> str:
    return file.read_bytes()[-_SHOWN:].decode("utf-8", "replace").strip()
