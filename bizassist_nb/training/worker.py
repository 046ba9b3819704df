"""The worker: one process that trains one run and writes its directory. Run as `python -m ...worker RUN_DIRECTORY`.

SIGTERM stops it: in training after the current step, with a checkpoint and the adapter saved; before that at once.

On several GPUs each has such a process (`training.distributed.launcher` launches them). The first does all of what is
said here; the others load the same, train along, and leave. Where the base is sharded over them, they do all of it, but
write nothing.
"""

import dataclasses
import io
import json
import logging
import math
import os
import platform
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import BizassistError, DataError, RunError, brief, out_of_memory, without_secrets
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.core.versions import STACK, versions
from bizassist_nb.data.rows import Rejected, Row, Table
from bizassist_nb.data.tokens import ChatTokenizer, Example, lengths
from bizassist_nb.models import base as models
from bizassist_nb.results.degeneration import counted
from bizassist_nb.results.loss_plot import save_loss_png
from bizassist_nb.results.model_card import write_card
from bizassist_nb.results.verdict import Score, mean_loss
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.checkpoints import Best, clear, newest_checkpoint, save_adapter
from bizassist_nb.training.distributed import fsdp
from bizassist_nb.training.distributed.rank import FIT, end_with_launcher, leave_reason, scorers, this_rank
from bizassist_nb.training.evaluation import EvaluationSet
from bizassist_nb.training.fixed_prompts import answer, answer_apart, max_new_tokens
from bizassist_nb.training.spool import Silent, SpoolingJournal
from bizassist_nb.training.stop import FollowerStop, Stop, Stopped

_LISTED: Final = 50
"""Rejected rows that are written out one by one; all are counted."""


def main(directory: str) -> int:
    """Train the run in that directory; 0 if it finished or was stopped, 1 if it failed (its events say why)."""
    run, rank = RunDirectory(Path(directory)), this_rank()
    if rank.count > 1:
        end_with_launcher()
    stop = Stop() if rank.first else FollowerStop()
    journal = SpoolingJournal(run.path, between=stop.hurry) if rank.first else Silent()
    try:
        if rank.first:
            work(run, journal, stop)
            clear(run.path)
            journal.settle()
        elif rank.sharded:
            work(run, journal, stop)
        else:
            follow(run, journal, stop)
    except Stopped:
        journal.write("state", state="stopped")
        return int(rank.count > 1)  # the others wait for this one, and have to be ended
    except BizassistError as error:
        return _fail(journal, error, expected=True)
    except Exception as error:  # noqa: BLE001 - the process ends here, and its run has to say why
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        return _fail(journal, error, expected=False)
    return 0


def _fail(journal: SpoolingJournal, error: Exception, *, expected: bool) -> int:
    message = str(error) if expected else without_secrets(f"{type(error).__name__}: {error}")
    if this_rank().count > 1:  # which of the ranks' errors came first, their launcher knows
        leave_reason(message, error)
        return 1
    journal.write("error", message=message, expected=expected)
    journal.write("state", state="failed")
    journal.deliver(now=True)
    return 1


def follow(run: RunDirectory, journal: SpoolingJournal, stop: Stop) -> None:
    """What every rank but the first does that has a whole base: load the same, train along, and leave."""
    this_rank().join()
    engine = _engine(run, journal)
    from bizassist_nb.training.trainer import Training, train  # takes its time, which the first needs, too

    this_rank().barrier()  # now the first has written which model it is to be
    base = models.resolve(run.model)
    _, chat, steps, _ = _prepare(run, journal, base)
    fit = _preflight(journal, run.settings, engine, base, steps)
    model = _load(journal, engine, base, run.settings, fit)
    this_rank().barrier()
    train(Training(run, journal, stop, engine, model, chat, steps), fit)


