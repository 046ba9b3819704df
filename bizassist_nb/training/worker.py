"""The worker: one process that trains one run and writes its directory. Run as `python -m ...worker RUN_DIRECTORY`.

SIGTERM stops it: in training after the current step, with a checkpoint and the adapter saved; before that at once.

On several GPUs each has such a process (`training.distributed.launcher` launches them). Rank 0 does all of the work;
the others load the same, train along, and leave. Where the base is sharded over them, they do all of it, but write
nothing.
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
from bizassist_nb.core.versions import STACK, versions
from bizassist_nb.data.rows import Row, Table
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
    journal = SpoolingJournal(run.path, between=stop.raise_if_asked) if rank.first else Silent()
    try:
        worker = Worker(run, journal, stop)
        if rank.first or rank.sharded:
            worker.work()
        else:
            worker.follow()
        if rank.first:
            clear(run.path)
            journal.settle()
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


class Worker:
    """What one process does for a run, from its settings to its verdict.

    `prepare` fills the attributes below; until then they are not there.
    """

    engine: engines.Engine
    base: models.Base
    table: Table
    """The run's data."""
    chat: ChatTokenizer
    steps: list[list[Example]]
    """The examples of each optimizer step, in order."""
    evaluation_set: EvaluationSet
    fit: preflight.Fit
    model: Any
    """The base with its adapter."""
    best: Best

    def __init__(self, run: RunDirectory, journal: SpoolingJournal, stop: Stop):
        """`journal` is where the run's events go, `stop` says whether a stop was asked for."""
        self.run, self.journal, self.stop = run, journal, stop
        self.settings, self.rank = run.settings, this_rank()

    def work(self) -> None:
        """Do the whole run, top to bottom."""
        self.journal.write("state", state="loading")
        self.stop.listen()
        self.prepare()
        self.best = self.rank.one_at_a_time(lambda: Best(self.run.path))
        self.journal.write("state", state="scoring", who="base")
        with self.model.disable_adapter():
            base_scores = self.score_all("base", 0)
        with self.stop.deferred():
            done = self.train()
            if done < len(self.steps):
                self.journal.insist("the model card", lambda: write_card(self.run))
                self.journal.write("state", state="stopped")
                return
        # What training gave is saved; scoring can be done again on resuming.
        tuned_scores, better = self._score_tuned(done)
        self._write_result(self.evaluation_set.result(base_scores, tuned_scores, None))  # should answering fail
        self.journal.write("state", state="answering")
        answers = self.answer()
        with self.stop.deferred():
            self._finish(self.evaluation_set.result(base_scores, tuned_scores, answers), better=better)

    def follow(self) -> None:
        """Do what every rank but the first does that has a whole base: load the same, train along, and leave."""
        self.prepare()
        self.rank.barrier()
        self._train()

    def prepare(self) -> None:
        """Choose engine and base, read and tokenise the rows, and load the base with a fresh adapter."""
        from bizassist_nb.training.trainer import plan  # after unsloth, which `_engine` imports first

        rank = self.rank
        if rank.count > 1 or rank.sharded:
            self.journal.write("processes", count=rank.count)
            rank.join()
        self.engine = self._engine()
        if not rank.first:
            rank.barrier()  # now the first has written which model it is to be
        self.base = models.resolve(self.run.model)
        self.journal.write("model", **vars(self.base))
        self.table, training, held_out = rows_of(self.run)
        self.chat = models.load_tokenizer(self.base.source)
        examples = self._tokenise(training, held_out)
        self.steps = plan(examples, self.settings)
        tokens = sum(len(example.input_ids) for step in self.steps for example in step)
        self.journal.write("plan", steps=len(self.steps), tokens=tokens)
        if rank.first:
            self._write_environment()
            rank.barrier()
        self.fit = self._fit()
        self.model = rank.one_at_a_time(self._load)  # so that the RAM of a machine holds one whole base at a time

    def _engine(self) -> engines.Engine:
        """What trains, imported where it has to be the first; a resumed run keeps its own."""
        asked = self.run.environment.get("engine", self.settings.engine)
        engine = engines.choose(asked, processes=self.rank.count, sharded=self.rank.sharded)
        if engine.name == "unsloth":
            import unsloth  # noqa: F401 - before everything it patches
        self.journal.write("engine", **vars(engine))
        return engine

    def _tokenise(self, training: list[Row], held_out: list[Row]) -> list[Example]:
        """Training examples; the held-out ones become the evaluation set. An event says what became of each row."""
        settings, table = self.settings, self.table
        examples, too_long = self.chat.examples(
            training, system_prompt=settings.system_prompt, max_length=settings.max_length, train_on=settings.train_on
        )
        held, held_too_long = self.chat.examples(
            held_out, system_prompt=settings.system_prompt, max_length=settings.max_length
        )  # what is scored is always the answer
        if len(held) < 2:
            raise DataError("all held-out rows but one are longer than max_length; raise it, or raise held_out")
        self.evaluation_set = EvaluationSet(self.chat, settings, held_out, held)
        rejected = [*table.rejected, *too_long, *held_too_long]
        typical = sorted(examples, key=lambda example: len(example.input_ids))[len(examples) // 2]
        self.journal.write(
            "data",
            source=table.source,
            fingerprint=table.fingerprint,
            usable=len(table.rows),
            training=vars(lengths(examples)),
            held_out=vars(lengths(held)),
            rejected=len(rejected),
            rejected_rows=[vars(bad) for bad in rejected[:_LISTED]],
            shown={"number": typical.number, "runs": self.chat.show(typical).runs},
        )
        for bad in rejected:
            print(f"row {bad.number} is not used: {bad.reason}")
        return examples

    def _fit(self) -> preflight.Fit:
        """How steps are cut up, with events that say so and what the run is expected to need."""
        rank = self.rank
        # All ranks cut alike: so that the longest share of a step fits, on the device with the least room.
        shares = [rank.longest([len(example.input_ids) for example in step]) for step in self.steps]
        on = preflight.device()
        free = rank.all_reduce_min(on.free / (1 if on.on_gpu else rank.beside))
        on = dataclasses.replace(on, free=free, sharing=rank.count if rank.sharded else 1)
        expected = preflight.estimate(self.settings.share(rank.count), self.engine, self.base, shares, on)
        fields = dataclasses.asdict(expected)
        fit = fields.pop("fit")
        self.journal.write("preflight", sentence=expected.sentence, peak=expected.peak, **fields)
        step = 0
        if FIT in os.environ:
            fit = json.loads(os.environ[FIT])
            checkpoint = self.journal.newest_checkpoint()
            step = checkpoint.step if checkpoint else 0
        self.journal.write("fit", step=step, **fit)
        print(expected.sentence)
        return preflight.Fit(**fit)

    def _load(self) -> Any:
        sharded = self.rank.sharded
        checkpointing = self.fit.checkpointing
        model = engines.load(self.engine, self.base, self.settings, checkpointing=checkpointing, sharded=sharded)
        trainable, total = models.count_parameters(model)
        self.journal.write("parameters", trainable=trainable, total=total)
        print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
        if sharded:
            fsdp.shard(model)
            held, whole = fsdp.held(model)
            self.journal.write("sharded", held=held, whole=whole)
        return model

    def train(self) -> int:
        """Train and save the adapter; the steps done. A stop ends training in order, after its step."""
        if self.rank.first:
            self.forget_scores()
        self.rank.barrier()
        self.journal.write("state", state="training")
        done = self._train(self.score_after_step)
        self.journal.write("memory", **_peak_memory())
        self._save_adapter()
        self.journal.insist("the loss plot", lambda: save_loss_png(self.run))
        return done

    def _train(self, after_step: Callable[[int], None] = lambda _: None) -> int:
        from bizassist_nb.training.trainer import Training, train  # after unsloth, which has to be imported first

        training = Training(
            self.run, self.journal, self.stop, self.engine, self.model, self.chat, self.steps, after_step
        )
        return train(training, self.fit)

    def forget_scores(self) -> None:
        """Delete what was said of an adapter that is about to be trained further; one that is done keeps it."""
        checkpoint = newest_checkpoint(self.run.path)
        if checkpoint is None or checkpoint.step < len(self.steps):
            for name in ("evaluation.json", "answers.json"):
                (self.run.path / name).unlink(missing_ok=True)

    def score_after_step(self, step: int) -> None:
        """Score the held-out rows when it is time, and keep the best adapter.

        Where memory runs out over it, training goes on as it was, without that score: its own step is through. But not
        if the base is sharded: then the others wait for this rank in the middle of a pass.
        """
        every = self._scoring_interval()
        if step % every or len(self.steps) - step < every / 2:  # the end, where all is scored anyway, is near
            return
        try:
            scores = self.score("tuned", step, self._raise_if_any_asked)
        except Stopped:
            return  # training itself stops in its own, orderly way
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if scorers().sharded:
                raise RunError(
                    f"memory ran out while the held-out rows were scored after step {step} ({brief(error)}). Start it "
                    f"under a new name with evaluate_every = {len(self.steps)}, which leaves that out; what was saved "
                    "is kept"
                ) from error
            self.journal.write("unscored", step=step, reason=brief(error))
            return
        if not scorers().first:
            return
        try:
            self.best.offer(step, mean_loss(scores), self.model, self.chat)
        except OSError as error:
            self.journal.unsaved(f"the adapter of step {step}, the best so far,", brief(error))

    def _scoring_interval(self) -> int:
        """Steps between two scores of the held-out rows in training."""
        every = self.settings.evaluate_every
        if isinstance(every, int):
            return every
        each = self.settings.batch_size * scorers().count // self.rank.count  # examples of a step for each scorer
        return max(1, round(3 * len(self.evaluation_set.held_out) / each))

    def _raise_if_any_asked(self) -> None:
        if scorers().broadcast([self.stop.asked])[0]:  # all of them at the same place
            raise Stopped

    def score_all(self, who: str, step: int) -> tuple[list[Score], list[Score]]:
        """(held-out scores, general scores)."""
        try:
            held_out = self.score(who, step, self.stop.check)
            return held_out, self.evaluation_set.on_general(self.model, self.stop.check)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            longest = max(len(example.input_ids) for example in self.evaluation_set.held_out)
            raise RunError(
                f"memory ran out while {who} was scored on held-out rows of up to {longest} tokens ({brief(error)}). "
                "Free some, or start under a new name with a lower max_length; what was saved is kept"
            ) from error

    def score(self, who: str, step: int, between: Callable[[], None]) -> list[Score]:
        """Held-out scores, with an event. `between` is called between batches; what it raises ends the scoring.

        Raises:
            RunError: if the loss is not a number.
        """
        start = time.monotonic()
        scores = self.evaluation_set.on_held_out(self.model, between)
        if not math.isfinite(loss := mean_loss(scores)):
            if who == "base":
                raise RunError(f"the held-out loss of base is {loss}: its weights are broken; take another model")
            raise RunError(f"the held-out loss of tuned became {loss}; try a lower learning_rate, under a new name")
        seconds = time.monotonic() - start
        self.journal.write("evaluation", who=who, step=step, loss=loss, rows=len(scores), seconds=seconds)
        return scores

    def _score_tuned(self, done: int) -> tuple[tuple[list[Score], list[Score]], bool]:
        """(scores of the adapter that the run saves, whether an earlier one was better than the last)."""
        self.journal.write("state", state="scoring", who="tuned")
        scores = self.score_all("tuned", done)
        [better] = scorers().broadcast([self.best.loss < mean_loss(scores[0])])
        if better and self.settings.keep == "best":
            with self.stop.deferred():
                self.best.restore(self.model)
                self._save_adapter()
                self.journal.write("kept", step=self.best.step)
            self.stop.check()
            scores = self.score_all("tuned", self.best.step)
        return scores, better

    def answer(self) -> dict[str, Any] | None:
        """Have base and tuned answer the fixed prompts; the signs counted, None if that failed.

        Unsloth's model goes first, to make room for the plain one of another process.
        """
        if self.engine.name == "transformers":
            given = answer(self.run, self.model, self.chat, "default", between=self.stop.check)
            self.journal.insist("the answers", lambda: write_json(self.run.path / "answers.json", given))
            return counted(given, max_new_tokens())
        del self.model
        try:
            return answer_apart(self.run)
        except RunError as error:  # the run is good without answers; its report says that they are missing, and why
            self.journal.write("unanswered", reason=str(error))
            return None

    def _finish(self, result: dict[str, Any], *, better: bool) -> None:
        self.journal.write("state", state="saving")
        self._write_result(result)
        self.journal.insist("the loss plot", lambda: save_loss_png(self.run))
        self.journal.insist("the model card", lambda: write_card(self.run))
        self.journal.write("state", state="finished")
        if self.rank.first and (self.settings.keep == "best" or not better):
            self.best.forget()  # not before: resumed from here without it, the run would end with another adapter

    def _write_result(self, result: dict[str, Any]) -> None:
        self.journal.insist("the verdict", lambda: write_json(self.run.path / "evaluation.json", result))

    def _save_adapter(self) -> None:
        self.journal.insist("the adapter", lambda: save_adapter(self.run.path / "adapter", self.model, self.chat))

    def _write_environment(self) -> None:
        import torch

        device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        count = self.rank.count
        write_json(
            self.run.path / "environment.json",
            {
                "model": self.base.name,
                "source": self.base.source,
                "engine": self.engine.name,
                "data": self.table.source,
                "fingerprint": self.table.fingerprint,
                "device": f"{count} × {device}" if count > 1 else device,
                "python": platform.python_version(),
                "versions": versions(("bizassist-nb", *STACK)),
            },
        )


def _peak_memory() -> dict[str, Any]:
    """Bytes taken at most so far: of GPU memory by torch, or without a GPU of memory by this process."""
    import torch

    if torch.cuda.is_available():
        return {"of": "GPU", "peak": torch.cuda.max_memory_reserved()}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return {"of": "process", "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


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
