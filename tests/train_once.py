"""Train a few steps with one engine, in a process of its own (Unsloth patches its libraries for good).

Usage: train_once.py ENGINE MODEL_FOLDER RUN_FOLDER. Prints JSON: which weights moved, and the losses.
"""

import json
import sys
from pathlib import Path

import torch

from bizassist_nb.api import Run
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import read_table, split
from bizassist_nb.models import base as models
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.spool import SpoolingJournal
from bizassist_nb.training.stop import Stop


def snapshot(model):
    """Every parameter's bytes, and of 4-bit ones the scales that belong to them."""
    values = {}
    for name, parameter in model.named_parameters():
        values[name] = parameter.detach().clone()
        if state := getattr(parameter, "quant_state", None):
            values[f"{name}.absmax"] = state.absmax.clone()
    return values


def main(engine_name: str, folder: str, run_folder: str) -> None:
    settings = Settings(
        model=folder, data="sample", subset=8, held_out=2, max_length=512, engine=engine_name, warmup_steps=0, seed=1
    )
    path = Path(run_folder)
    path.mkdir()
    (path / "settings.toml").write_text(settings.to_toml())
    engine = engines.choose(settings.engine)
    if engine.name == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    from bizassist_nb.training.trainer import Training, plan, train

    chat = models.load_tokenizer(folder)
    rows, _ = split(read_table("sample").rows, subset=8, held_out=2, seed=1)
    examples, _ = chat.examples(rows, system_prompt="", max_length=512)
    base = models.resolve(folder)
    model = engines.load(engine, base, settings, checkpointing=False)
    before = snapshot(model)
    run = Run(path)
    steps = plan(examples, settings)
    place = preflight.Placement(preflight.shape(base.source), settings.rank, engine, preflight.device())
    fit, _ = preflight.estimate(place, settings, [[len(row.input_ids) for row in step] for step in steps])
    train(Training(run, SpoolingJournal(path), Stop(), engine, model, chat, steps), fit)
    after = snapshot(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    print(
        json.dumps(
            {
                "adapter": sum("lora_" in name for name in before),
                "moved": sum("lora_" in name for name in moved),
                "base": sum("lora_" not in name for name in before),
                "four_bit": sum(name.endswith(".absmax") for name in before),
                "base_moved": [name for name in moved if "lora_" not in name],
                "losses": [step.loss for step in run.steps],
            }
        )
    )


main(*sys.argv[1:])
