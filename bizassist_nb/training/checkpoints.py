"""Checkpoints: which one a run resumes from, and which one scored best; and how an adapter is saved."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Final

from bizassist_nb.data.tokens import ChatTokenizer

COMPLETE: Final = "complete"
"""Name of the file that is written into a checkpoint when all else in it is there."""
_SCORE: Final = "score.json"
"""Name of the file beside the best adapter that says its step and loss."""


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


class Best:
    """The adapter that scored best on the held-out rows so far, with its step and loss, in RUN/best/."""

    def __init__(self, run_path: Path):
        """Look into the run's directory: a resumed run goes on with what it had."""
        self.path = run_path / "best"
        self.step, self.loss = 0, float("inf")
        if (record := self.path / _SCORE).is_file():
            known = json.loads(record.read_text("utf-8"))
            self.step, self.loss = known["step"], known["loss"]

    def offer(self, step: int, loss: float, model: Any, chat: ChatTokenizer) -> None:
        """Keep the model's adapter if it is the best, or in the place of one of a step that is done again."""
        if loss < self.loss or step <= self.step:
            self.step, self.loss = step, loss
            save_adapter(self.path, model, chat, {_SCORE: json.dumps({"step": step, "loss": loss})})

    def restore(self, model: Any) -> None:
        """Put its weights into the model's adapter."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(self.path / "adapter_model.safetensors"))

    def forget(self) -> None:
        """Delete it: the run's adapter is the same, or better."""
        shutil.rmtree(self.path, ignore_errors=True)


def save_adapter(target: Path, model: Any, chat: ChatTokenizer, notes: dict[str, str] | None = None) -> None:
    """The adapter with its tokenizer and template, and `notes` by file name, written aside and put in place whole.

    The one before is there until then, whatever becomes of the writing.
    """
    part, old = (target.with_name(f".{target.name}.{kind}") for kind in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)  # a worker that was killed may have left one
    model.save_pretrained(part, safe_serialization=True)
    chat.tokenizer.save_pretrained(part)
    (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run has its own
    for name, text in (notes or {}).items():
        (part / name).write_text(text, "utf-8")
    if target.is_dir():  # a folder cannot be put in the place of one that is not empty
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)
