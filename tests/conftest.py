"""Shared parts: real ones, made once a session."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import worker_forks
from filelock import FileLock

# Nothing here reaches a hub; a test that tries is told so at once instead of after minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# The notebooks begin first, and what else takes long and can do without the run of quickstart.ipynb (`trained`). What
# waits for that run comes last, the longest first, so that processes side by side end at about the same time.
FIRST = (
    "test_quickstart", "test_experiment", "test_panel_tour", "test_hurt", "test_panel", "test_kills", "test_fits",
    "test_families", "test_outages", "test_cli", "test_bad_input", "test_rows", "test_several",
)  # fmt: skip
LAST = ("test_training", "test_assistant", "test_notebook", "test_export", "test_tabs", "test_hub", "test_looks")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate((*FIRST, "", *LAST))}
    items.sort(key=lambda item: places.get(item.path.stem, places[""]))


ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
"""Where this project's own machines have the Dolly rows; elsewhere there is no such folder."""
_PACKED = SHARED / "dolly" / "databricks-dolly-15k.jsonl.gz"


def pytest_configure(config):
    """Unpack the Dolly rows for all processes of the session, where nothing else names them."""
    worker_forks.install()
    if os.environ.get("BIZASSIST_DOLLY") or not _PACKED.is_file():
        return
    folder = Path(tempfile.mkdtemp(prefix="dolly-"))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    with gzip.open(_PACKED) as packed, (folder / "databricks-dolly-15k.jsonl").open("wb") as rows:
        shutil.copyfileobj(packed, rows)
    os.environ["BIZASSIST_DOLLY"] = rows.name


def pytest_report_header():
    """Say what is left out, and why."""
    if os.environ.get("BIZASSIST_DOLLY") or SHARED.is_dir():
        return ""
    return "tests on Dolly rows are skipped: BIZASSIST_DOLLY names no databricks-dolly-15k.jsonl"


@pytest.fixture(scope="session")
def dolly() -> str:
    """The published Dolly file; set as BIZASSIST_DOLLY for the whole session."""
    path = os.environ.get("BIZASSIST_DOLLY")
    if not path and SHARED.is_dir():
        pytest.fail(f"{_PACKED} is missing, and BIZASSIST_DOLLY names no other file")
    if not path:
        pytest.skip("BIZASSIST_DOLLY does not name the Dolly file")
    return path


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the embedded model."""
    from bizassist_nb.models.embedded import embedded_folder

    return embedded_folder()


@pytest.fixture(scope="session")
def chat(embedded):
    """The embedded model's chat tokenizer."""
    from bizassist_nb.models.base import load_tokenizer

    return load_tokenizer(embedded)


@pytest.fixture(scope="session")
def tiny(embedded, tmp_path_factory) -> Path:
    """A model of two small random layers that has nothing to say, with a sixth of the embedded one's vocabulary."""
    from random_run import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"), embedded, vocabulary=8192)


@pytest.fixture(scope="session")
def tiny_chat(tiny):
    """The tiny model's chat tokenizer."""
    from bizassist_nb.models.base import load_tokenizer

    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def mistral_chat(tmp_path_factory):
    """Mistral-7B-Instruct-v0.3's own tokenizer, made from the SentencePiece model that mistral-common ships."""
    from mistral_tokenizer import build

    from bizassist_nb.models.base import load_tokenizer

    return load_tokenizer(build(tmp_path_factory.mktemp("mistral")))


@pytest.fixture
def rows_file(tmp_path):
    """Write rows to a .jsonl file and give its path."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def ended(tmp_path):
    """Ends what a test that failed has left running in its folder."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in " ".join(process.info["cmdline"] or []):
            process.kill()


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory, worker_id) -> Path:
    """A folder that all processes of the test session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if worker_id == "master" else folder.parent


@pytest.fixture(scope="session")
def quickstart(embedded, session_folder) -> subprocess.CompletedProcess:
    """What nbval said of notebooks/quickstart.ipynb, run once for all processes of the session."""
    return _compared("quickstart.ipynb", session_folder / "quickstart")


@pytest.fixture(scope="session")
def panel_tour(embedded, session_folder) -> subprocess.CompletedProcess:
    """The same of the notebook that shows the panel."""
    return _compared("panel.ipynb", session_folder / "panel")


@pytest.fixture(scope="session")
def experiment(embedded, dolly, session_folder) -> subprocess.CompletedProcess:
    """The same of the notebook with the whole experiment."""
    return _compared("mistral-business-assistant-lora.ipynb", session_folder / "experiment")


def _compared(name: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a copy of a notebook in `folder`, where its runs stay, and have nbval compare its outputs."""
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            shutil.copy(ROOT / "notebooks" / name, folder)
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--nbval"]
            forks = worker_forks.ipython_profile(Path(tempfile.mkdtemp(prefix="ipython-", dir=folder.parent)))
            environment = {**os.environ, **forks}
            result = subprocess.run(
                [*command, name], cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            (folder / "nbval.json").write_text(json.dumps([result.returncode, result.stdout + result.stderr]))
        return subprocess.CompletedProcess(name, *json.loads((folder / "nbval.json").read_text("utf-8")))


@pytest.fixture(scope="session")
def trained(quickstart, session_folder):
    """A real run: quickstart.ipynb's, the embedded model fine-tuned on 16 of the package's rows, by Unsloth.

    One for all processes of the test session, so no test may change it.
    """
    from bizassist_nb import open_run

    return open_run("quickstart", session_folder / "quickstart" / "runs")
