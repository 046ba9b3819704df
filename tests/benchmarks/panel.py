"""What the panel costs: to show it, to draw its plot, and to the training that it shows.

    python tests/benchmarks/panel.py

Training is measured with and without the panel in one run: the kernel that shows it is halted and let go on by turns
(SIGSTOP, SIGCONT), and the steps that fell wholly into either are compared; every step is of the same two rows.
"""

import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

from bizassist_nb import Settings
from bizassist_nb.api import Run
from bizassist_nb.results.loss_plot import loss_svg
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.training.launch import start

sys.path.insert(0, str(Path(__file__).parents[1]))
from live_kernel import kernel

SHOWN = """
import time
import bizassist_nb.notebook.panel
from bizassist_nb import Panel
start = time.perf_counter()
panel = Panel()
panel.show()
print(time.perf_counter() - start)
"""
TURN = 10.0
"""Seconds for which the panel is on, then off."""


def show_seconds(folder: Path) -> float:
    """To build and show the panel in a fresh kernel, its modules imported."""
    with kernel(folder) as fresh:
        return next(float(line) for line in fresh.run(SHOWN).text.splitlines() if line[:1].isdigit())


def redraw_seconds(folder: Path, steps: int) -> float:
    """To draw the plot of a run that long, median of nine."""
    folder.mkdir()
    (folder / "settings.toml").write_text(Settings().to_toml())
    journal = Journal(folder)
    journal.write(records.Plan(steps=steps, tokens=steps))
    for step in range(1, steps + 1):
        loss = 3 / step**0.2 + random.random()
        journal.write(
            records.Step(step=step, loss=loss, learning_rate=1e-4, gradient_norm=1.0, tokens=500, seconds=1.0)
        )
    run = Run(folder)
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        loss_svg(run)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def training(folder: Path, turns: int = 24) -> None:
    """Train the embedded model, the panel being on and off by turns."""
    settings = Settings(
        model="smollm2-135m", data="sample", subset=2, held_out=12, max_length=384, batch_size=2, epochs=1000,
        evaluate_every=1_000_000, engine="transformers", runs_dir=str(folder / "runs"),
    )  # fmt: skip
    with kernel(folder) as live:
        run = start(settings, "panel")
        try:
            live.run(SHOWN)
            process = psutil.Process(live.manager.provisioner.process.pid)
            while len(run.steps) < 3:
                if run.error:
                    sys.exit(run.error)
                time.sleep(0.5)
            spans, used = [], 0.0
            for turn in range(turns):
                on = turn % 2 == 0
                process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
                before, begun = sum(process.cpu_times()[:2]), time.time()
                time.sleep(TURN)
                spans.append((on, begun, time.time()))
                used += sum(process.cpu_times()[:2]) - before
        finally:
            process.send_signal(signal.SIGCONT)
            run.kill()
    steps: dict[bool, list[float]] = {True: [], False: []}
    for event in run.events:
        for on, begun, ended in spans:
            if isinstance(event, records.Step) and begun <= event.time - event.seconds and event.time <= ended:
                steps[on].append(event.seconds)
    with_panel, without = (statistics.median(steps[on]) for on in (True, False))
    seconds = sum(ended - begun for on, begun, ended in spans if on)
    print(f"a step: {with_panel:.4f} s with the panel (median of {len(steps[True])}), {without:.4f} s without "
          f"(of {len(steps[False])}): {with_panel / without - 1:+.2%}")  # fmt: skip
    print(f"the kernel's processor time while it shows the panel: {used / seconds:.2%} of one core")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shown = sorted(show_seconds(folder) for _ in range(5))
        print(f"shown in {statistics.median(shown):.3f} s (median of 5 kernels, at most {shown[-1]:.3f})")
        for steps in (100, 10_000):
            print(f"plot of {steps:,} steps: {1000 * redraw_seconds(folder / str(steps), steps):.1f} ms")
        training(folder)
