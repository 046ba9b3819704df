"""Starting a worker process for a run, and following it to its end."""

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

from bizassist_nb.core.errors import RunError, brief
from bizassist_nb.core.settings import Settings, cache
from bizassist_nb.data.rows import check_beginning
from bizassist_nb.data.sources import VARIABLE
from bizassist_nb.data.tables import write_parquet
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal, beat, is_locked, take_lock, write_worker
from bizassist_nb.runs.run import ENDED, SEVERAL, WORKER, RunDirectory, check_name, free_name
from bizassist_nb.training.distributed.launcher import processes

_POLL = 0.25
"""Seconds between looks at a run that is being followed."""
WARNED: Final = 1.0
"""Seconds that "stopping" is shown before a second request, which ends the run at once, counts: no double click."""


def follow(begin: Callable[[], RunDirectory], show: Callable[[RunDirectory], None] = lambda _: None) -> RunDirectory:
    """Call `show` with the run that `begin` gives until it has ended; interrupts stop it, as `api.finetune` says.

    Raises:
        RunError: if the run failed, with the reason.
    """
    with _Interrupts() as interrupts:
        run = begin()
        interrupts.go_to(run)
        while True:
            # After its last event the process still has to end.
            ended = run.status in (*ENDED, "out of reach") and not run.alive
            show(run)
            interrupts.shown()
            if ended:
                break
            time.sleep(_POLL)  # a run tells of itself in files alone
    if interrupts.count < 2 and run.error:
        raise RunError(f"run {run.name!r} {run.status}: {run.error}")
    return run


def start(
    settings: Settings, name: str | None = None, *, data: Any = None, resume: bool = False, replace: bool = False
) -> RunDirectory:
    """Start training in the background. A name is made up if none is given.

    `data` is a table in place of what the settings name. `resume` goes on with the run of that name, `replace` moves
    it to the bin and begins anew.

    Raises:
        RunError: if the name cannot be used: taken, busy, or nothing there to resume.
        SettingsError: if there are fewer GPUs than asked for, or their configuration cannot be used.
        DataError: if the first rows of a file or table already tell that it cannot be used.
    """
    if data is not None:
        if resume:
            raise RunError("a run that is resumed has its rows already: leave data out")
        if not VARIABLE.fullmatch(settings.data):
            settings = dataclasses.replace(settings, data="{data}")
    path = settings.run_path(check_name(name) if name is not None else free_name(settings))
    try:
        if resume:
            return _started(RunDirectory.resume(path, settings))
        processes(settings)  # what cannot be done here is refused before the folder is made
        with tempfile.TemporaryDirectory() as folder:
            kept = None if data is None else write_parquet(Path(folder) / f"{settings.data[1:-1]}.parquet", data)
            check_beginning(dataclasses.replace(settings, data=str(kept)) if kept else settings)
            return _started(RunDirectory.create(path, settings, replace=replace, kept=kept))
    except OSError as error:
        raise RunError(
            f"{path.absolute()} cannot be written ({brief(error)}); see to it that there is room and that you may "
            "write there, or take another runs_dir"
        ) from error


def _started(run: RunDirectory) -> RunDirectory:
    module = SEVERAL if processes(run.settings).count > 1 else WORKER
    lock = take_lock(run.path, patience=20 if run.status in ENDED else 0.2)
    # A stop that arrives while the worker is still importing must wait until it listens; masks are inherited.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        os.truncate(lock, 0)  # an earlier worker left its process id there
        Journal(run.path).write(records.State(state="starting"))
        beat(run.path, time.time())  # the worker's own come when it has imported its libraries
        with (run.path / "worker.log").open("ab") as log:
            worker = subprocess.Popen(  # noqa: S603 - no shell, our own module
                [sys.executable, "-m", module, str(run.path.absolute())],
                stdin=lock,  # every process of the run inherits it
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # closing the notebook or interrupting the kernel leaves it alone
                env=_environment(one_gpu=module == WORKER),
            )
        write_worker(lock, worker.pid)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(lock)  # the worker has its own
    return run


def begin(
    settings: Settings, name: str | None = None, *, data: Any = None, resume: bool = False, replace: bool = False
) -> RunDirectory:
    """`start`; but where the run that is to be resumed is being trained, that run."""
    if resume and name and data is None:
        path = settings.run_path(check_name(name))
        if is_locked(path) and RunDirectory(path).status not in ENDED:
            return RunDirectory.resume(path, settings)
    return start(settings, name, data=data, resume=resume, replace=replace)


class _Interrupts:
    """Passes interrupts on to a run, by a handler: a KeyboardInterrupt could strike while another is dealt with."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: float | None = None
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
        """Send interrupts to this run from now on, and the one that came before there was a run."""
        self._run = run
        self._send()

    def shown(self) -> None:
        """Note that the view has shown the run as it is now."""
        if self.count and self._shown is None:
            self._shown = time.monotonic()

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if not self.count or (self._shown is not None and time.monotonic() - self._shown >= WARNED):
            self.count += 1
            self._send()

    def _send(self) -> None:
        if self._run and self.count:
            (self._run.stop if self.count == 1 else self._run.kill)()


def child_environment() -> dict[str, str]:
    """This process's environment with the hub's token, which Colab's Secrets give to a kernel alone."""
    from huggingface_hub import get_token

    token = get_token()
    return {**os.environ, "HF_TOKEN": token} if token else dict(os.environ)


def _environment(*, one_gpu: bool) -> dict[str, str]:
    # The Trainer of a single process that sees several GPUs gives one of them the batches of all, without a word.
    first = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    return {
        **child_environment(),
        **(first if one_gpu else {}),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1",  # it reports to its makers otherwise
        # It imports the modules that it writes: not from the run directory, which may be another person's.
        "UNSLOTH_COMPILE_LOCATION": str(cache().absolute() / "unsloth"),
    }
