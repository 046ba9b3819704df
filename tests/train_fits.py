"""Train the same steps cut up in several ways, with one engine, in a process of its own.

Usage: train_fits.py ENGINE MODEL_FOLDER FOLDER. Prints JSON: for each way, the losses, how far the adapter is from the
first way's, and what the run's events say of its fits.
"""

import json
import sys
from pathlib import Path

import msgspec
import torch

from bizassist_nb.api import Run
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import read_table, split
from bizassist_nb.models import base as models
from bizassist_nb.runs import records
from bizassist_nb.training import engines
from bizassist_nb.training.spool import SpoolingJournal
from bizassist_nb.training.stop import Stop


def main(engine_name: str, folder: str, target: str) -> None:
    settings = Settings(model=folder, data="sample", subset=10, held_out=2, max_length=512, warmup_steps=0, seed=1)
    engine = engines.choose(engine_name)
    if engine.name == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    from bizassist_nb.training import trainer

    chat = models.load_tokenizer(folder)
    rows, _ = split(read_table("sample").rows, subset=10, held_out=2, seed=1)
    examples, _ = chat.examples(rows, system_prompt="", max_length=512)
    steps = trainer.plan(examples, settings)
    whole_step, whole_pass = trainer._Trainer.training_step, trainer.Graphs.__call__
    stop = Stop()
    first: list[torch.Tensor] = []
    shortest = min(len(step) * max(len(example.input_ids) for example in step) for step in steps)  # tokens, padded

    def train(
        name, micro_batch, checkpointing=False, checkpoint_above=0, graphs=False, unpacked=False, full=lambda _: False
    ):
        """`full` says of (step, rows, checkpointing) whether memory runs out, once the backward pass is through."""

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = whole_step(self, model, inputs, num_items_in_batch)
            checkpointed.append(self.is_checkpointing())
            if full((self.state.global_step, self.args.per_device_train_batch_size, self.is_checkpointing())):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss

        checkpointed: list[bool] = []

        def a_pass(self, ids, labels, lengths, count):
            through_graphs.append(len(checkpointed))
            return whole_pass(self, ids, labels, lengths, count)

        through_graphs: list[int] = []  # which passes, counted from 0
        trainer.Graphs.__call__ = a_pass
        trainer._Trainer.training_step = training_step
        trainer._Trainer.is_checkpointing = lambda self: any(
            getattr(module, "gradient_checkpointing", False) for module in self.model.modules()
        )
        path = Path(target) / name
        path.mkdir()
        (path / "settings.toml").write_text(settings.to_toml())
        model = engines.load(engine, models.resolve(folder), settings, checkpointing=checkpointing)
        fit = records.Fit(
            micro_batch=micro_batch, checkpointing=checkpointing, precision="float32", reason="asked for",
            checkpoint_above=checkpoint_above,
            graphs=graphs, unpacked=unpacked,
        )  # fmt: skip
        found: dict[str, object] = {}
        try:
            training = trainer.Training(Run(path), SpoolingJournal(path), stop, engine, model, chat, steps)
            found["done"] = trainer.train(training, fit)
        except RunError as error:
            found["error"] = str(error)
        adapter = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        first.extend(adapter if not first else [])
        run = Run(path)
        found["losses"] = [step.loss for step in run.steps]
        found["tokens"] = [step.tokens for step in run.steps]
        found["apart"] = max(float((a - b).abs().max()) for a, b in zip(first, adapter, strict=True))
        found["moved"] = max(float(a.abs().max()) for a in adapter)
        found["fits"] = [
            [e.step, e.micro_batch, e.checkpointing, e.reason] for e in run.events if isinstance(e, records.Fit)
        ]
        found["checkpointed"], found["through graphs"] = checkpointed, through_graphs
        found["checkpoints"] = [e.step for e in run.events if isinstance(e, records.Checkpoint)]
        return found

    result = {
        "4": train("4", 4),
        "sparing": train("sparing", 4, checkpointing=True, checkpoint_above=shortest, full=lambda now: not now[2]),
        "halved": train("halved", 4, full=lambda now: now[0] == 1 and now[1] == 4),
        "from the start": train("from-the-start", 4, full=lambda now: not now[2]),
        "never": train("never", 2, full=lambda now: now[0] == 2),
    }
    if engine.name == "transformers":
        result["graphs"] = train("graphs", 4, graphs=True, unpacked=True)
        result["halved graphs"] = train("halved-graphs", 4, graphs=True, full=lambda now: now[0] == 1 and now[1] == 4)
        result["sparing graphs"] = train(
            "sparing-graphs", 4, checkpointing=True, checkpoint_above=shortest, graphs=True
        )
    print(json.dumps(result | {"engine": msgspec.to_builtins(engine), "shapes": [len(step) for step in steps]}))


main(*sys.argv[1:])
