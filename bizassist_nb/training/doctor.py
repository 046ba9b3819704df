"""What this machine has and what follows for fine-tuning on it."""

import os
import platform
import shutil

from bizassist_nb.core.errors import BizassistError


def report() -> list[tuple[str, str]]:
    """(what, finding) line by line; loads torch, but no model."""
    from bizassist_nb.core.versions import STACK, own_version, versions
    from bizassist_nb.models import base as models
    from bizassist_nb.training import engines

    lines = [("bizassist-nb", f"{own_version()} on Python {platform.python_version()}, {platform.system()}")]
    packages = (*STACK, "ipywidgets")
    found = versions(packages)
    lines += [(package, found.get(package, "not installed")) for package in packages]
    lines.append(("device", _device()))
    engine = engines.choose("auto")
    lines.append(("engine", f"{engine.name}: {engine.reason}"))
    try:
        base = models.resolve("auto")
        lines.append(("model", f"{base.name}: {base.reason}"))
    except BizassistError as error:
        lines.append(("model", str(error)))
    lines.append(("dolly", os.environ.get("BIZASSIST_DOLLY") or "from the hub (BIZASSIST_DOLLY is not set)"))
    lines.append(("free disk", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    return lines


def as_text(lines: list[tuple[str, str]]) -> str:
    """The report for a terminal."""
    width = max(len(what) for what, _ in lines)
    return "\n".join(f"{what:{width}}  {finding}" for what, finding in lines)


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"CPU, {os.cpu_count()} cores ({platform.machine()})"
    free, total = torch.cuda.mem_get_info(0)
    major, minor = torch.cuda.get_device_capability(0)
    arithmetic = "bfloat16" if (major, minor) >= (8, 0) else "float16 (it has no bfloat16)"
    name = torch.cuda.get_device_name(0)
    count = torch.cuda.device_count()
    others = f'; {count} GPUs, which train together with gpus = "all"' if count > 1 else ""
    return (
        f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, compute capability {major}.{minor}: {arithmetic}"
        + others
    )
