"""TRL's SFTTrainer, told exactly which rows make up each step, and a callback that reports to the run."""

import dataclasses
import functools
import gc
import math
import os
import pickle
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTConfig, SFTTrainer

from bizassist_nb.core.errors import RunError, brief, out_of_memory
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.tokens import IGNORED, ChatTokenizer, Example
from bizassist_nb.models import base as models
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.checkpoints import Checkpoint
from bizassist_nb.training.cuda_graphs import CaptureError, Graphs
from bizassist_nb.training.distributed.rank import RefitError, this_rank
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


def share_of_peak(settings: Settings, step: int, steps: int) -> float:
    """Which part of the peak learning rate the step after `step` others takes: a linear rise, then the scheduler's.

    The first step learns, too: transformers' own schedule begins at 0, so that a run of one step would learn nothing.
    """
    warmup = settings.warmup_steps if isinstance(settings.warmup_steps, int) else min(20, math.ceil(0.08 * steps))
    left = (steps - step) / max(1, steps - warmup)
    fall = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[settings.scheduler]
    return (step + 1) / warmup if step < warmup else fall


@dataclasses.dataclass(frozen=True)
class Training:
    """What a run's training takes."""

    run: RunDirectory
    journal: SpoolingJournal
    stop: "Stop"
    engine: records.Engine
    model: Any
    """The base with its adapter."""
    chat: ChatTokenizer
    steps: list[list[Example]]
    """As `plan` gives them."""
    after_step: Callable[[int], None] = lambda _: None
    """Called with each step's number when it is done; the time it takes is not the step's."""
    over: Callable[[int], bool] = lambda _: False
    """Whether training ends early with that step; the first rank's counts, for all."""


def train(training: Training, fit: records.Fit) -> int:
    """Train from the newest checkpoint to the last step, or until a stop; the steps done.

    Where memory runs out, what is done is saved, and training goes on from the same step with less at once; where no
    pass can be captured, without graphs.

    Raises:
        RefitError: in one of several ranks instead: none can go on by itself, as the others are half-way in a step.
        RunError: if a single row is too long even so, or the loss is no longer a number.
    """
    model, journal, steps = training.model, training.journal, training.steps
    checkpoint = this_rank().all_gather(journal.newest_checkpoint())[0]
    if checkpoint or training.run.steps:  # without a checkpoint it begins from the start, and its steps count no more
        journal.write(records.Resumed(step=checkpoint.step if checkpoint else 0))
    if checkpoint and this_rank().all_gather(training.over(checkpoint.step))[0]:  # so that no step is trained
        training = dataclasses.replace(training, steps=steps[: checkpoint.step])
    while True:
        trainer = build_trainer(training, fit)
        problem = _run(trainer, checkpoint)
        done = int(trainer.state.global_step)
        # accelerate leaves an autocast around the model's forward: base was scored without, and so is tuned.
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if problem is None:
            return done
        alone, place = this_rank().count == 1, min(done, len(steps) - 1)
        checkpointed = trainer.checkpointed[place]
        model.zero_grad(set_to_none=True)
        if alone and done > (checkpoint.step if checkpoint else 0):
            trainer._save_checkpoint(trainer.model, trial=None)
            checkpoint = journal.newest_checkpoint()
            if checkpoint is None or checkpoint.step < done:  # there is no room for one either
                journal.write(records.Resumed(step=checkpoint.step if checkpoint else 0))
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        torch.cuda.empty_cache()
        fit = _smaller(training, fit, problem, steps[place], checkpointed=checkpointed)
        if not alone:
            raise RefitError(msgspec.to_builtins(fit))
        journal.write(msgspec.structs.replace(fit, step=done))


