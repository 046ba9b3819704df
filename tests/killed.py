"""Trains a run whose workers are killed again and again, each at another moment, and resumed until it has finished.

Run as `python killed.py SETTINGS.toml NAME KILLS SEED`. Its workers are forked from this process, which has imported
all that they need: 100 real processes, killed by real signals, in minutes. Half of them are killed after a random time,
half at one of the operations on files that Python reports (PEP 578): between any two in saving, or while an event is
written. It prints what was left each time, and how it ended, as JSON.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from bizassist_nb.api import Run
from bizassist_nb.core.settings import Settings
from bizassist_nb.results import degeneration
from bizassist_nb.runs import records
from bizassist_nb.training import launch, worker

FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree", "shutil.copyfile")


class Death:
    """What happens to the next worker: it is killed at so many operations on files of its run, or after a time."""

    def __init__(self, operation: int | None, seconds: float | None):
        self._left, self._seconds = operation, seconds

    def await_it(self, run: str) -> None:
        """In the worker: be there."""
        if self._left is not None:
            sys.addaudithook(lambda event, arguments: self._on_event(run, event, arguments))
        elif self._seconds is not None:
            threading.Timer(self._seconds, die).start()

    def _on_event(self, run: str, event: str, arguments: tuple) -> None:
        if event not in FILES or not str(arguments[0]).startswith(run):
            return
        self._left -= 1
        if self._left == 0:
            print(f"killed at {event} {str(arguments[0])[len(run) :]}", flush=True)
            die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def forked(death: Death):
    """What stands in for subprocess.Popen: the worker's own main, in a fork of this process."""

    def popen(command, *, stdout, env, **_):
        if pid := os.fork():
            return SimpleNamespace(pid=pid)
        os.setsid()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        os.environ.update(env)
        run = str(Path(command[-1]).absolute())
        death.await_it(run)
        os._exit(worker.main(run))

    return popen


def operations(settings: Settings, name: str) -> tuple[int, float]:
    """How many operations on files, and how many seconds, a whole run takes; trained under that name."""
    counted = settings.run_path(name).parent / "operations"

    class Counting(Death):
        def __init__(self):
            super().__init__(None, None)

        def await_it(self, run):
            def count(event, arguments):
                if event in FILES and str(arguments[0]).startswith(run):
                    os.write(descriptor, b".")

            descriptor = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            sys.addaudithook(count)

    start = time.monotonic()
    train(settings, name, Counting(), resume=False)
    return counted.stat().st_size, time.monotonic() - start


def train(settings: Settings, name: str, death: Death, *, resume: bool) -> int:
    """Start a worker, and wait for its end."""
    subprocess.Popen = forked(death)
    launch.start(settings, name, resume=resume)
    _, status = os.wait()
    return status


def main(file: str, name: str, kills: int, seed: int) -> None:
    import torch

    from bizassist_nb.training import (
        evaluation,
        fixed_prompts,
        scoring,
    )

    torch.set_num_threads(1)
    # The model has nothing to say and knows nothing: a few words and rows do.
    fixed_prompts.max_new_tokens = lambda: 8
    scoring._BATCH_LOGITS //= 16
    fixed_prompts.prompts = lambda: degeneration.prompts()[:12]
    whole = evaluation.EvaluationSet.__init__

    def short(evaluation_set, *arguments):
        whole(evaluation_set, *arguments)
        evaluation_set.general = evaluation_set.general[:4]

    evaluation.EvaluationSet.__init__ = short
    settings = Settings.from_toml(Path(file).read_text("utf-8"))
    count, seconds = operations(settings, f"{name}-whole")
    chance = random.Random(seed)
    deaths, ends, resume = [], [], False
    while len(deaths) < kills:
        at_file = chance.random() < 0.5
        death = Death(chance.randrange(1, count), None) if at_file else Death(None, chance.uniform(0.05, seconds))
        if train(settings, name, death, resume=resume) == signal.SIGKILL:
            deaths.append(look(settings, name))
            resume = deaths[-1]["events"] > 0
        else:  # it was quicker than its death; the next run has to end like the first, too
            ends.append(end(settings, name, len(ends)))
            resume = False
    train(settings, name, Death(None, None), resume=resume)
    ends.append(end(settings, name, len(ends)))
    print(json.dumps({"operations": count, "seconds": seconds, "deaths": deaths, "ends": ends}))


def look(settings: Settings, name: str) -> dict[str, object]:
    """What is left of a run whose worker was killed."""
    run = Run(settings.run_path(name))
    saved, resumed = (((event := run.last(kind)) and event.step) or 0 for kind in (records.Checkpoint, records.Resumed))
    return {
        "state": (state := run.last(records.State)) and state.state,
        "events": len(run.events),
        "steps": len(run.steps),
        "checkpoint": max(saved, resumed),
        "resumed": resumed,
        "log": run.log(1)[-1:],
    }


def end(settings: Settings, name: str, number: int) -> dict[str, object]:
    """How a run ended that was left in peace at last; it is put aside."""
    run = Run(settings.run_path(name))
    found = {"status": run.status, "same": same(settings, name), "steps": len(run.steps), "left": leftovers(run.path)}
    run.path.rename(run.path.with_name(f"{name}-{number}"))
    return found


def leftovers(run: Path) -> list[str]:
    """Half-written files and folders that lie about in it."""
    return [str(path.relative_to(run)) for path in run.rglob(".*") if path.suffix in (".part", ".old")]


def same(settings: Settings, name: str) -> bool:
    """Whether its adapter is that of the run that nothing happened to, byte for byte."""
    files = [settings.run_path(one) / "adapter" / "adapter_model.safetensors" for one in (name, f"{name}-whole")]
    return files[0].read_bytes() == files[1].read_bytes()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
