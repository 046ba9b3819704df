"""RAM of training on a CPU: estimated and measured. Usage: cpu_memory.py ENGINE MODEL_FOLDER [RANK]

Single steps of rows of some lengths go through our trainer; the peak is the process's own (VmHWM), reset before each.
What the allocator keeps of the steps before counts too, so lengths rise. Prints a JSON line for each.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

from bizassist_nb import Settings
from bizassist_nb.api import Run
from bizassist_nb.data.tokens import Example
from bizassist_nb.models import base as models
from bizassist_nb.runs import records
from bizassist_nb.training import engines, preflight

SHAPES = [(64,) * 4, (128,) * 4, (256,) * 4, (384, 100, 100, 100)]


def high_water() -> float:
    """GiB of RAM at the highest since the last reset."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**20


def main(engine_name: str, folder: str, rank: str = "16") -> None:
    engine = engines.choose(engine_name)
    if engine.name == "unsloth":
        import unsloth  # noqa: F401 - before everything it patches
    from bizassist_nb.training import trainer
    from bizassist_nb.training.spool import SpoolingJournal
    from bizassist_nb.training.stop import Stop

    base = models.resolve(folder)
    shape, on, draw, stop = preflight.shape(base.source), preflight.device(), random.Random(0), Stop()
    for checkpointing in (True, False):
        settings = Settings(model=folder, rank=int(rank), engine=engine_name, warmup_steps=0)
        model = engines.load(engine, base, settings, checkpointing=checkpointing)
        for rows in SHAPES:
            ids = [[draw.randrange(1000, 30000) for _ in range(length)] for length in rows]
            step = [Example(n, row, row, truncated=False) for n, row in enumerate(ids)]
            chat = models.load_tokenizer(base.source)
            with tempfile.TemporaryDirectory() as path:
                (Path(path) / "settings.toml").write_text(settings.to_toml())
                fit = records.Fit(micro_batch=4, checkpointing=checkpointing, precision=on.precision, reason="measured")
                Path("/proc/self/clear_refs").write_text("5")
                training = trainer.Training(
                    Run(Path(path)), SpoolingJournal(Path(path)), stop, engine, model, chat, [step] * 2
                )
                trainer.train(training, fit)
            parts = preflight.Placement(shape, settings.rank, engine, on).peak(rows, checkpointing=checkpointing)
            expected, measured = preflight.PROCESS_RAM[on.name] + sum(parts.values()), high_water()
            found = {
                "model": base.name, "engine": engine.name, "rank": settings.rank, "rows": rows,
                "checkpointing": checkpointing, "estimate": round(expected, 2), "measured": round(measured, 2),
                "off": round(expected / measured - 1, 3), "parts": {k: round(v, 2) for k, v in parts.items()},
            }  # fmt: skip
            print(json.dumps(found), flush=True)


main(*sys.argv[1:])
