"""Jupyter front ends, driven by Playwright in Debian's Chromium. Everything is on 127.0.0.1."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import nbformat
import worker_forks
from playwright.sync_api import Browser, Locator, Page, sync_playwright

COLAB_PYTHON = os.environ.get("COLAB_PYTHON", str(Path(__file__).parents[2] / ".venv-colab/bin/python"))
"""Python with Colab's front end, as `make test` installs it."""
OLDER_KERNEL = Path(sys.prefix) / "ipykernel-7.3.0"
"""The same for ipykernel 7.3, which runs callbacks on other threads than the newest."""
_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
              "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
              "--disable-features=OverlayScrollbar"]  # fmt: skip
# Off-screen cells have no elements with windowing, and news would reach out of the machine.
_SETTINGS: dict[str, dict[str, Any]] = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}


class Server:
    """A front end's server, with a home of its own."""

    def __init__(
        self,
        kind: str,
        root: Path,
        *,
        python: str = sys.executable,
    ):
        """`kind` is "lab", "notebook" (7) or "classic" (notebook 6)."""
        self.kind, self.root = kind, root
        self.home = Path(tempfile.mkdtemp(prefix="front-end-"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.token = secrets.token_hex(16)
        for name, values in _SETTINGS.items():
            path = self.home / "lab-settings" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        module = {"lab": "jupyterlab", "notebook": "notebook", "classic": "notebook"}[kind]
        app = "NotebookApp" if kind == "classic" else "ServerApp"
        token = f"--NotebookApp.token={self.token}" if kind == "classic" else f"--IdentityProvider.token={self.token}"
        command = [python, "-m", module, "--no-browser", "--allow-root", f"--{app}.ip=127.0.0.1",
                   f"--{app}.port={self.port}", f"--{app}.port_retries=0", token]  # fmt: skip
        command += [f"--NotebookApp.notebook_dir={root}"] if kind == "classic" else [
            f"--ServerApp.root_dir={root}", "--expose-app-in-browser"
        ]  # fmt: skip
        self.log = self.home / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env={
                    **os.environ, **_homes(self.home), **worker_forks.ipython_profile(self.home / "ipython"),
                    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
                },
            )  # fmt: skip
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/api", timeout=2).read()  # noqa: S310 - our own server
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.15)
            else:
                return
        self.stop()
        raise RuntimeError(f"{self.kind} did not start")

    def stop(self) -> None:
        """By its own process id; it shuts its kernels down."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        shutil.rmtree(self.home, ignore_errors=True)

    def notebook(self, name: str, cells: list[str], kernel: str = "python3") -> str:
        """Write a notebook; its name."""
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
        nbformat.write(book, self.root / name)
        return name

    def older_kernel(self) -> str:
        """Add a kernel with ipykernel 7.3; its name."""
        folder = self.home / "jupyter_data_dir" / "kernels" / "older"
        folder.mkdir(parents=True)
        path = os.pathsep.join([str(OLDER_KERNEL), os.environ.get("PYTHONPATH", "")])
        spec = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": "older",
            "language": "python",
            "env": {"PYTHONPATH": path},
        }
        (folder / "kernel.json").write_text(json.dumps(spec))
        return "older"


def _homes(home: Path) -> dict[str, str]:
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    named = {"JUPYTERLAB_SETTINGS_DIR": "lab-settings", "JUPYTERLAB_WORKSPACES_DIR": "lab-workspaces"}
    return {name: str(home / name.lower()) for name in folders} | {k: str(home / v) for k, v in named.items()}


@contextlib.contextmanager
def serving(kind: str, root: Path, **options: Any) -> Iterator[Server]:
    """A server for as long as it is wanted."""
    server = Server(kind, root, **options)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser."""
    path = machine.chromium()  # before Playwright begins: it may be asked for its own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=_ARGUMENTS, ignore_default_args=["--hide-scrollbars"]
        )
        yield browser
        browser.close()


