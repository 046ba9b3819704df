"""The worker: one process that trains one run and writes its directory. Run as `python -m ...worker RUN_DIRECTORY`.

SIGTERM stops it: in training after the current step, with a checkpoint and the adapter saved; before that at once.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bizassist_nb import models
from bizassist_nb.data.rows import Rejected, Row, Table, read_table, split
from bizassist_nb.data.tokens import ChatTokenizer, Example, lengths
from bizassist_nb.errors import BizassistError, RunError
from bizassist_nb.export.card import write_card
from bizassist_nb.plots import save_loss_png
from bizassist_nb.runs import Journal, Run, write_json, write_whole
from bizassist_nb.settings import Settings
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.evaluation import score
from bizassist_nb.verdict import Score, compare, mean_loss

PACKAGES: Final = (
    "bizassist-nb", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes",
    "unsloth", "unsloth_zoo",
)  # fmt: skip
_LISTED: Final = 50
"""Rejected rows that are written out one by one; all are counted."""


class Stopped(BaseException):
    """SIGTERM arrived. Not an Exception, so that no library's handler takes it for an error of its own."""


class Stop:
    """Whether a stop was asked for; outside training it raises Stopped at once."""

    def __init__(self) -> None:
        """Listen for SIGTERM; an interrupt from a terminal is the launcher's to pass on."""
        self.asked = False
        self.patient = False  # True while a step or a save must not be cut short
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the launcher blocked it until now

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.check()

    def check(self) -> None:
        """Raise Stopped if a stop was asked for and nothing would be lost."""
        if self.asked and not self.patient:
            raise Stopped


def main(directory: str) -> int:
    """Train the run in that directory; 0 if it finished or was stopped, 1 if it failed (its events say why)."""
    run = Run(Path(directory))
    journal = Journal(run.path)
    try:
        state = work(run, journal)
    except Stopped:
        state = "stopped"
    except BizassistError as error:
        return _fail(journal, error, expected=True)
    except Exception as error:  # noqa: BLE001 - the process ends here, and its run has to say why
        traceback.print_exc()
        return _fail(journal, error, expected=False)
    journal.write("state", state=state)
    return 0


def _fail(journal: Journal, error: Exception, *, expected: bool) -> int:
    message = str(error) if expected else f"{type(error).__name__}: {error}"
    journal.write("error", message=message, expected=expected)
    journal.write("state", state="failed")
    return 1


