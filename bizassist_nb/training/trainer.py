"""TRL's SFTTrainer, told exactly which rows make up each step, and a callback that reports to the run."""

import dataclasses
import gc
import math
import pickle
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTConfig, SFTTrainer

from bizassist_nb.core.errors import RunError, brief, out_of_memory
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.tokens import IGNORED, ChatTokenizer, Example
from bizassist_nb.models import base as models
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.checkpoints import Checkpoint
from bizassist_nb.training.cuda_graphs import CaptureError, Graphs
from bizassist_nb.training.distributed import fsdp
from bizassist_nb.training.distributed.rank import NoRoomError, this_rank
from bizassist_nb.training.engines import Engine
from bizassist_nb.training.preflight import Fit
from bizassist_nb.training.spool import SpoolingJournal

if TYPE_CHECKING:
    from bizassist_nb.training.stop import Stop


_OVERFLOWS: Final = 24
"""Steps in a row whose gradient may overflow in float16: the loss is scaled by 65,536 at first, half that each time."""


def plan(examples: Sequence[Example], settings: Settings) -> list[list[Example]]:
    """The examples of every step, in order: each epoch is a seeded shuffle of its own, the first the order given.

    Written out beforehand, it is the same for every engine, micro-batch and resumption.
    """
    order: list[Example] = []
    for epoch in range(settings.epochs):
        rows = list(examples)
        if epoch:
            random.Random(settings.seed + epoch).shuffle(rows)
        order += rows
    return [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]


def warmup(settings: Settings, steps: int) -> int:
    """Steps of rising learning rate; "auto" as in `Settings.warmup_steps`."""
    if isinstance(settings.warmup_steps, int):
        return settings.warmup_steps
    return min(20, math.ceil(0.08 * steps))


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run's training takes."""

    run: RunDirectory
    journal: SpoolingJournal
    stop: "Stop"
    engine: Engine
    model: Any
    """The base with its adapter."""
    chat: ChatTokenizer
    steps: list[list[Example]]
    """As `plan` gives them."""
    after_step: Callable[[int], None] = lambda _: None
    """Called with each step's number when it is done; the time it takes is not the step's."""


def train(training: Training, fit: Fit) -> int:
    """Train from the newest checkpoint to the last step, or until a stop; the steps done.

    Where memory runs out, what is done is saved, and training goes on from the same step with less at once.

    Raises:
        NoRoomError: in one of several ranks instead: none can go on by itself, as the others are half-way in a step.
        RunError: if a single row is too long even so, or the loss is no longer a number.
    """
    model, journal, steps = training.model, training.journal, training.steps
    checkpoint = this_rank().all_gather(journal.newest_checkpoint())[0]
    if checkpoint or training.run.steps:  # without a checkpoint it begins from the start, and its steps count no more
        journal.write("resumed", step=checkpoint.step if checkpoint else 0)
    while True:
        trainer = build_trainer(training, fit)
        problem = _run(trainer, checkpoint)
        done = int(trainer.state.global_step)
        # accelerate leaves an autocast around the model's forward: base was scored without, and so is tuned.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if problem is None:
            return done
        fit = trainer.fit
        alone = this_rank().count == 1
        model.zero_grad(set_to_none=True)
        if alone and done > (checkpoint.step if checkpoint else 0):
            trainer._save_checkpoint(trainer.model, trial=None)
            checkpoint = journal.newest_checkpoint()
            if checkpoint is None or checkpoint.step < done:  # there is no room for one either
                journal.write("resumed", step=checkpoint.step if checkpoint else 0)
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        fit = _smaller(training, fit, steps[min(done, len(steps) - 1)], problem)
        if not alone:
            raise NoRoomError(dataclasses.asdict(fit))
        journal.write("fit", step=done, **dataclasses.asdict(fit))


