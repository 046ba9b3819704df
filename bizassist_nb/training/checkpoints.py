"""Checkpoints and adapters: written aside, synced, put in place whole, and read if they are what was written.

RUN/checkpoints/checkpoint-STEP/ holds what the Trainer writes, and `checksums.json`. RUN/best/ is the adapter that
scored best so far.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from bizassist_nb.core.errors import brief
from bizassist_nb.core.files import discard, recover, replace_folder
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models.adapters import WEIGHTS
from bizassist_nb.runs.records import BestScore, Damaged, decode

CHECKSUMS: Final = "checksums.json"
"""Name of the file with the SHA-256 of every other file of a checkpoint, written when all of them are there."""
_SCORE: Final = "score.json"
"""Name of the file beside the best adapter that says its step and loss."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint."""

    path: Path
    step: int

    def damage(self) -> str | None:
        """What is wrong with it, looking at every byte; None if it is what was written."""
        try:
            sums = json.loads((self.path / CHECKSUMS).read_text("utf-8"))
            for name, expected in sums.items():
                if _checksum(self.path / name) != expected:
                    return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, AttributeError) as error:
            return f"it cannot be read ({error})"
        return None


def checkpoints(run_path: Path) -> list[Checkpoint]:
    """Those of a run, the newest first, damaged or not."""
    found = [
        Checkpoint(path, int(step))
        for path in (run_path / "checkpoints").glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdecimal()
    ]
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def newest_checkpoint(
    run_path: Path, damaged: Callable[[Checkpoint, str], object] = lambda *_: None
) -> Checkpoint | None:
    """The newest whole checkpoint of a run, or None; `damaged` is told of each newer one, and what is wrong with it."""
    for checkpoint in checkpoints(run_path):
        if (damage := checkpoint.damage()) is None:
            return checkpoint
        damaged(checkpoint, damage)
    return None


def save_checkpoint(run_path: Path, step: int, write: Callable[[Path], object]) -> None:
    """Have `write` fill a folder of that name, and put that in its place: whole, or not at all.

    Of the others only the whole one before it stays, should this one be damaged; later steps are being done again.

    Raises:
        OSError: where it cannot be written; nothing half-written remains.
    """
    folder = run_path / "checkpoints"
    folder.mkdir(exist_ok=True)  # not `parents`, as in `_aside`
    with _aside(folder / f"checkpoint-{step}") as part:
        write(part)
        files = [file for file in sorted(part.rglob("*")) if file.is_file() and file.name != CHECKSUMS]
        sums = {str(file.relative_to(part)): _checksum(file) for file in files}
        (part / CHECKSUMS).write_text(json.dumps(sums, indent=1), "utf-8")
    before = (checkpoint for checkpoint in checkpoints(run_path) if checkpoint.step < step)
    spare = next((checkpoint for checkpoint in before if not checkpoint.damage()), None)
    for checkpoint in checkpoints(run_path):
        if checkpoint.step != step and checkpoint != spare:
            discard(checkpoint.path)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A new folder to fill, which then replaces `target`: whole, or not at all.

    Every failure to write becomes an OSError: for a full disk safetensors raises an error of its own, torch.save a
    RuntimeError, and tokenizers a plain Exception. Folders above it are not made: the directory of a run whose mount is
    gone would be in the way when the mount comes back. transformers and PEFT do make them (`os.makedirs`).
    """
    part, above = target.parent / ".part" / target.name, target.parent.stat()
    shutil.rmtree(part.parent, ignore_errors=True)  # a worker that was killed may have left one
    part.parent.mkdir()
    part.mkdir()
    try:
        yield part
        if not os.path.samestat(above, target.parent.stat()):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(part))
        replace_folder(part, target)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(brief(error)) from error
    except Exception as error:  # tokenizers raises just that, and nothing else is hidden
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # it is gone, or what is above it has come back, and is not empty
            if not os.path.samestat(above, target.parent.stat()):
                os.removedirs(target.parent)


def clear(run_path: Path) -> None:
    """Delete what was left half-written or half-deleted: by a worker that was killed, or that could not delete it."""
    names = (".part", ".best.*", ".adapter.*", "checkpoints/.*")
    for path in itertools.chain.from_iterable(map(run_path.glob, names)):
        shutil.rmtree(path, ignore_errors=True)


class Best:
    """The adapter that scored best on the held-out rows so far, with its step and loss, in RUN/best/."""

    def __init__(self, run_path: Path):
        """Look into the run's directory: a resumed run goes on with what it had, if that is whole."""
        self.path = run_path / "best"
        recover(self.path)
        self.step, self.loss = 0, float("inf")
        self.damage: Damaged | None = None
        """The event that says why what was there is not used, if so."""
        if self.path.is_dir():
            try:
                known = decode((self.path / _SCORE).read_bytes(), BestScore)
                with safe_open(self.path / WEIGHTS, "pt"):  # its header says how long it is
                    self.step, self.loss = known.step, known.loss
            except (OSError, ValueError, SafetensorError) as error:
                instead = "the best adapter so far is taken from the steps that follow"
                self.damage = Damaged(checkpoint=str(self.path), reason=brief(error), instead=instead)

    def offer(self, step: int, loss: float, model: Any, chat: ChatTokenizer) -> None:
        """Save the model's adapter if it is the best, or if a resumed run does the best one's step again."""
        if loss < self.loss or step <= self.step:
            save_adapter(self.path, model, chat, {_SCORE: json.dumps({"step": step, "loss": loss})})
            self.step, self.loss = step, loss

    def restore(self, model: Any) -> None:
        """Put its weights into the model's adapter."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(self.path / WEIGHTS))

    def forget(self) -> None:
        """Delete it: the run's adapter is the same, or better."""
        shutil.rmtree(self.path, ignore_errors=True)


def save_adapter(target: Path, model: Any, chat: ChatTokenizer, notes: dict[str, str] | None = None) -> None:
    """Write the adapter with its tokenizer and template, and `notes` by file name.

    It replaces the one before when it is whole.

    Raises:
        OSError: where it cannot be written; nothing half-written remains.
    """
    with _aside(target) as part:
        model.save_pretrained(part, safe_serialization=True)
        chat.tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run has its own
        for name, text in (notes or {}).items():
            (part / name).write_text(text, "utf-8")
