"""TRL's SFTTrainer, told exactly which rows make up each step, and a callback that reports to the run."""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from bizassist_nb import models
from bizassist_nb.data.tokens import ChatTokenizer, Example
from bizassist_nb.errors import RunError
from bizassist_nb.runs import Journal, Run
from bizassist_nb.settings import Settings
from bizassist_nb.training.checkpoints import COMPLETE
from bizassist_nb.training.engines import Engine

if TYPE_CHECKING:
    from bizassist_nb.training.worker import Stop


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


def build_trainer(
    run: Run,
    journal: Journal,
    stop: "Stop",
    engine: Engine,
    settings: Settings,
    model: Any,
    chat: ChatTokenizer,
    steps: list[list[Example]],
    after_step: Callable[[int], None] = lambda _: None,
) -> SFTTrainer:
    """An SFTTrainer for the planned steps, that writes its checkpoints and events into the run.

    `after_step` is called with each step's number when it is done; the time it takes is not the step's.
    """
    on_gpu = torch.cuda.is_available()
    micro_batch = settings.batch_size // settings.accumulation
    arguments = SFTConfig(
        output_dir=str(run.path / "checkpoints"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=len(steps),
        learning_rate=settings.learning_rate,
        warmup_steps=warmup(settings, len(steps)),
        lr_scheduler_type="linear",
        optim="adamw_8bit" if on_gpu else "adamw_torch",
        seed=settings.seed,
        train_sampling_strategy="sequential",  # the plan is the order
        max_length=settings.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenised and cut already
        loss_type="chunked_nll" if engine.name == "transformers" else "nll",  # Unsloth brings its own chunked loss
        bf16=models.compute_dtype() is torch.bfloat16,
        fp16=models.compute_dtype() is torch.float16,
        gradient_checkpointing=on_gpu and engine.name == "transformers",  # Unsloth was told when it loaded the model
        use_cpu=not on_gpu,
        save_strategy="no",  # the callback says when
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN has to be seen where it happens
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": e.input_ids, "labels": e.labels} for step in steps for e in step]
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=chat.tokenizer,
        callbacks=[RunCallback(run, journal, stop, steps, settings.checkpoint_minutes, after_step)],
    )
    # TRL 1.14 casts the adapter of a quantised model to bfloat16. A T4 has none, its eight bits lose small updates, and
    # a resumed run would go on in float32 instead, where PEFT puts adapters; so float32 it is from the start.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    return trainer


class RunCallback(TrainerCallback):  # type: ignore[misc] # transformers is Any to mypy
    """Steps and checkpoints as events; a checkpoint when it is due or a stop was asked for."""

    def __init__(
        self,
        run: Run,
        journal: Journal,
        stop: "Stop",
        steps: list[list[Example]],
        checkpoint_minutes: float,
        after_step: Callable[[int], None],
    ):
        """`steps` are the planned examples, by which tokens are counted."""
        self._run, self._journal, self._stop, self._after_step = run, journal, stop, after_step
        self._tokens = [sum(len(example.input_ids) for example in step) for step in steps]
        self._interval = 60 * checkpoint_minutes
        self._saved = self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clocks."""
        self._saved = self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Decide whether to save and whether to go on."""
        if self._stop.asked:
            control.should_training_stop = True
        last = state.global_step >= state.max_steps
        if self._stop.asked or last or time.monotonic() - self._saved >= self._interval:
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
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {state.global_step}, so training was stopped; the checkpoints "
                f"before it are kept. Try a lower learning_rate than {args.learning_rate:g}"
            )
        now = time.monotonic()
        self._journal.write(
            "step",
            step=state.global_step,
            loss=loss,
            learning_rate=float(logs["learning_rate"]),
            gradient_norm=norm if math.isfinite(norm) else None,  # fp16's loss scaling overflows now and then
            tokens=self._tokens[state.global_step - 1],
            seconds=now - self._last,
        )
        self._after_step(state.global_step)
        self._last = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as whole; the Trainer calls this when all its files are written."""
        folder = self._run.path / "checkpoints" / f"checkpoint-{state.global_step}"
        (folder / COMPLETE).touch()
        self._journal.write("checkpoint", step=state.global_step)
        self._saved = time.monotonic()