def work(run: RunDirectory, journal: SpoolingJournal, stop: Stop) -> None:
    """The whole run, top to bottom."""
    settings = run.settings
    journal.write("state", state="loading")
    stop.patient = False
    stop.check()  # one may have been asked for while this process was being started
    rank = this_rank()
    if rank.count > 1 or rank.sharded:
        journal.write("processes", count=rank.count)
        rank.join()
    engine = _engine(run, journal)
    if not rank.first:
        rank.barrier()  # now the first has written which model it is to be
    base = models.resolve(run.model)
    journal.write("model", **vars(base))
    table, chat, steps, evaluation_set = _prepare(run, journal, base)
    if rank.first:
        _write_environment(run, engine.name, base, table)
        rank.barrier()
    best = rank.one_at_a_time(lambda: Best(run.path))
    fit = _preflight(journal, settings, engine, base, steps)
    model = _load(journal, engine, base, settings, fit)

    journal.write("state", state="scoring", who="base")
    with model.disable_adapter():
        base_scores = _examine(journal, "base", 0, model, evaluation_set, stop)
    done = _train(run, journal, stop, engine, fit, model, chat, steps, evaluation_set, best)
    if done < len(steps):
        journal.insist("the model card", lambda: write_card(run))
        journal.write("state", state="stopped")
        return
    stop.patient = False  # what training gave is saved; scoring can be done again on resuming
    journal.write("state", state="scoring", who="tuned")
    tuned_scores = _examine(journal, "tuned", done, model, evaluation_set, stop)
    [better] = scorers().broadcast([best.loss < mean_loss(tuned_scores[0])])
    if better and settings.keep == "best":
        _take_best(run, journal, best, model, chat, stop)
        tuned_scores = _examine(journal, "tuned", best.step, model, evaluation_set, stop)
    _write_result(run, journal, evaluation_set.result(base_scores, tuned_scores, None))  # should answering fail
    journal.write("state", state="answering")
    answers: dict[str, Any] | None
    if engine.name == "transformers":
        given = answer(run, model, chat, "default", between=stop.check)
        journal.insist("the answers", lambda: write_json(run.path / "answers.json", given))
        answers = counted(given, max_new_tokens())
    else:
        del model  # to make room for the plain one
        answers = _answers_from_apart(run, journal)
    stop.patient = True
    journal.write("state", state="saving")
    _write_result(run, journal, evaluation_set.result(base_scores, tuned_scores, answers))
    journal.insist("the loss plot", lambda: save_loss_png(run))
    journal.insist("the model card", lambda: write_card(run))
    journal.write("state", state="finished")
    if rank.first and (settings.keep == "best" or not better):
        best.forget()  # not before: resumed from here without it, the run would end with another adapter


def _write_result(run: RunDirectory, journal: SpoolingJournal, result: dict[str, Any]) -> None:
    journal.insist("the verdict", lambda: write_json(run.path / "evaluation.json", result))


def _engine(run: RunDirectory, journal: SpoolingJournal) -> engines.Engine:
    """What trains, imported where it has to be the first; a resumed run keeps its own."""
    rank = this_rank()
    asked = run.environment.get("engine", run.settings.engine)
    engine = engines.choose(asked, processes=rank.count, sharded=rank.sharded)
    if engine.name == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    journal.write("engine", **vars(engine))
    return engine


def _prepare(
    run: RunDirectory, journal: SpoolingJournal, base: models.Base
) -> tuple[Table, ChatTokenizer, list[list[Example]], EvaluationSet]:
    """(data, tokenizer, examples of each step, what base and tuned are scored on)."""
    from bizassist_nb.training.trainer import plan  # after unsloth, which has to be imported first

    settings = run.settings
    table, training, held_out = rows_of(run)
    chat = models.load_tokenizer(base.source)
    examples, held = tokenise(journal, chat, settings, table, training, held_out)
    steps = plan(examples, settings)
    journal.write("plan", steps=len(steps), tokens=sum(len(example.input_ids) for step in steps for example in step))
    return table, chat, steps, EvaluationSet(chat, settings, held_out, held)


def _load(
    journal: SpoolingJournal, engine: engines.Engine, base: models.Base, settings: Settings, fit: preflight.Fit
) -> Any:
    def load() -> Any:
        model = engines.load(engine, base, settings, checkpointing=fit.checkpointing)
        trainable, total = models.count_parameters(model)
        journal.write("parameters", trainable=trainable, total=total)
        print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
        if this_rank().sharded:
            fsdp.shard(model)
            held, whole = fsdp.held(model)
            journal.write("sharded", held=held, whole=whole)
        return model

    return this_rank().one_at_a_time(load)  # so that the RAM of a machine holds one whole base at a time