def work(run: Run, journal: Journal) -> str:
    """The whole run, top to bottom; the state it ends in ("finished" or "stopped")."""
    stop = Stop()
    settings = run.settings
    journal.write("state", state="loading")
    engine = engines.choose(run.environment.get("engine", settings.engine))
    if engine.name == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    journal.write("engine", **vars(engine))
    base = models.resolve(run.environment.get("model", settings.model))
    journal.write("model", **vars(base))

    table = read_table(settings.data, settings.columns)
    training, held_out = split(table.rows, subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
    chat = models.load_tokenizer(base.source)
    examples, held = tokenise(journal, chat, settings, table, training, held_out)
    _write_environment(run, engine.name, base, table)
    from bizassist_nb.training.trainer import plan, train  # after unsloth, which has to be imported first

    steps = plan(examples, settings)
    journal.write("plan", steps=len(steps), tokens=sum(len(example.input_ids) for step in steps for example in step))
    fit = _preflight(journal, settings, engine, base, steps)

    model = engines.load(engine, base, settings, checkpointing=fit.checkpointing)
    trainable, total = models.count_parameters(model)
    journal.write("parameters", trainable=trainable, total=total)
    print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")

    journal.write("state", state="scoring")
    with model.disable_adapter():
        base_scores = _score(journal, "base", 0, model, held, chat, stop)

    stop.patient = True
    journal.write("state", state="training")
    done = train(run, journal, stop, engine, settings, fit, model, chat, steps)

    save_adapter(run, model, chat)
    save_loss_png(run)
    if done < len(steps):
        write_card(run)
        return "stopped"
    stop.patient = False  # what training gave is saved; scoring can be done again on resuming
    journal.write("state", state="scoring")
    tuned_scores = _score(journal, "tuned", done, model, held, chat, stop)
    stop.patient = True
    journal.write("state", state="saving")
    write_json(run.path / "evaluation.json", compare(base_scores, tuned_scores, seed=settings.seed))
    save_loss_png(run)
    write_card(run)
    return "finished"


def _preflight(
    journal: Journal, settings: Settings, engine: engines.Engine, base: models.Base, steps: list[list[Example]]
) -> preflight.Fit:
    """How steps are cut up, with events that say so and what the run is expected to need."""
    lengths = [[len(example.input_ids) for example in step] for step in steps]
    expected = preflight.estimate(settings, engine, base, lengths)
    fields = dataclasses.asdict(expected)
    fit = fields.pop("fit")
    journal.write("preflight", sentence=expected.sentence, peak=expected.peak, **fields)
    journal.write("fit", step=0, **fit)
    print(expected.sentence)
    return expected.fit


def tokenise(
    journal: Journal, chat: ChatTokenizer, settings: Settings, table: Table, training: list[Row], held_out: list[Row]
) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), with a "data" event that says what became of every row."""
    examples, too_long = chat.examples(
        training, system_prompt=settings.system_prompt, max_length=settings.max_length, train_on=settings.train_on
    )
    held, held_too_long = chat.examples(
        held_out, system_prompt=settings.system_prompt, max_length=settings.max_length
    )  # what is scored is always the answer
    rejected = [*table.rejected, *too_long, *held_too_long]
    typical = sorted(examples, key=lambda example: len(example.input_ids))[len(examples) // 2]
    journal.write(
        "data",
        source=table.source,
        fingerprint=table.fingerprint,
        usable=len(table.rows),
        training=vars(lengths(examples)),
        held_out=vars(lengths(held)),
        rejected=len(rejected),
        rejected_rows=[vars(bad) for bad in rejected[:_LISTED]],
        shown={"number": typical.number, "runs": chat.show(typical).runs},
    )
    _print_rejected(rejected)
    return examples, held


def _print_rejected(rejected: list[Rejected]) -> None:
    for bad in rejected:
        print(f"row {bad.number} is not used: {bad.reason}")


def _score(
    journal: Journal, who: str, step: int, model: Any, held: list[Example], chat: ChatTokenizer, stop: Stop
) -> list[Score]:
    start = time.monotonic()
    scores = score(model, held, pad_id=chat.pad_id, between=stop.check)
    if not math.isfinite(mean_loss(scores)):
        raise RunError(f"the held-out loss of {who} is {mean_loss(scores)}: its weights are broken")
    journal.write(
        "evaluation", who=who, step=step, loss=mean_loss(scores), rows=len(scores), seconds=time.monotonic() - start
    )
    return scores


def save_adapter(run: Run, model: Any, chat: ChatTokenizer) -> None:
    """The adapter with its tokenizer and template, written aside and put in place whole."""
    target = run.path / "adapter"
    if target.is_dir():
        target.rename(run.path / ".adapter.old")

    def save(part: Path) -> None:
        model.save_pretrained(part, safe_serialization=True)
        chat.tokenizer.save_pretrained(part)
        (part / "README.md").unlink(missing_ok=True)  # PEFT's empty model card; the run has its own

    write_whole(target, save)
    shutil.rmtree(run.path / ".adapter.old", ignore_errors=True)


def _write_environment(run: Run, engine: str, base: models.Base, table: Table) -> None:
    import torch

    before = run.environment
    if before and before["fingerprint"] != table.fingerprint:
        raise RunError(
            f"the data of run {run.name!r} has changed since it began ({table.source}); bring the old data back, "
            "or start a new run"
        )
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    write_json(
        run.path / "environment.json",
        {
            "model": base.name,
            "source": base.source,
            "engine": engine,
            "data": table.source,
            "fingerprint": table.fingerprint,
            "device": gpu or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
            "python": platform.python_version(),
            "versions": {name: version for name in PACKAGES if (version := _version(name))},
        },
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