def _run(trainer: "_Trainer", checkpoint: Checkpoint | None) -> str | CaptureError | None:
    """Train to the end or to a stop: None. What the error says where memory ran out, or that graphs cannot be captured.

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
    except CaptureError as error:
        return CaptureError(*error.args)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return brief(error)
    finally:
        if trainer.graphs:
            seconds = trainer.graphs.capturing
            trainer.training.journal.write(records.Took(what="capturing CUDA graphs", seconds=seconds))
    return None


def _smaller(
    training: Training, fit: records.Fit, problem: str | CaptureError, step: list[Example], *, checkpointed: bool
) -> records.Fit:
    """The next fit to try when there was that problem in that step, which went through with checkpointing or not.

    Without what only saves time; checkpointing where it was thought to do without; then half the micro-batch, or the
    largest below; then checkpointing in every step.
    """
    settings = training.run.settings

    def less(where: str, **changes: Any) -> records.Fit:
        return msgspec.structs.replace(fit, reason=f"memory ran out {where} ({problem})", **changes)

    if isinstance(problem, CaptureError):
        why = f"no CUDA graphs of this model ({problem})"
        return msgspec.structs.replace(fit, graphs=False, unpacked=False, reason=why)
    if fit.unpacked:
        return less("beside the base in 16 bits", unpacked=False)
    if fit.checkpoint_above and not checkpointed:
        return less("in a step without checkpointing", checkpoint_above=0)
    each = settings.share(this_rank().count).batch_size
    if smaller := [size for size in preflight.divisors(each) if size <= fit.micro_batch / 2]:
        return less(f"with {fit.micro_batch} rows at once", micro_batch=smaller[0])
    if not fit.checkpointing:
        return less("with a single row at once", checkpointing=True)
    row = max(len(row.input_ids) for row in step)
    shape = preflight.Shape.of(training.model.config)
    most = preflight.Placement(shape, settings.rank, training.engine, preflight.device()).longest_that_fits(beside=True)
    raise RunError(
        f"memory ran out with a single row at once and checkpointing on ({problem}). The longest row of this step has "
        f"{row} tokens; try max_length = {max(16, min(most, row // 2))}, under a new name. What is done so far is kept"
    )


def build_trainer(training: Training, fit: records.Fit) -> SFTTrainer:
    """An SFTTrainer for the planned steps, that writes its checkpoints and events into the run."""
    engine, model, steps = training.engine, training.model, training.steps
    if fit.checkpointing and engines.own_kernels(engine, on_gpu=torch.cuda.is_available()):
        # Unsloth 2026.10.9 lets no argument overrule what the model was loaded with: its trainer reads this attribute
        # (models/rl.py, prepare_for_training_mode). True is torch's own checkpointing.
        model._unsloth_gradient_checkpointing = model._unsloth_gradient_checkpointing or True
    dataset = dataset_of([row for step in steps for batch in _batches(step, fit.micro_batch) for row in batch])
    if engine.end_to_end:  # Unsloth does so with tokenised rows only if their dataset vouches for their length (rl.py)
        dataset._unsloth_truncated_to = training.run.settings.max_length
    trainer = _Trainer(
        model=model,
        args=_arguments(training, fit),
        train_dataset=dataset,
        processing_class=training.chat.tokenizer,
        callbacks=[RunCallback(training)],
    )
    trainer.training, trainer.fit = training, fit
    shares = [preflight.deal([len(row.input_ids) for row in step], this_rank().count, int) for step in steps]
    trainer.checkpointed = [any(preflight.checkpointed_in(fit, share, engine) for share in each) for each in shares]
    free = [step for step, checkpointed in zip(steps, trainer.checkpointed, strict=True) if not checkpointed]
    if fit.graphs and free:
        batches = [batch for step in free for batch in _batches(step, fit.micro_batch)]
        mine = batches[this_rank().number :: this_rank().count]
        tokens = [sum(len(row.input_ids) for row in batch) for batch in mine]
        trainer.graphs = Graphs(model, fit.micro_batch, tokens, unpacked=fit.unpacked)
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: {**collate(rows), "lengths": [len(row["input_ids"]) for row in rows]}
    # TRL 1.14 casts the adapter of a quantised model to bfloat16. A T4 has none, its eight bits lose small updates, and
    # a resumed run would go on in float32 instead, where PEFT puts adapters; so float32 it is from the start.
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapter:
        parameter.data = parameter.data.float()
    this_rank().average([parameter.data for parameter in adapter])  # which two kinds of GPU may have drawn differently
    # DistributedDataParallel averages in hooks, which a graph does not call, and takes no model with sharded weights.
    trainer.accelerator.prepare_model = functools.partial(trainer.accelerator.prepare_model, evaluation_mode=True)
    model.train()
    return trainer


def dataset_of(order: Sequence[Example]) -> Dataset:
    """The rows as the trainer reads them, each stored once, however many epochs it is in."""
    unique = {id(row): row for row in order}
    places = {key: place for place, key in enumerate(unique)}
    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in unique.values()]
    return Dataset.from_list(rows).select([places[id(row)] for row in order])


def _batches(step: list[Example], micro_batch: int) -> Iterator[list[Example]]:
    """A step's micro-batches in the order in which its ranks read them: each one in turn, its longest rows first.

    So accelerate gives batches out (BatchSamplerShard). Where the run's last step has too few rows for whole rounds, it
    would take some of the first step's, so rows of which nothing is learned make them up. With the longest first, rows
    of like length share a micro-batch, and memory runs out at once if ever.
    """
    count = this_rank().count
    shares = preflight.deal(step, count, lambda row: len(row.input_ids))
    if count > 1:
        nothing = Example(0, step[-1].input_ids[:2], [IGNORED, IGNORED], truncated=False)
        length = -(-max(map(len, shares)) // micro_batch) * micro_batch
        shares = [share + [nothing] * (length - len(share)) for share in shares]
    for start in range(0, len(shares[0]), micro_batch):
        yield from (share[start : start + micro_batch] for share in shares)


def _arguments(training: Training, fit: records.Fit) -> SFTConfig:
    """What the trainer is told."""
    run, engine, steps = training.run, training.engine, len(training.steps)
    settings = run.settings
    # Unsloth brings its own chunked loss; TRL's (1.14) leaves out what Granite's logits are divided by.
    chunked = engine.name == "transformers" and getattr(training.model.config, "logits_scaling", None) in (None, 1)
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.path / "tensorboard"))
    rate = preflight.learning_rate(run, preflight.Shape.of(training.model.config)).learning_rate
    return SFTConfig(
        output_dir=str(run.path / "checkpoints"),
        per_device_train_batch_size=fit.micro_batch,
        gradient_accumulation_steps=settings.batch_size // this_rank().count // fit.micro_batch,
        average_tokens_across_devices=True,  # a token weighs the same, whichever rank has it
        max_steps=steps,
        learning_rate=rate,
        weight_decay=settings.weight_decay,
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
        report_to=settings.report_to,
        run_name=run.name,
        disable_tqdm=True,
    )


class _Trainer(SFTTrainer):  # type: ignore[misc] # trl is Any to mypy
    """One whose checkpoints are whole or absent, and go where the journal has a place for them."""

    training: Training
    fit: records.Fit
    checkpointed: list[bool]
    """Of each step whether it goes through with checkpointing: in all ranks, where one has to."""
    graphs: Graphs | None = None
    """What the others go through, where they do not go through the model's own modules."""

    @functools.cached_property
    def _switches(self) -> dict[Any, Any]:
        """The modules in which the Trainer has turned checkpointing on, and what turns it on in them."""
        flags = {module: getattr(module, "gradient_checkpointing", False) for module in self.model.modules()}
        return {module: flag for module, flag in flags.items() if flag}

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of a micro-batch, whose gradients are added up; those of a step are averaged over the ranks."""
        checkpointed = self.checkpointed[self.state.global_step]
        if self.fit.checkpoint_above:
            for module, flag in self._switches.items():
                module.gradient_checkpointing = flag if checkpointed else False
        lengths = inputs.pop("lengths", None)
        if self.graphs and not checkpointed:
            ready = self._prepare_inputs(inputs)
            count = num_items_in_batch / this_rank().count  # as in the Trainer's own loss, which is averaged over ranks
            loss = self.graphs(ready["input_ids"], ready["labels"], lengths, count)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            groups = self.optimizer.param_groups
            this_rank().average([parameter.grad for group in groups for parameter in group["params"]])
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of `share_of_peak`."""
        part = functools.partial(share_of_peak, self.training.run.settings, steps=num_training_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, part)
        return self.lr_scheduler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def write(folder: Path) -> None:
            self.args.output_dir = str(folder.parent)
            super(_Trainer, self)._save_checkpoint(model, trial)
            (folder / TRAINING_ARGS_NAME).unlink()  # a pickle, which nothing reads

        self.training.journal.checkpoint(self.state.global_step, write)

    def store_flos(self) -> None:
        """Count no operations: nothing reads the sum, and all ranks would have to meet where only the first saves."""


