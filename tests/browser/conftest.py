"""Servers and the browser, once a session; the model is a tiny random one, since answers do not matter here."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
from front_ends import CHROMIUM, Book, chromium, serving

from bizassist_nb.runs import list_runs

ROOT = Path(__file__).parents[2]
COLAB_PYTHON = os.environ.get("COLAB_PYTHON", str(ROOT / ".venv-colab" / "bin" / "python"))
OLDER_KERNEL = Path(sys.prefix) / "ipykernel-7.3.0"
"""As `make test` installs it: ipykernel 7.3, which runs callbacks on other threads than the newest."""


@pytest.fixture(scope="session")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.fail(f"there is no {CHROMIUM}; run: apt-get install chromium")
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def screenshots():
    """Where pictures of the panel go: ./screenshots, or what SCREENSHOTS names."""
    folder = Path(os.environ.get("SCREENSHOTS", ROOT / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def environment():
    return {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory, environment):
    with serving("lab", tmp_path_factory.mktemp("lab"), env=environment) as server:
        yield server


@pytest.fixture
def serve(tmp_path, environment):
    """Start a server in tmp_path."""
    with contextlib.ExitStack() as servers:
        yield lambda kind, **options: servers.enter_context(serving(kind, tmp_path, env=environment, **options))


@pytest.fixture
def opened(browser, serve):
    """Open a notebook of these cells; at the end it is closed and its runs are ended."""
    books = []

    def open_book(server, cells, *, name="panel.ipynb", kernel="python3", **options):
        books.append(Book(browser, server, server.notebook(name, cells, kernel), **options))
        return books[-1]

    yield open_book
    for book in books:
        print(book.text()[-4000:])  # pytest shows it where a test fails
        book.close()
        for run in list_runs(book.server.root / "runs"):
            run.kill()


def older_kernel(server):
    """Give the server a kernel with ipykernel 7.3; its name."""
    folder = server.home / "jupyter_data_dir" / "kernels" / "older"
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


def show(book):
    """Run the two cells that show the panel."""
    for cell in range(2):
        book.run(cell)
    book.see("name of the run")
