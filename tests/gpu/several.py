"""Several GPUs against one: speed, losses and the whole time, by runs as a user starts them.

Usage: several.py MODEL_FOLDER ROWS.json FOLDER [--gpus 1 2] [--engines auto unsloth] [--batch 8 16] [--rows 240].
Trains the same rows with every engine, batch_size and number of GPUs. Steps 6 and later are counted. Prints a line of
JSON for each, as soon as it is there:

    tokens_per_second           of the counted steps
    times_one, share_of_ideal   against one GPU with the same engine and batch_size; the aim is 1.8 and 1.9 of 2
    times_best                  against the fastest engine on one GPU with the same batch_size, of those before it
    largest_difference          of a step's loss from that of one GPU, relative; the aim is 0.01
    cell_to_verdict             seconds of the whole call of `finetune`, and what its parts took
    all_reduce_ms               median of 50 averages of an adapter's gradients, by processes that do nothing else

Among the engines, "fsdp" stands for a base that is sharded over the GPUs. A run of 240 rows with 7B takes about a
minute, one by Unsloth three.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.results.summary import phases
from bizassist_nb.runs import records
from bizassist_nb.training import preflight
from bizassist_nb.training.distributed.rank import this_rank

WARM, RANK = 5, 16
FSDP = "distributed_type: FSDP\nnum_machines: 1\nfsdp_config:\n  fsdp_version: 2\n"


def exchange(model: str) -> None:
    """As one of several processes: time the average of the gradients of an adapter on all linear layers."""
    rank, shape = this_rank(), preflight.shape(model)
    rank.join()
    inward = [shape.hidden] * 3 + [shape.query] + [shape.hidden] * 2 + [shape.intermediate]
    outward = [shape.query, *[shape.key_value] * 2, shape.hidden, *[shape.intermediate] * 2, shape.hidden]
    widths = list(zip(inward, outward, strict=True)) * shape.layers
    sizes = itertools.chain.from_iterable(((RANK, wide), (high, RANK)) for wide, high in widths)
    gradients = [torch.ones(size, device="cuda" if torch.cuda.is_available() else "cpu") for size in sizes]
    assert sum(each.numel() for each in gradients) == shape.adapter(RANK)
    took = []
    for _ in range(55):
        rank.barrier()
        start = time.perf_counter()
        rank.average(gradients)
        gradients[0][0, 0].item()
        took.append(time.perf_counter() - start)
    if rank.first:
        print(json.dumps({"all_reduce_ms": round(1000 * statistics.median(took[5:]), 2)}), flush=True)


def exchanged(model: str, gpus: int) -> dict[str, float]:
    """What `exchange` prints in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), __file__]
    done = subprocess.run([*command, "--exchange", model], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def speed(run: Run) -> float:
    """Tokens a second of its warm steps."""
    warm = run.steps[WARM:]
    return sum(step.tokens for step in warm) / sum(step.seconds for step in warm)


def measured(run: Run, seconds: float) -> dict[str, object]:
    """What is printed of any run."""
    engine = run.last(records.Engine)
    return {
        "device": run.environment.device,
        "engine": f"{engine.name}: {engine.reason}",
        "graphs": run.last(records.Fit).graphs,
        "micro_batch": run.last(records.Fit).micro_batch,
        "tokens_per_second": round(speed(run)),
        "median_step": round(statistics.median(step.seconds for step in run.steps[WARM:]), 4),
        "cell_to_verdict": round(seconds, 1),
        "phases": {name: round(took, 1) for name, took in phases(run).items()},
        "took": {event.what: round(event.seconds, 1) for event in run.events if isinstance(event, records.Took)},
        "peak_gib": round(run.last(records.Memory).peak / 2**30, 2),
        "expected": run.last(records.Preflight).sentence,
    }


def main(asked: argparse.Namespace) -> None:
    """Train, compare and print."""
    best: dict[int, float] = {}
    all_reduce = {gpus: exchanged(asked.model, gpus) for gpus in asked.gpus if gpus > 1}
    for batch, engine in itertools.product(asked.batch, asked.engines):
        one = None
        for gpus in sorted(asked.gpus):
            settings = Settings(
                model=asked.model, data=asked.data, subset=asked.rows, held_out=asked.held_out, batch_size=batch,
                engine="auto" if engine == "fsdp" else engine, gpus=gpus, rank=RANK, checkpoint_minutes=60.0,
                runs_dir=asked.folder,
            )  # fmt: skip
            if engine == "fsdp":
                if gpus == 1:
                    continue
                config = Path(asked.folder) / f"fsdp-{gpus}.yaml"
                config.parent.mkdir(parents=True, exist_ok=True)
                config.write_text(FSDP + f"num_processes: {gpus}\n", "utf-8")
                settings = dataclasses.replace(settings, gpus="auto", accelerate_config=str(config))
            start = time.monotonic()
            run = finetune(settings, f"{engine}-{batch}-{gpus}")
            found = {"gpus": gpus, "batch_size": batch, "asked": engine} | measured(run, time.monotonic() - start)
            if gpus == 1:
                one, best[batch] = run, max(best.get(batch, 0.0), speed(run))
            else:
                found |= all_reduce[gpus]
            if one:
                apart = [abs(a.loss - b.loss) / b.loss for a, b in zip(run.steps, one.steps, strict=True)]
                found |= {
                    "times_one": round(speed(run) / speed(one), 3),
                    "share_of_ideal": round(speed(run) / speed(one) / gpus, 3),
                    "times_best": round(speed(run) / best[batch], 3),
                    "largest_difference": max(apart),
                }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--exchange":
        exchange(sys.argv[2])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for place in ("model", "data", "folder"):
        parser.add_argument(place)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=["auto"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=64)
    main(parser.parse_args())