class Book:
    """A notebook open in a browser."""

    def __init__(self, browser: Browser, server: Server, name: str, *, width: int = 1400, height: int = 1000):
        self.server, self.name = server, name
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.context.set_default_timeout(60_000)
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.open()

    @property
    def panel(self) -> Locator:
        """The panel (the last one shown)."""
        return self.page.locator(".bizassist").last

    def open(self) -> None:
        base, token = self.server.url, self.server.token
        place = {"lab": f"lab/tree/{self.name}?reset&token={token}"}.get(
            self.server.kind, f"notebooks/{self.name}?token={token}"
        )
        self.page.goto(f"{base}/{place}")
        self._ready()

    def _ready(self) -> None:
        if self.server.kind == "classic":
            self.page.wait_for_function("window.Jupyter?.notebook?.kernel?.is_connected?.()")
        else:
            self.page.wait_for_selector(".jp-Notebook .jp-Cell")
            self.page.wait_for_function(f"{_LAB_STATUS} === 'idle'", timeout=60_000)

    def reload(self) -> None:
        self.page.reload()
        self._ready()

    def run(self, index: int, *, wait: bool = True) -> None:
        """Run a cell."""
        if self.server.kind == "classic":
            self.page.evaluate("i => Jupyter.notebook.execute_cells([i])", index)
            done = "i => !Jupyter.notebook.get_cell(i).element.hasClass('running')"
        else:
            self.page.evaluate(
                f"i => {{ const nb = {_LAB_BOOK}; nb.content.activeCellIndex = i; nb.content.deselectAll();"
                " window.jupyterapp.commands.execute('notebook:run-cell'); }",
                index,
            )
            done = (
                "i => /\\[\\d+\\]/.test(document.querySelectorAll('.jp-Notebook .jp-Cell')[i]"
                ".querySelector('.jp-InputPrompt').textContent)"
            )
        if wait:
            self.page.wait_for_timeout(200)
            self.page.wait_for_function(done, arg=index, timeout=120_000)

    def save(self) -> None:
        if self.server.kind == "classic":
            self.page.evaluate("Jupyter.notebook.save_notebook()")
            self.page.wait_for_timeout(500)
        else:
            self.page.evaluate(f"{_LAB_BOOK}.context.save()")

    def restart(self) -> None:
        """Restart the kernel."""
        self.page.evaluate(f"{_LAB_BOOK}.sessionContext.session.kernel.restart()")
        self._ready()

    def theme(self, name: str) -> None:
        """JupyterLab's "light" or "dark"."""
        theme = f"JupyterLab {name.title()}"
        self.page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', { theme })", theme)
        self.page.wait_for_function("name => document.body.dataset.jpThemeLight === String(name === 'light')", arg=name)
        self.page.wait_for_timeout(300)

    def picture(self, path: Path) -> None:
        """What is seen of the panel, without the front end around it."""
        box, size = self.panel.bounding_box(), self.page.viewport_size
        assert box is not None
        assert size is not None
        top, foot = max(box["y"], 80), 30  # JupyterLab's bars
        height = min(box["y"] + box["height"], size["height"] - foot) - top
        self.page.screenshot(path=path, clip={"x": box["x"], "y": top, "width": box["width"], "height": height})

    def close(self) -> None:
        self.context.close()

    # The panel, as a person uses it.

    def show(self) -> None:
        """Run the first two cells, which show the panel."""
        for cell in range(2):
            self.run(cell)
        self.see("name of the run")

    def tab(self, name: str) -> None:
        self.panel.get_by_role("tab", name=name).or_(
            self.panel.locator(".p-TabBar-tabLabel", has_text=name)
        ).first.click()

    def press(self, label: str) -> None:
        """Click a button once it is enabled."""
        exactly = re.compile(rf"^\s*{re.escape(label)}\s*$")
        self.panel.locator("button", has_text=exactly).locator("visible=true").first.click()

    def fill(self, label: str, value: object) -> None:
        """Type into the input of that label, as a person would."""
        box = self.panel.get_by_label(label, exact=True).locator("visible=true").first
        box.fill(str(value))
        box.press("Tab")

    def choose(self, label: str, value: str) -> None:
        self.panel.get_by_label(label, exact=True).first.select_option(value)

    def unfold(self, title: str) -> None:
        """Show what is folded away, or hide it."""
        self.press(title)

    def see(self, text: str, *, timeout: float = 60) -> None:
        """Wait until the panel shows that text."""
        self.panel.get_by_text(text).locator("visible=true").first.wait_for(timeout=timeout * 1000)

    def text(self) -> str:
        return "".join(self.page.locator(".bizassist").all_inner_texts()[-1:])


_LAB_BOOK = "[...window.jupyterapp.shell.widgets('main')].find(w => w.content?.widgets && w.sessionContext)"
_LAB_STATUS = f"{_LAB_BOOK}?.sessionContext?.session?.kernel?.status"
