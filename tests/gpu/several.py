"""Two GPUs against one: tokens/s and losses, by runs as a user starts them. Not run yet: it wants a machine with two.

Usage: several.py MODEL_FOLDER ROWS.json FOLDER [ENGINE ...]. Each engine (transformers and unsloth without any) trains
the same 240 rows twice, 8 a step and 4 at once on each GPU: alone in two micro-batches, and by two GPUs in one each.
Steps 6 to 30 are counted. Prints JSON: both speeds, their ratio (the aim is 1.8), and how far the losses of a step are
apart at most (the aim is 1 %).
"""

import dataclasses
import json
import statistics
import sys

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.runs import records

WARM, ROWS = 5, 240


def trained(settings: Settings, gpus: int) -> Run:
    """A finished run on so many GPUs."""
    return finetune(dataclasses.replace(settings, gpus=gpus), f"{settings.engine}-{gpus}")


def speed(run: Run) -> float:
    """Tokens a second of its warm steps."""
    warm = run.steps[WARM:]
    return sum(step.tokens for step in warm) / sum(step.seconds for step in warm)


def main(model: str, rows: str, folder: str, *engines: str) -> None:
    """Train, compare and print."""
    for engine in engines or ("transformers", "unsloth"):
        settings = Settings(
            model=model, data=rows, subset=ROWS, held_out=8, batch_size=8, micro_batch=4, engine=engine,
            evaluate_every=1_000, checkpoint_minutes=60.0, runs_dir=folder,
        )  # fmt: skip
        one, two = trained(settings, 1), trained(settings, 2)
        apart = [abs(a.loss - b.loss) / b.loss for a, b in zip(two.steps, one.steps, strict=True)]
        found = {
            "engine": engine,
            "device": two.environment.device,
            "versions": two.environment.versions,
            "tokens_per_second": [round(speed(run)) for run in (one, two)],
            "ratio": round(speed(two) / speed(one), 3),
            "largest_difference_of_losses": max(apart),
            "median_step": [
                round(statistics.median(step.seconds for step in run.steps[WARM:]), 4) for run in (one, two)
            ],
            "peak_gib": [round(run.last(records.Memory).peak / 2**30, 2) for run in (one, two)],
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
