"""Servers and the browser; the model is a tiny random one, where answers do not matter."""

import contextlib
import os
from pathlib import Path

import machine
import pytest
from front_ends import Book, chromium, serving

from bizassist_nb.runs.run import list_runs


@pytest.fixture(scope="module")  # and not longer: as long as it runs, nothing else in the process can use asyncio
def browser():
    if not machine.chromium():
        pytest.fail("there is no Chromium; run: python tests/machine.py")
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def screenshots():
    """Where pictures of the panel go: ./screenshots, or what SCREENSHOTS names."""
    folder = Path(os.environ.get("SCREENSHOTS", Path(__file__).parents[2] / "screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with serving("lab", tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture
def serve(tmp_path):
    """Start a server in tmp_path."""
    with contextlib.ExitStack() as servers:
        yield lambda kind, **options: servers.enter_context(serving(kind, tmp_path, **options))


@pytest.fixture
def opened(browser):
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
