"""What this machine has and what follows for fine-tuning on it."""

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bizassist_nb.core.errors import BizassistError, RunError, brief
from bizassist_nb.core.rendering import Section
from bizassist_nb.core.settings import user_path
from bizassist_nb.core.versions import STACK, own_version, versions
from bizassist_nb.runs.journal import take_lock


def report(runs_dir: str) -> Section:
    """A table of what is there and what follows from it, for runs in that folder; loads torch, but no model."""
    import psutil
    from huggingface_hub import get_token

    from bizassist_nb.models import base as models
    from bizassist_nb.training import engines

    packages = (*STACK, "ipywidgets")
    memory = psutil.virtual_memory()
    found = versions(packages)
    engine = engines.choose("auto")
    try:
        base = models.resolve("auto")
        model = f"{base.name}: {base.reason}"
    except BizassistError as error:
        model = str(error)
    rows = [
        ("bizassist-nb", f"{own_version()} on Python {platform.python_version()}, {platform.system()}"),
        *((package, found.get(package, "not installed")) for package in packages),
        *out_of_range("bizassist-nb"),
        ("device", _device()),
        *_kernels(),
        ("engine", f"{engine.name}: {engine.reason}"),
        ("model", model),
        ("dolly", os.environ.get("BIZASSIST_DOLLY") or "from the hub (BIZASSIST_DOLLY is not set)"),
        ("RAM", f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"),
        ("C compiler", shutil.which("cc") or shutil.which("gcc") or "none; Triton and torch.compile need one"),
        ("hub token", "found" if get_token() else "none; models behind a login need one (hf auth login)"),
        *_folder(runs_dir),
    ]
    return Section("", rows=rows, widest=400)


def out_of_range(package: str) -> Iterator[tuple[str, str]]:
    """The distributions that the package's metadata asks for and that are missing or of another version."""
    from packaging.requirements import Requirement

    for text in (versions([package]) and importlib.metadata.requires(package)) or []:
        wanted = Requirement(text)
        found = versions([wanted.name]).get(wanted.name)
        needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        optional = wanted.marker is not None and wanted.marker.evaluate({"extra": "unsloth"})
        if needed and found is None:
            yield f"⚠ {wanted.name}", f"is not installed; {package} needs {wanted.specifier}"
        elif found and (needed or optional) and not wanted.specifier.contains(found, prereleases=True):
            yield f"⚠ {wanted.name}", f"{found} is installed; {package} needs {wanted.specifier}"


def _folder(name: str) -> Iterator[tuple[str, str]]:
    """The disk of a folder of runs: its room, whether it has locks, and whether Colab's Drive is mounted."""
    runs = user_path(name).absolute()
    there = next(folder for folder in (runs, *runs.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=there) as run:
            os.close(take_lock(Path(run)))
        locks = "can be written and locked"
    except (OSError, RunError) as error:
        locks = f"no run can be trained there ({brief(error)})"
    yield "runs", f"{name}: {shutil.disk_usage(there).free / 2**30:.0f} GiB free; {locks}"
    drive = Path("/content/drive")  # where Colab's users mount it
    if drive.parent.is_dir():
        mounted = "mounted" if drive.is_mount() else "not mounted: what is written there goes with this machine"
        yield "Google Drive", mounted


def _kernels() -> list[tuple[str, str]]:
    """Whether the GPU's kernels can be compiled, by which compiler; nothing without a GPU."""
    import torch

    from bizassist_nb.assistant.cuda import nf4
    from bizassist_nb.assistant.cuda.compilers import triton_problem
    from bizassist_nb.models.base import compute_dtype

    if not torch.cuda.is_available():
        return []
    slower = "cannot be compiled, so answers take longer"
    found = {"Triton": triton_problem(), "nvrtc": nf4.problem(torch.device("cuda:0"), compute_dtype())}
    return [("GPU kernels", f"{name}: {f'{slower} ({why})' if why else 'compiled'}") for name, why in found.items()]


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores ({platform.machine()}): float32"
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    arithmetic = "bfloat16" if (major, minor) >= (8, 0) else "float16 (it has no bfloat16)"
    count = torch.cuda.device_count()
    others = f'; {count} GPUs, which train together with gpus = "all"' if count > 1 else ""
    room = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return f"{torch.cuda.get_device_name(0)}, {room}, compute capability {major}.{minor}: {arithmetic}{others}"
