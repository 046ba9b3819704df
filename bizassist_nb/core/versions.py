"""Versions of this package and of what it stands on."""

import contextlib
import importlib.metadata
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


def own_version() -> str:
    """The version of this package, which pyproject.toml has; "not installed" where it runs from its source alone."""
    return versions(["bizassist-nb"]).get("bizassist-nb", "not installed")
