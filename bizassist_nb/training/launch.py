"""Starting a worker process for a run, and following it to its end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.core.settings import Settings
from bizassist_nb.runs.journal import Journal, is_locked, take_lock, write_worker
from bizassist_nb.runs.run import ENDED, SEVERAL, WORKER, RunDirectory, check_name, free_name
from bizassist_nb.training.distributed.launcher import processes

_POLL = 0.25
"""Seconds between looks at a run that is being followed."""


def finetune(
    settings: Settings,
    name: str | None = None,
    *,
    resume: bool = False,
    show: Callable[[RunDirectory], None] = lambda _: None,
) -> RunDirectory:
    """What `api.finetune` does, with the run as a `RunDirectory`.

    Raises:
        RunError, SettingsError: as there.
    """
    with _Interrupts() as interrupts:
        run = (_running(settings, name) if resume and name else None) or start(settings, name, resume=resume)
        interrupts.go_to(run)
        ended = False
        while not ended:
            # It still has to leave once it has said its last.
            ended = run.status in (*ENDED, "out of reach") and not run.alive
            show(run)
            if not ended:
                time.sleep(_POLL)
    if interrupts.count < 2 and run.error:
        raise RunError(f"run {run.name!r} {run.status}: {run.error}")
    return run


def start(settings: Settings, name: str | None = None, *, resume: bool = False) -> RunDirectory:
    """Start training in the background. A name is made up if none is given; `resume` goes on with the run of that name.

    Raises:
        RunError: if the name cannot be used: taken, busy, or nothing there to resume.
        SettingsError: if there are fewer GPUs than asked for, or their configuration cannot be used.
    """
    path = settings.run_path(check_name(name) if name is not None else free_name(settings))
    if not resume:
        processes(settings)  # refused before there is a folder, if it cannot be done here
    try:
        run = RunDirectory.resume(path, settings) if resume else RunDirectory.create(path, settings)
        return _started(run)
    except OSError as error:
        raise RunError(
            f"the run cannot be kept in {path.absolute()} ({brief(error)}); see to it that there is room and that you "
            "may write there, or take another runs_dir"
        ) from error


def _started(run: RunDirectory) -> RunDirectory:
    module = SEVERAL if processes(run.settings).count > 1 else WORKER
    lock = take_lock(run.path, patience=20 if run.status in ENDED else 0.2)
    # A stop that arrives while the worker is still importing must wait until it listens; masks are inherited.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        os.truncate(lock, 0)  # a worker before this one left its number there
        Journal(run.path).write("state", state="starting")
        with (run.path / "worker.log").open("ab") as log:
            worker = subprocess.Popen(  # noqa: S603 - no shell, our own module
                [sys.executable, "-m", module, str(run.path.absolute())],
                stdin=lock,  # which every process of the run has, down to the last
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # closing the notebook or interrupting the kernel leaves it alone
                env=_environment(run.path, one_gpu=module == WORKER),
            )
        write_worker(lock, worker.pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(lock)  # the worker holds it now
    return run


def _running(settings: Settings, name: str) -> RunDirectory | None:
    """The run of that name if it is being trained."""
    path = settings.run_path(check_name(name))
    return RunDirectory.resume(path, settings) if is_locked(path) and RunDirectory(path).status not in ENDED else None


class _Interrupts:
    """Passes interrupts on to a run, by a handler: a KeyboardInterrupt could strike while another is dealt with."""

    def __init__(self) -> None:
        self.count = 0
        self._run: RunDirectory | None = None

    def __enter__(self) -> Self:
        # Other threads get no interrupts, and may not set a handler.
        self._ours = threading.current_thread() is threading.main_thread()
        if self._ours:
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def go_to(self, run: RunDirectory) -> None:
        """From now on this is the run they are for; one that came before it was there goes to it, too."""
        self._run = run
        if self.count:
            self._send(run)

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self._run:
            self._send(self._run)

    def _send(self, run: RunDirectory) -> None:
        (run.stop if self.count == 1 else run.kill)()


def _environment(run_path: Path, *, one_gpu: bool) -> dict[str, str]:
    # Where the Trainer of a single process sees more, it quietly gives one of them the batches of all.
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return {
        **os.environ,
        **(first if one_gpu else {}),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",  # it reports to its makers otherwise
        "UNSLOTH_COMPILE_LOCATION": str(run_path.absolute() / ".unsloth"),  # else a folder in the working directory
    }
