"""The worker: one process that trains one run and writes its directory. Run as `python -m ...worker RUN_DIRECTORY`.

SIGTERM stops it: in training after the current step, with a checkpoint and the adapter saved; before that at once.

On several GPUs each has such a process (`training.distributed.launcher` launches them). All do the same work, each on
its share of the rows and prompts, and rank 0 alone writes.
"""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from bizassist_nb.core.errors import RunError, brief, out_of_memory
from bizassist_nb.core.files import write_json
from bizassist_nb.core.versions import STACK, versions
from bizassist_nb.data.overlap import near_duplicates, near_words
from bizassist_nb.data.rows import Row, refused_words
from bizassist_nb.data.tokens import Example, lengths, too_long_words
from bizassist_nb.models import base as models
from bizassist_nb.results.degeneration import counted
from bizassist_nb.results.loss_plot import save_loss_png
from bizassist_nb.results.model_card import write_card
from bizassist_nb.results.power import power
from bizassist_nb.results.verdict import Score, mean_loss
from bizassist_nb.runs import records
from bizassist_nb.runs.rows import SPLIT, rows_of, train_on, validation_of
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.checkpoints import Best, clear, newest_checkpoint, save_adapter
from bizassist_nb.training.distributed import fsdp
from bizassist_nb.training.distributed.rank import FIT, end_with_launcher, failure, leave_reason, this_rank
from bizassist_nb.training.evaluation import EvaluationSet, Scores
from bizassist_nb.training.fixed_prompts import answer, answer_apart, max_new_tokens
from bizassist_nb.training.memory import peak_memory
from bizassist_nb.training.spool import Silent, SpoolingJournal, heartbeats
from bizassist_nb.training.stop import Stop, Stopped

T = TypeVar("T")
_LISTED: Final = 50
"""Rejected rows that are written out one by one; all are counted."""


def main(directory: str) -> int:
    """Train the run in that directory; 0 if it finished or was stopped, 1 if it failed (its events say why)."""
    run, rank = RunDirectory(Path(directory)), this_rank()
    if rank.count > 1:
        end_with_launcher()
    stop = Stop(listens=rank.first)
    journal = SpoolingJournal(run.path, between=stop.raise_if_asked) if rank.first else Silent()
    try:
        Worker(run, journal, stop).work()
        if rank.first:
            clear(run.path)
            journal.settle()
    except Stopped:
        journal.write(records.State(state="stopped"))
        return int(rank.count > 1)  # the others wait for this one, and have to be ended
    except Exception as error:  # noqa: BLE001 - the process ends here, and its run has to say why
        if rank.count > 1:  # which of the ranks' errors came first, their launcher knows
            leave_reason(failure(error), error)
        else:
            journal.fail(failure(error))
        return 1
    return 0