def _train(
    run: RunDirectory,
    journal: SpoolingJournal,
    stop: Stop,
    engine: engines.Engine,
    fit: preflight.Fit,
    model: Any,
    chat: ChatTokenizer,
    steps: list[list[Example]],
    evaluation_set: EvaluationSet,
    best: Best,
) -> int:
    """Train and save the adapter; the steps done. From here on nothing is cut short: a stop ends training in order."""
    from bizassist_nb.training.trainer import Training, train

    stop.patient = True
    if this_rank().first:
        _forget_scores(run, len(steps))
    watch = _watch(journal, run.settings, model, evaluation_set, chat, len(steps), best, stop)
    this_rank().barrier()
    journal.write("state", state="training")
    done = train(Training(run, journal, stop, engine, model, chat, steps, watch), fit)
    journal.write("memory", **_peak_memory())
    _save_adapter(run, journal, model, chat)
    journal.insist("the loss plot", lambda: save_loss_png(run))
    return done


def _save_adapter(run: RunDirectory, journal: SpoolingJournal, model: Any, chat: ChatTokenizer) -> None:
    journal.insist("the adapter", lambda: save_adapter(run.path / "adapter", model, chat))


def _forget_scores(run: RunDirectory, steps: int) -> None:
    """Delete what was said of an adapter that is about to be trained further; one that is done keeps it."""
    checkpoint = newest_checkpoint(run.path)
    if checkpoint is None or checkpoint.step < steps:
        for name in ("evaluation.json", "answers.json"):
            (run.path / name).unlink(missing_ok=True)


def _preflight(
    journal: SpoolingJournal, settings: Settings, engine: engines.Engine, base: models.Base, steps: list[list[Example]]
) -> preflight.Fit:
    """How steps are cut up, with events that say so and what the run is expected to need."""
    rank = this_rank()
    # All ranks cut alike: so that the longest share of a step fits, on the device with the least room.
    lengths = [rank.longest([len(example.input_ids) for example in step]) for step in steps]
    on = preflight.device()
    free = rank.all_reduce_min(on.free / (1 if on.on_gpu else rank.beside))
    on = dataclasses.replace(on, free=free, sharing=rank.count if rank.sharded else 1)
    expected = preflight.estimate(settings.share(rank.count), engine, base, lengths, on)
    fields = dataclasses.asdict(expected)
    fit = fields.pop("fit")
    journal.write("preflight", sentence=expected.sentence, peak=expected.peak, **fields)
    step = 0
    if FIT in os.environ:
        fit = json.loads(os.environ[FIT])
        checkpoint = journal.newest_checkpoint()
        step = checkpoint.step if checkpoint else 0
    journal.write("fit", step=step, **fit)
    print(expected.sentence)
    return preflight.Fit(**fit)


def _take_best(
    run: RunDirectory, journal: SpoolingJournal, best: Best, model: Any, chat: ChatTokenizer, stop: Stop
) -> None:
    stop.patient = True
    best.restore(model)
    _save_adapter(run, journal, model, chat)
    journal.write("kept", step=best.step)
    stop.patient = False
    stop.check()


def _answers_from_apart(run: RunDirectory, journal: SpoolingJournal) -> dict[str, Any] | None:
    try:
        return answer_apart(run)
    except RunError as error:  # the run is good without answers; its report says that they are missing, and why
        journal.write("unanswered", reason=str(error))
        return None


