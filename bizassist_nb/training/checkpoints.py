"""Checkpoints: which one a run resumes from."""

import dataclasses
from pathlib import Path
from typing import Final

COMPLETE: Final = "complete"
"""Name of the file that is written into a checkpoint when all else in it is there."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint."""

    path: Path
    step: int


def newest_checkpoint(run_path: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None."""
    whole = [
        Checkpoint(path.parent, int(path.parent.name.removeprefix("checkpoint-")))
        for path in (run_path / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")
    ]
    return max(whole, key=lambda checkpoint: checkpoint.step, default=None)