class Worker:
    """What one process does for a run, from its settings to its verdict.

    `prepare` sets its attributes; until then they are not there.
    """

    steps: list[list[Example]]
    """The examples of each optimizer step, in order."""
    model: Any
    """The base with its adapter."""

    def __init__(self, run: RunDirectory, journal: SpoolingJournal, stop: Stop):
        """`journal` is where the run's events go, `stop` says whether a stop was asked for."""
        self.run, self.journal, self.stop = run, journal, stop
        self.settings, self.rank = run.settings, this_rank()
        self.curve = dict(run.held_out)
        """Validation losses by step; of steps that are done again, until they are."""

    def work(self) -> None:
        """Do the whole run, top to bottom."""
        self.journal.write(records.State(state="loading"))
        self.stop.listen()
        self.prepare()
        if self.best.damage:
            self.journal.write(self.best.damage)
        self.journal.write(records.State(state="scoring", who="base"))
        with self.model.disable_adapter():
            self._if_room(0, lambda: self.score("base", 0, self.stop.check))
        with self.stop.deferred():
            done = self.train()
            if not self.over(done):
                self.journal.insist("the model card", lambda: write_card(self.run))
                self.journal.write(records.State(state="stopped"))
                return
        # What training gave is saved; scoring can be done again on resuming.
        scores, better = self._score_tuned(done)
        self._write_result(scores, None)  # should answering fail
        self.journal.write(records.State(state="answering"))
        answers = self.answer()
        with self.stop.deferred():
            self.journal.write(records.State(state="saving"))
            self._write_result(scores, answers)
            self.journal.insist("the loss plot", lambda: save_loss_png(self.run))
            self.journal.insist("the model card", lambda: write_card(self.run))
            self.journal.write(records.State(state="finished"))
            if self.rank.first and (self.settings.keep == "best" or not better):
                self.best.forget()  # not before: resumed from here without it, the run would end with another adapter

    def prepare(self) -> None:
        """Choose engine and base, read and tokenise the rows, and load the base with a fresh adapter."""
        rank = self.rank
        if rank.count > 1 or rank.sharded:
            self.journal.write(records.Processes(count=rank.count))
            rank.join()
        with self.journal.took("importing the engine"):
            self.engine = self._engine()
            from bizassist_nb.training.trainer import plan  # after unsloth, which `_engine` imports first

        if not rank.first:
            rank.barrier()  # now the first has written which model it is to be, and mended what it found
        self.best = Best(self.run.path)
        self.base = models.pinned(models.resolve(self.run.model), self.run.environment.revision)
        self.chat = models.load_tokenizer(self.base.source, self.base.commit)
        reason = self.base.reason + ("; base and tuned answer without thinking first" if self.chat.thinking_off else "")
        self.journal.write(msgspec.structs.replace(self.base, reason=reason))
        with self.journal.took("reading and tokenising the rows"):
            self.table, training, held_out = rows_of(self.run)
            examples = self._tokenise(training, held_out)
        self.steps = plan(examples, self.settings)
        tokens = sum(len(example.input_ids) for step in self.steps for example in step)
        self.journal.write(records.Plan(steps=len(self.steps), tokens=tokens))
        if rank.first:
            self._write_environment()
            rank.barrier()
        self.fit = self._fit()
        with self.journal.took("loading the base"):
            self.model = rank.one_at_a_time(self._load)  # so that the RAM of a machine holds one whole base at a time

    def _engine(self) -> records.Engine:
        """What trains; a resumed run has the same as before. Unsloth has to be imported before all that it patches."""
        asked = self.run.environment.engine or self.settings.engine
        engine = engines.choose(asked, sharded=self.rank.sharded)
        if engine.name == "unsloth":
            import unsloth  # noqa: F401 - before everything it patches
        self.journal.write(engine)
        return engine

    def _tokenise(self, training: list[Row], held_out: list[Row]) -> list[Example]:
        """Training examples; the held-out ones become the evaluation set. An event says what became of each row."""
        settings, table = self.settings, self.table
        examples, too_long = self.chat.examples(
            training, system_prompt=settings.system_prompt, max_length=settings.max_length, train_on=train_on(self.run)
        )
        self.evaluation_set = EvaluationSet(self.chat, settings, training, validation_of(self.run, held_out))
        scored, split = self.evaluation_set.held_out, self.evaluation_set.split
        too_long += self.evaluation_set.too_long
        rejected = [*table.rejected, *too_long]
        warnings = [refused_words(table.rejected)] if table.rejected else []
        if near := near_duplicates(training, held_out):
            warnings.append(near_words(near))
        if too_long:
            needed, total = max(row.tokens for row in too_long), len(training) + len(held_out)
            warnings.append(too_long_words(len(too_long), total, settings.max_length, needed))
        typical = sorted(examples, key=lambda example: len(example.input_ids))[len(examples) // 2]
        self.journal.write(
            records.Data(
                source=table.source,
                fingerprint=table.fingerprint,
                usable=table.usable,
                training=records.Lengths(**lengths(examples)),
                held_out=records.Lengths(**lengths(scored)),
                validation=len(self.evaluation_set.validation) if split else 0,
                rejected=len(rejected),
                rejected_rows=[records.Rejected(number=bad.number, reason=bad.reason) for bad in rejected[:_LISTED]],
                warnings=warnings,
                shown=records.ShownRow(number=typical.number, runs=list(self.chat.show(typical).runs)),
            )
        )
        for bad in rejected:
            print(f"row {bad.number} is not used: {bad.reason}")
        return examples

    def _fit(self) -> records.Fit:
        """How steps are cut up, with events that say so, the learning rate, and what the run is expected to need."""
        rank = self.rank
        steps = [[len(example.input_ids) for example in step] for step in self.steps]
        on = preflight.device()  # all ranks cut alike: so that each share of a step fits the one with the least room
        free = min(rank.all_gather(on.free / (1 if on.on_gpu else rank.beside)))
        on = dataclasses.replace(on, free=free, sharing=rank.count if rank.sharded else 1)
        shape = preflight.shape(self.base.source, self.base.commit)
        self.journal.write(preflight.learning_rate(self.run, shape))
        place = preflight.Placement(shape, self.settings.rank, self.engine, on, rank.count)
        fit, expected = preflight.estimate(place, self.settings, steps)
        self.journal.write(expected)
        self.journal.write(power(self.settings, self.base.name, len(self.evaluation_set.test)))
        if FIT in os.environ:
            checkpoint = self.journal.newest_checkpoint()
            fit = msgspec.convert(json.loads(os.environ[FIT]), records.Fit)
            fit = msgspec.structs.replace(fit, step=checkpoint.step if checkpoint else 0)
        self.journal.write(fit)
        print(expected.sentence)
        return fit

    def _load(self) -> Any:
        sharded = self.rank.sharded
        checkpointing = self.fit.checkpointing
        model = engines.load(self.engine, self.base, self.settings, checkpointing=checkpointing, sharded=sharded)
        trainable, total = model.get_nb_trainable_parameters()
        self.journal.write(records.Parameters(trainable=trainable, total=total))
        print(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.2%})")
        if sharded:
            shard, whole = fsdp.shard(model)
            self.journal.write(records.Sharded(shard=shard, whole=whole))
        return model

    def train(self) -> int:
        """Train and save the adapter; the steps done. A stop ends training in order, after its step."""
        from bizassist_nb.training.trainer import Training, train  # after unsloth, which has to be imported first

        self.forget_scores()
        self.journal.write(records.State(state="training"))
        training = Training(
            self.run, self.journal, self.stop, self.engine, self.model, self.chat, self.steps, self.score_after_step,
            self.over,
        )  # fmt: skip
        done = train(training, self.fit)
        if done < len(self.steps) and self.over(done):
            self.journal.write(records.Ended(step=done, best=self._lowest(done)))
        self.journal.write(peak_memory())
        self._save_adapter()
        self.journal.insist("the loss plot", lambda: save_loss_png(self.run))
        return done

    def over(self, step: int) -> bool:
        """Whether training ends with this step: the last, or, with stop_early, that after a score too many without a
        new low. Scores of steps before it decide, so a run that is resumed here ends here, too.
        """
        since = [at for at in self.curve if self._lowest(step) < at < step]
        return step == len(self.steps) or 0 < self.settings.stop_early <= len(since)

    def _lowest(self, step: int) -> int:
        """The step before this one after which the validation rows scored best; 0 where none was scored."""
        scored = [(loss, at) for at, loss in self.curve.items() if 0 < at < step]
        return min(scored, default=(0.0, 0))[1]

    def forget_scores(self) -> None:
        """Delete the verdict and answers of an adapter that is about to be trained further."""
        checkpoint = newest_checkpoint(self.run.path)
        if checkpoint is None or not self.over(checkpoint.step):
            for path in (self.run.path / "evaluation.json", self.run.path / "answers.json"):
                self.journal.insist("the end of its verdict", functools.partial(path.unlink, missing_ok=True))

    def score_after_step(self, step: int) -> None:
        """Score the held-out rows when it is time, and save the adapter if it is the best."""
        every = self.settings.evaluate_every
        if not isinstance(every, int):
            every = max(1, round(3 * len(self.evaluation_set.validation) / self.settings.batch_size))
        if step % every or len(self.steps) - step < every / 2:  # the end, where all is scored anyway, is near
            return

        def stop() -> None:
            if self.rank.all_gather(self.stop.asked)[0]:  # all of them at the same place
                raise Stopped

        try:
            scores = self._if_room(step, lambda: self.score("tuned", step, stop))
        except Stopped:
            return  # training itself stops in its own, orderly way
        if scores is None or not self.rank.first:
            return
        try:
            self.best.offer(step, mean_loss(scores), self.model, self.chat)
        except OSError as error:
            self.journal.unsaved(f"the adapter of step {step}, the best so far,", brief(error))

    def _if_room(self, step: int, score: Callable[[], T]) -> T | None:
        """What is scored after that step; None where memory ran out over a single row, which an event says.

        Not of one of several ranks, as the others wait for what it found.
        """
        try:
            return score()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if self.rank.count > 1:
                raise RunError(
                    f"memory ran out while the held-out rows were scored after step {step} ({brief(error)}). Start it "
                    f"under a new name with a lower max_length, or with evaluate_every = {len(self.steps)}, which "
                    "scores only before and after training; what was saved stays"
                ) from error
            self.journal.write(records.Unscored(step=step, reason=brief(error)))
            return None

    def score(self, who: records.Who, step: int, between: Callable[[], None]) -> list[Score]:
        """Scores of the validation rows, with an event. `between` is called between batches; what it raises ends them.

        Raises:
            RunError: if the loss is not a number.
        """
        start = time.monotonic()
        scores = self.evaluation_set.score(self.model, between)
        self._on_curve(who, step, scores, time.monotonic() - start)
        return scores

    def _on_curve(self, who: records.Who, step: int, scores: list[Score], seconds: float) -> None:
        if not math.isfinite(loss := mean_loss(scores)):
            if who == "base":
                raise RunError(f"the held-out loss of base is {loss}: its weights are broken; take another model")
            raise RunError(f"the held-out loss of tuned became {loss}; try a lower learning_rate, under a new name")
        self.curve[step] = loss
        self.journal.write(records.Evaluation(who=who, step=step, loss=loss, rows=len(scores), seconds=seconds))

    def _score_tuned(self, done: int) -> tuple[Scores | None, bool]:
        """(scores of base and of the adapter that the run saves, whether an earlier one was better than the last).

        Where validation rows choose the adapter, the test rows are looked at once it is chosen, and only then.
        """
        self.journal.write(records.State(state="scoring", who="tuned"))
        check, better = self.stop.check, False
        if self.settings.validates:
            last = self._if_room(done, lambda: self.score("tuned", done, check))
            if last is None:
                return None, False
            better = self._better_before(last)
        if better and self.settings.keep == "best":
            with self.stop.deferred():
                self.best.restore(self.model)
                self._save_adapter()
                self.journal.write(records.Kept(step=self.best.step))
            check()
        start = time.monotonic()
        off = self.model.disable_adapter
        scores = self._if_room(done, lambda: self.evaluation_set.compare(self.model, off, check))
        if scores and not self.settings.validates:
            tuned = [pair.tuned for pair in scores.test]
            self._on_curve("tuned", done, tuned, time.monotonic() - start)
            better = self._better_before(tuned)
        return scores, better

    def _better_before(self, last: list[Score]) -> bool:
        """Whether the best adapter so far scored better than the last one."""
        found: bool = self.rank.all_gather(self.best.loss < mean_loss(last))[0]
        return found

    def answer(self) -> records.AnswerCounts | None:
        """Have base and tuned answer the fixed prompts; the signs counted, None if that failed.

        The run is good without answers; its report says that they are missing, and why.
        """
        try:
            if self.engine.name == "transformers":
                given = answer(self.run, self.model, self.chat, "default", between=self.stop.check)
            else:
                del self.model  # Unsloth's makes room for the plain one of another process
                given = answer_apart(self.run) if self.rank.first else []
        except (RunError, RuntimeError, ValueError, MemoryError) as error:
            if self.rank.count > 1 and self.engine.name == "transformers":  # the others wait for what it answers
                raise
            again = f"try again with: bizassist evaluate {self.run.name}"
            reason = str(error) if isinstance(error, RunError) else f"{brief(error)}; {again}"
            self.journal.write(records.Unanswered(reason=f"the fixed prompts could not be answered: {reason}"))
            return None
        self.journal.insist("the answers", lambda: write_json(self.run.path / "answers.json", given))
        return counted(given, max_new_tokens())

    def _write_result(self, scores: Scores | None, answers: records.AnswerCounts | None) -> None:
        if scores:
            result = self.evaluation_set.result(scores, answers)
            self.journal.insist("the verdict", lambda: write_json(self.run.path / "evaluation.json", result))

    def _save_adapter(self) -> None:
        self.journal.insist("the adapter", lambda: save_adapter(self.run.path / "adapter", self.model, self.chat))

    def _write_environment(self) -> None:
        import torch

        device = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        count = self.rank.count
        environment = records.Environment(
            model=self.base.name,
            source=self.base.source,
            revision=self.base.revision,
            engine=self.engine.name,
            data=self.table.source,
            fingerprint=self.table.fingerprint,
            device=f"{count} × {device}" if count > 1 else device,
            python=platform.python_version(),
            versions=versions(("bizassist-nb", *STACK)),
            split=(self.run.environment.split if self.run.environment.fingerprint else SPLIT),
        )
        path = self.run.path / "environment.json"
        self.journal.insist("what it is trained with", lambda: write_json(path, environment))


class _Log(io.FileIO):
    """A log that loses what it has no room for: that is no reason to end a run."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)


if __name__ == "__main__":
    # The run's lock moves away from standard input, so that what this process starts (compilers) does not hold it.
    os.dup(0)  # which is not inherited
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = sys.stderr = io.TextIOWrapper(_Log(1, "w", closefd=False), "utf-8", "replace", write_through=True)
    if not this_rank().first:  # what is not an error, the first says
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    # The launcher of several ranks has a heartbeat of its own.
    alone = heartbeats(Path(sys.argv[1])) if this_rank().count == 1 else contextlib.nullcontext()
    with alone:
        status = main(sys.argv[1])
    sys.exit(status)