def _peak_memory() -> dict[str, Any]:
    """Bytes taken at most so far: of GPU memory by torch, or without a GPU of memory by this process."""
    import torch

    if torch.cuda.is_available():
        return {"of": "GPU", "peak": torch.cuda.max_memory_reserved()}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return {"of": "process", "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _watch(
    journal: SpoolingJournal,
    settings: Settings,
    model: Any,
    evaluation_set: EvaluationSet,
    chat: ChatTokenizer,
    steps: int,
    best: Best,
    stop: Stop,
) -> Callable[[int], None]:
    """What is done after each step: the held-out rows are scored when it is time, and the best adapter is kept.

    Where memory runs out over it, training goes on as it was, without that score: its own step is through. But not if
    the base is sharded: then the others wait for this rank in the middle of a pass.
    """
    every, rank = settings.evaluate_every, scorers()
    if isinstance(every, str):
        each = settings.batch_size * rank.count // this_rank().count  # examples of a step for each of those that score
        every = max(1, round(3 * len(evaluation_set.held_out) / each))

    def hurry() -> None:
        if rank.broadcast([stop.asked])[0]:  # all of them at the same place
            raise Stopped

    def after(step: int) -> None:
        if step % every or steps - step < every / 2:  # the end, where all is scored anyway, is near
            return
        try:
            scores = _score(journal, "tuned", step, model, evaluation_set, hurry)
        except Stopped:
            return  # training itself stops in its own, orderly way
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if rank.sharded:
                raise RunError(
                    f"memory ran out while the held-out rows were scored after step {step} ({brief(error)}). Start it "
                    f"under a new name with evaluate_every = {steps}, which leaves that out; what was saved is kept"
                ) from error
            journal.write("unscored", step=step, reason=brief(error))
            return
        if not rank.first:
            return
        try:
            best.offer(step, mean_loss(scores), model, chat)
        except OSError as error:
            journal.unsaved(f"the adapter of step {step}, the best so far,", brief(error))

    return after


def tokenise(
    journal: SpoolingJournal,
    chat: ChatTokenizer,
    settings: Settings,
    table: Table,
    training: list[Row],
    held_out: list[Row],
) -> tuple[list[Example], list[Example]]:
    """(training examples, held-out examples), with a "data" event that says what became of every row."""
    examples, too_long = chat.examples(
        training, system_prompt=settings.system_prompt, max_length=settings.max_length, train_on=settings.train_on
    )
    held, held_too_long = chat.examples(
        held_out, system_prompt=settings.system_prompt, max_length=settings.max_length
    )  # what is scored is always the answer
    if len(held) < 2:
        raise DataError("all held-out rows but one are longer than max_length; raise it, or raise held_out")
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


def _examine(
    journal: SpoolingJournal, who: str, step: int, model: Any, evaluation_set: EvaluationSet, stop: Stop
) -> tuple[list[Score], list[Score]]:
    """(held-out scores, general scores)."""
    try:
        return _score(journal, who, step, model, evaluation_set, stop.check), evaluation_set.on_general(
            model, stop.check
        )
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        longest = max(len(example.input_ids) for example in evaluation_set.held_out)
        raise RunError(
            f"memory ran out while {who} was scored on held-out rows of up to {longest} tokens ({brief(error)}). Free "
            "some, or start under a new name with a lower max_length; what was saved is kept"
        ) from error


def _score(
    journal: SpoolingJournal,
    who: str,
    step: int,
    model: Any,
    evaluation_set: EvaluationSet,
    between: Callable[[], None],
) -> list[Score]:
    start = time.monotonic()
    scores = evaluation_set.on_held_out(model, between)
    if not math.isfinite(loss := mean_loss(scores)):
        if who == "base":
            raise RunError(f"the held-out loss of base is {loss}: its weights are broken; take another model")
        raise RunError(f"the held-out loss of tuned became {loss}; try a lower learning_rate, under a new name")
    journal.write("evaluation", who=who, step=step, loss=loss, rows=len(scores), seconds=time.monotonic() - start)
    return scores


def _write_environment(run: RunDirectory, engine: str, base: models.Base, table: Table) -> None:
    import torch

    device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    count = this_rank().count
    write_json(
        run.path / "environment.json",
        {
            "model": base.name,
            "source": base.source,
            "engine": engine,
            "data": table.source,
            "fingerprint": table.fingerprint,
            "device": f"{count} × {device}" if count > 1 else device,
            "python": platform.python_version(),
            "versions": versions(("bizassist-nb", *STACK)),
        },
    )


def _keep_lock() -> None:
    """Move the run's lock away from standard input, so that what this process starts (compilers) does not hold it."""
    os.dup(0)  # which is not inherited
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


class _Log(io.FileIO):
    """A log that loses what it has no room for: that is no reason to end a run."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)


def _say_errors_only() -> None:
    """For a rank that is not the first: what is not an error, that one says."""
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    _keep_lock()
    sys.stdout = sys.stderr = io.TextIOWrapper(_Log(1, "w", closefd=False), "utf-8", "replace", write_through=True)
    if not this_rank().first:
        _say_errors_only()
    sys.exit(main(sys.argv[1]))
