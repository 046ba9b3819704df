"""Checkpoints and adapters: written aside, synced, put in place whole, and read if they are what was written.

RUN/checkpoints/checkpoint-STEP/ holds what the Trainer writes, and `checksums.json`. RUN/best/ is the adapter that
scored best so far.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError

from bizassist_nb.core.errors import brief
from bizassist_nb.core.files import discard, recover, replace_folder
from bizassist_nb.data.tokens import ChatTokenizer

CHECKSUMS: Final = "checksums.json"
"""Name of the file with the SHA-256 of every other file of a checkpoint, written when all of them are there."""
_KEPT: Final = 2
"""Checkpoints that are kept: the newest, and the one before, should the newest be damaged."""
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

    Older ones than the one before it go, and those of later steps, which are being done again.

    Raises:
        OSError: where it cannot be written; nothing half-written remains.
    """
    folder = run_path / "checkpoints"
    part = folder / ".part" / f"checkpoint-{step}"
    shutil.rmtree(part.parent, ignore_errors=True)  # a worker that was killed may have left one
    # Not `parents`: a run's directory that is away would be made anew, in the way of the one that comes back.
    for inner in (folder, part.parent, part):
        inner.mkdir(exist_ok=True)
    try:
        with writing(part):
            write(part)
        files = [file for file in sorted(part.rglob("*")) if file.is_file() and file.name != CHECKSUMS]
        sums = {str(file.relative_to(part)): _checksum(file) for file in files}
        (part / CHECKSUMS).write_text(json.dumps(sums, indent=1), "utf-8")
        replace_folder(part, folder / part.name)
    finally:
        shutil.rmtree(part.parent, ignore_errors=True)
    older = [checkpoint for checkpoint in checkpoints(run_path) if checkpoint.step <= step][_KEPT:]
    for checkpoint in [*older, *(later for later in checkpoints(run_path) if later.step > step)]:
        discard(checkpoint.path)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def writing(part: Path) -> Iterator[None]:
    """Have what cannot be written into the folder `part` raise OSError, whoever writes it.

    safetensors has an error of its own for a full disk, torch.save a RuntimeError, and tokenizers a plain Exception.
    transformers and PEFT make a folder that has gone away anew (`os.makedirs`), in the way of its coming back.
    """
    before = part.stat()
    try:
        yield
        if not os.path.samestat(before, part.stat()):
            shutil.rmtree(part)
            with contextlib.suppress(OSError):  # raised where what is above it has come back, and is not empty
                os.removedirs(part.parent)
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(part))
    except (SafetensorError, RuntimeError) as error:
        raise OSError(brief(error)) from error
    except Exception as error:  # tokenizers raises just that, and nothing else is kept back
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error


def clear(run_path: Path) -> None:
    """Delete what was left half-written or half-deleted: by a worker that was killed, or that could not delete it."""
    left = [path for name in ("best", "adapter") for path in run_path.glob(f".{name}.*")]
    for path in [*left, *(run_path / "checkpoints").glob(".*")]:
        shutil.rmtree(path, ignore_errors=True)


class Best:
    """The adapter that scored best on the held-out rows so far, with its step and loss, in RUN/best/."""

    def __init__(self, run_path: Path):
        """Look into the run's directory: a resumed run goes on with what it had."""
        self.path = run_path / "best"
        recover(self.path)
        self.step, self.loss = 0, float("inf")
        if (record := self.path / _SCORE).is_file():
            known = json.loads(record.read_text("utf-8"))
            self.step, self.loss = known["step"], known["loss"]

    def offer(self, step: int, loss: float, model: Any, chat: ChatTokenizer) -> None:
        """Keep the model's adapter if it is the best, or in the place of one of a step that is done again."""
        if loss < self.loss or step <= self.step:
            save_adapter(self.path, model, chat, {_SCORE: json.dumps({"step": step, "loss": loss})})
            self.step, self.loss = step, loss

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

    Raises:
        OSError: where it cannot be written; nothing half-written remains.
    """
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # a worker that was killed may have left one
    part.mkdir()  # and no folder above it: see `save_checkpoint`
    try:
        with writing(part):
            model.save_pretrained(part, safe_serialization=True)
            chat.tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run has its own
        for name, text in (notes or {}).items():
            (part / name).write_text(text, "utf-8")
        replace_folder(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
