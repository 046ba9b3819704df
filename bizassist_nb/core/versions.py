"""Versions of this package and of what it stands on."""

import contextlib
import importlib.metadata
import sys
from collections.abc import Iterable
from typing import Final

STACK: Final = (
    "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "unsloth", "unsloth_zoo",
)  # fmt: skip
"""What training stands on, by the names of distributions."""


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those of the packages that are installed, with their versions."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def replaced(package: str) -> str | None:
    """Why a package cannot be used that was replaced after this process imported it; None if it was not.

    Of a package with compiled modules, those imported later are the new ones, and they refuse the old ones.
    """
    loaded, installed = sys.modules.get(package), versions([package]).get(package)
    if loaded is None or installed in (None, loaded.__version__):
        return None
    return (
        f"{package} {loaded.__version__} was imported before {installed} was installed (on Colab by pandas). "
        "Restart the kernel (Colab: Runtime → Restart session) and run the cells again"
    )


def own_version() -> str:
    """The version of this package, which pyproject.toml has; "not installed" where it runs from its source alone."""
    return versions(["bizassist-nb"]).get("bizassist-nb", "not installed")