class RunCallback(TrainerCallback):  # type: ignore[misc] # transformers is Any to mypy
    """Steps and checkpoints as events; a checkpoint when it is due or a stop was asked for."""

    def __init__(self, training: Training):
        """`training.steps` are the planned examples, by which tokens are counted."""
        self._training = training
        self._overflows = 0  # steps in a row whose gradient was not finite

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clocks."""
        self._saved = self._last = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seed what dropout is drawn from: other in each rank, and the same where a resumed run does a step again."""
        torch.manual_seed(args.seed + state.global_step * this_rank().count + this_rank().number)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide whether to save and whether to go on: the first rank does, for all."""
        training, now = self._training, time.monotonic()
        due = now - self._saved >= 60 * training.run.settings.checkpoint_minutes
        ended = training.stop.asked or training.over(state.global_step)
        ended, due = this_rank().all_gather((ended, due))[0]
        control.should_training_stop = control.should_training_stop or ended
        if ended or due or state.global_step >= state.max_steps:
            control.should_save, self._saved = True, now

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
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
        self._training.journal.write(
            records.Step(
                step=state.global_step,
                loss=loss,
                learning_rate=float(logs["learning_rate"]),
                gradient_norm=norm if math.isfinite(norm) else None,  # such a step is left out, and the scaling halved
                tokens=sum(len(example.input_ids) for example in self._training.steps[state.global_step - 1]),
                seconds=now - self._last,
            )
        )
        self._training.after_step(state.global_step)
        self._last = time.monotonic()