def _run(trainer: "_Trainer", checkpoint: Checkpoint | None) -> str | None:
    """Train to the end or to a stop; what the error says where memory ran out, None otherwise.

    When it returns, the error is gone, and with it the frames that hold the half-done step's tensors.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
    except pickle.UnpicklingError as error:  # torch reads nothing else than weights from it
        assert checkpoint
        raise RunError(
            f"{checkpoint.path} holds something else than tensors, and was not read ({brief(error)}); it is not "
            "what this package wrote. Delete that folder, and go on from the one before with --resume"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return brief(error)
    return None


def _smaller(training: Training, fit: Fit, step: list[Example], problem: str) -> Fit:
    """The next fit to try when memory ran out in that step.

    Without what only saves time; checkpointing where it was thought to do without; then half the micro-batch, or the
    largest below; then checkpointing in every step.
    """
    settings, engine, model = training.run.settings, training.engine, training.model
    on, lengths = preflight.device(), _share(step)
    if fit.unpacked:
        why = f"memory ran out beside the base in 16 bits ({problem})"
        return dataclasses.replace(fit, unpacked=False, reason=why)
    if fit.kept and not fit.checkpoints(lengths, engine):
        why = f"memory ran out in a step without checkpointing ({problem})"
        return dataclasses.replace(fit, kept=0, reason=why)
    each = settings.share(this_rank().count).batch_size
    smaller = [size for size in preflight.divisors(each) if size <= fit.micro_batch / 2]
    if smaller:
        why = f"memory ran out with {fit.micro_batch} rows at once ({problem})"
        return dataclasses.replace(fit, micro_batch=smaller[0], reason=why)
    if not fit.checkpointing:
        why = f"memory ran out with a single row at once ({problem})"
        return dataclasses.replace(fit, checkpointing=True, reason=why)
    row = max(lengths)
    place = preflight.Placement(preflight.Shape.of(model.config), settings.rank, engine, on)
    most = place.longest_that_fits(beside=True)
    raise RunError(
        f"memory ran out with a single row at once and checkpointing on ({problem}). The longest row of this step has "
        f"{row} tokens; try max_length = {max(16, min(most, row // 2))}, under a new name. What is done so far is kept"
    )


def build_trainer(training: Training, fit: Fit) -> SFTTrainer:
    """An SFTTrainer for the planned steps, that writes its checkpoints and events into the run."""
    engine, model, steps, journal = training.engine, training.model, training.steps, training.journal
    settings = training.run.settings
    if fit.checkpointing and engines.own_kernels(engine, on_gpu=torch.cuda.is_available()):
        engines.turn_on_checkpointing(model)
    # The longest rows of a step go first: rows of like length share a micro-batch, and memory runs out at once if ever.
    ordered = [sorted(step, key=lambda example: -len(example.input_ids)) for step in steps]
    rows = [row for step in ordered for row in _rows(step, fit.micro_batch)]
    dataset = Dataset.from_list(rows)
    if engine.end_to_end:  # Unsloth does so with tokenised rows only if their dataset vouches for their length (rl.py)
        dataset._unsloth_truncated_to = settings.max_length
    trainer = _Trainer(
        model=model,
        args=_arguments(training, fit),
        train_dataset=dataset,
        processing_class=training.chat.tokenizer,
        callbacks=[RunCallback(journal, training.stop, steps, settings.checkpoint_minutes, training.after_step)],
    )
    trainer.journal, trainer.fit = journal, fit
    trainer.checkpointed = [fit.checkpoints(_share(step), engine) for step in steps]
    if fit.kept:
        trainer.add_callback(_Sparing(model, trainer.checkpointed))
    free = [step for step, checkpointed in zip(steps, trainer.checkpointed, strict=True) if not checkpointed]
    if fit.graphs and free:
        longest = max(len(row.input_ids) for step in free for row in step)
        trainer.graphs = Graphs(model, fit.micro_batch, longest, unpacked=fit.unpacked)
    # TRL 1.14 casts the adapter of a quantised model to bfloat16. A T4 has none, its eight bits lose small updates, and
    # a resumed run would go on in float32 instead, where PEFT puts adapters; so float32 it is from the start.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if this_rank().sharded:
        trainer.model_wrapped = fsdp.in_step(trainer.accelerator, model)
    model.train()
    return trainer


def _share(step: Sequence[Example]) -> list[int]:
    """Tokens of the rows of a step that go through one rank, of the one that has the longest."""
    return this_rank().longest([len(example.input_ids) for example in step])


def _rows(step: list[Example], micro_batch: int) -> Iterator[dict[str, list[int]]]:
    """A step's rows, by falling length, in the order in which its ranks read them: each a micro-batch in turn.

    So accelerate gives batches out (BatchSamplerShard). Where the run's last step has too few rows for whole rounds, it
    would take some of the first step's, so rows of which nothing is learned make them up.
    """
    rank = this_rank()
    shares = rank.shares([{"input_ids": example.input_ids, "labels": example.labels} for example in step])
    if rank.count > 1:
        nothing = {"input_ids": step[-1].input_ids[:2], "labels": [IGNORED, IGNORED]}
        length = -(-len(shares[0]) // micro_batch) * micro_batch
        shares = [share + [nothing] * (length - len(share)) for share in shares]
    for start in range(0, len(shares[0]), micro_batch):
        for share in shares:
            yield from share[start : start + micro_batch]


def _arguments(training: Training, fit: Fit) -> SFTConfig:
    """What the trainer is told."""
    run, engine, steps = training.run, training.engine, len(training.steps)
    settings = run.settings
    # Unsloth brings its own chunked loss; TRL's (1.14) leaves out what Granite's logits are divided by.
    chunked = engine.name == "transformers" and getattr(training.model.config, "logits_scaling", None) in (None, 1)
    on_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(run.path / "checkpoints"),
        per_device_train_batch_size=fit.micro_batch,
        gradient_accumulation_steps=settings.batch_size // this_rank().count // fit.micro_batch,
        average_tokens_across_devices=True,  # a token weighs the same, whichever rank has it
        ddp_find_unused_parameters=False,  # all of an adapter is used
        max_steps=steps,
        learning_rate=settings.learning_rate,
        warmup_steps=warmup(settings, steps),
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",  # one launch for all matrices; the 8-bit one goes through them in Python
        seed=settings.seed,
        train_sampling_strategy="sequential",  # the plan is the order
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised and cut already
        loss_type="chunked_nll" if chunked else "nll",
        bf16=models.compute_dtype() is torch.bfloat16,
        fp16=models.compute_dtype() is torch.float16,
        gradient_checkpointing=fit.checkpointing and not engines.own_kernels(engine, on_gpu=on_gpu),
        use_cpu=not on_gpu,
        save_strategy="no",  # the callback says when
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN has to be seen where it happens
        report_to="none",
        disable_tqdm=True,
    )


class _Trainer(SFTTrainer):  # type: ignore[misc] # trl is Any to mypy
    """One whose checkpoints are whole or absent, and go where the journal has a place for them."""

    journal: SpoolingJournal
    fit: Fit
    checkpointed: list[bool]
    """Of each step whether it goes through with checkpointing."""
    graphs: Graphs | None = None
    """What the others go through, where they do not go through the model's own modules."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a micro-batch, whose gradients are added up."""
        if self.graphs and not self.checkpointed[self.state.global_step]:
            model.train()
            ready = self._prepare_inputs(inputs)
            try:
                return self.graphs(ready["input_ids"], ready["labels"], num_items_in_batch)
            except CaptureError as error:
                self.graphs = None
                fit = dataclasses.replace(
                    self.fit, graphs=False, unpacked=False, reason=f"no CUDA graphs of this model ({error})"
                )
                self.journal.write("fit", step=self.state.global_step, **dataclasses.asdict(fit))
                self.fit = fit
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step = self.state.global_step
        states = this_rank().all_gather(self._random_state()) if this_rank().count > 1 else []

        def write(folder: Path) -> None:
            self.args.output_dir = str(folder.parent)
            super(_Trainer, self)._save_checkpoint(model, trial)
            (folder / TRAINING_ARGS_NAME).unlink()  # a pickle, which nothing reads
            for state in states:
                for name, content in state.items():
                    (folder / name).write_bytes(content)

        self.journal.checkpoint(step, write)

    def _random_state(self) -> dict[str, bytes]:
        """The file, by name, that this rank reads when it goes on from a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}

    def store_flos(self) -> None:
        """Count no operations: nothing reads the sum, and the ranks would have to meet for it, which here only the
        first writes checkpoints for.
        """


class _Sparing(TrainerCallback):  # type: ignore[misc] # transformers is Any to mypy
    """Checkpointing only in the steps that need it. The model's modules look at their flag in each forward pass."""

    def __init__(self, model: Any, needed: Sequence[bool]):
        """`needed` says of each step whether it needs checkpointing."""
        self._model, self._needed = model, needed
        self._flags: dict[Any, Any] = {}

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the flags of the modules in which the trainer has turned checkpointing on."""
        if not self._flags:
            flags = {module: getattr(module, "gradient_checkpointing", False) for module in self._model.modules()}
            self._flags = {module: flag for module, flag in flags.items() if flag}
        needed = self._needed[state.global_step]
        for module, flag in self._flags.items():
            module.gradient_checkpointing = flag if needed else False


class RunCallback(TrainerCallback):  # type: ignore[misc] # transformers is Any to mypy
    """Steps and checkpoints as events; a checkpoint when it is due or a stop was asked for."""

    def __init__(
        self,
        journal: SpoolingJournal,
        stop: "Stop",
        steps: list[list[Example]],
        checkpoint_minutes: float,
        after_step: Callable[[int], None],
    ):
        """`steps` are the planned examples, by which tokens are counted."""
        self._journal, self._stop, self._after_step = journal, stop, after_step
        self._tokens = [sum(len(example.input_ids) for example in step) for step in steps]
        self._interval = 60 * checkpoint_minutes
        self._overflows = 0  # steps in a row whose gradient was not finite
        self._saved = self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self._saved = self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide whether to save and whether to go on: the first rank does, for all."""
        asked, due = this_rank().broadcast([self._stop.asked, time.monotonic() - self._saved >= self._interval])
        if asked:
            control.should_training_stop = True
        if asked or due or state.global_step >= state.max_steps:
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Write the step's event; the Trainer logs once a step, and once more at the end without a loss."""
        if logs is None or "loss" not in logs:
            return
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        self._overflows = 0 if math.isfinite(norm) else self._overflows + 1
        if not math.isfinite(loss) or self._overflows > (_OVERFLOWS if args.fp16 else 0):
            # Checkpoints are written after this, so none has what such a step did to the adapter.
            what = f"the loss became {loss}" if not math.isfinite(loss) else f"the gradient's norm became {norm}"
            raise RunError(
                f"{what} at step {state.global_step}, so training was stopped; the checkpoints "
                f"before it are kept. Try a lower learning_rate than {args.learning_rate:g}, under a new name"
            )
        now = time.monotonic()
        self._journal.write(
            "step",
            step=state.global_step,
            loss=loss,
            learning_rate=float(logs["learning_rate"]),
            gradient_norm=norm if math.isfinite(norm) else None,  # such a step is left out, and the scaling halved
            tokens=self._tokens[state.global_step - 1],
            seconds=now - self._last,
        )
        self._after_step(state.global_step)
        self._last = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begin to count anew; the Trainer calls this when the checkpoint is saved."""
        self._saved = time.monotonic()
