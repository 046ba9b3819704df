"""What it costs to watch: the panel idle beside 300 runs, and the panel or a cell beside a training.

    python tests/benchmarks/watching.py idle
    python tests/benchmarks/watching.py panel
    python tests/benchmarks/watching.py cell

Processor seconds of the kernel that shows it, as a share of one core where nothing goes on, else of those of the
worker that trains; and the bytes that it sends to a front end. A minute of each. Other work on the machine changes
processor seconds little, and bytes with the number of steps.
"""

import json
import os
import queue
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bizassist_nb import Settings
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.training.launch import start

sys.path.insert(0, str(Path(__file__).parents[1]))
from live_kernel import kernel, wait_until

PANEL = "from bizassist_nb import Panel\npanel = Panel()\npanel.show()"
CELL = "%%finetune watched --resume"
"""Follows the run, whose worker lives."""
MINUTE = 60.0
RUNS = 300
SETTINGS = Settings(
    model="smollm2-135m", data="sample", subset=48, held_out=12, max_length=160, batch_size=1, epochs=1000,
    evaluate_every=1_000_000, engine="transformers",
)  # fmt: skip


def used(process: psutil.Process) -> float:
    """Processor seconds so far."""
    return sum(process.cpu_times()[:2])


def sent(client, seconds: float) -> tuple[int, int]:
    """Messages to front ends in that time, and their bytes."""
    end, count, size = time.monotonic() + seconds, 0, 0
    while (left := end - time.monotonic()) > 0:
        try:
            message = client.get_iopub_msg(timeout=left)
        except queue.Empty:
            break
        count, size = count + 1, size + len(json.dumps(message, default=str)) + sum(map(len, message["buffers"]))
    return count, size


def finished_runs(folder: Path) -> None:
    """Make runs that are over."""
    for number in range(RUNS):
        path = folder / f"run-{number}"
        path.mkdir(parents=True)
        (path / "settings.toml").write_text(SETTINGS.to_toml())
        (path / "worker.lock").touch()
        Journal(path).write(records.State(state="finished"))


def idle(folder: Path) -> None:
    """The panel beside runs that are over."""
    finished_runs(folder / "runs")
    with kernel(folder) as live:
        live.run(PANEL)
        process = psutil.Process(live.manager.provisioner.process.pid)
        sent(live.client, 30)  # until the rows of the form are read
        before = used(process)
        count, size = sent(live.client, MINUTE)
        print(f"idle with {RUNS} runs: {(used(process) - before) / MINUTE:.2%} of one core; "
              f"{count} messages, {size / 1000:.1f} kB a minute")  # fmt: skip


def training(folder: Path, shown: str) -> None:
    """The panel, or a cell, beside a training of the embedded model."""
    os.chdir(folder)
    run = start(SETTINGS, "watched")
    try:
        with kernel(folder) as live:
            live.run("%load_ext bizassist_nb")
            live.start(CELL if shown == "cell" else PANEL)
            wait_until(lambda: run.error or len(run.steps) >= 3)
            if run.error:
                sys.exit(run.error)
            mine = psutil.Process().children(recursive=True)
            (worker,) = [each for each in mine if str(run.path) in " ".join(each.cmdline())]
            process = psutil.Process(live.manager.provisioner.process.pid)
            sent(live.client, 10)
            before, steps = [used(process), used(worker)], len(run.steps)
            count, size = sent(live.client, MINUTE)
            view, work = used(process) - before[0], used(worker) - before[1]
            print(f"{shown}: {view:.2f} s of processor time beside {work:.1f} s of training ({view / work:.2%}); "
                  f"{count} messages, {size / 1000:.0f} kB a minute, {len(run.steps) - steps} steps")  # fmt: skip
    finally:
        run.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        idle(Path(name)) if sys.argv[1] == "idle" else training(Path(name), sys.argv[1])
