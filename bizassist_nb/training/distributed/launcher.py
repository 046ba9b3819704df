"""One run in several processes: the same worker, started once a GPU by `accelerate launch`.

Run as `python -m bizassist_nb.training.distributed.launcher RUN_DIRECTORY` it is the process that a run's lock names.
It starts the ranks (`training.distributed.rank`), passes a stop on to rank 0, and writes why the run failed if one of
them died. The lock is its standard input, because torch's launcher passes that descriptor on: so the run is locked for
as long as any rank lives.
"""

import contextlib
import dataclasses
import importlib.util
import json
import operator
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from bizassist_nb.core.errors import SettingsError
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.runs import records
from bizassist_nb.runs.run import WORKER, RunDirectory
from bizassist_nb.training import engines
from bizassist_nb.training.distributed.rank import FIT, LAUNCHER, failure
from bizassist_nb.training.spool import SpoolingJournal, heartbeats

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_POLL: Final = 0.1
"""Seconds between looks for a rank 0 to pass a stop on to."""


def main(directory: str) -> int:
    """Launch the ranks of the run in that directory and wait for them; 0 if it finished or was stopped."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    run = RunDirectory(Path(directory))
    # Blocked, or torch's launcher would end the ranks. They inherit the mask, and unblock it when they are ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    stopping = threading.Event()
    threading.Thread(target=_pass_on_a_stop, args=(stopping,), daemon=True).start()
    os.environ[LAUNCHER] = str(os.getpid())
    # Only SIGKILL ends a rank that waits for one that is gone; it comes after so many seconds.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    worker = ["--module", WORKER, str(run.path)]
    while True:
        try:
            launch_command(launch_command_parser().parse_args([*processes(run.settings).arguments, *worker]))
            return 0
        except ChildFailedError as error:
            if run.status == "stopped":  # before training began, so the others had to be ended
                return 0
            cause, fit = _cause(error.failures.values())
            if fit and stopping.is_set():
                SpoolingJournal(run.path).write(records.State(state="stopped"))
                return 0
            if fit:
                os.environ[FIT] = json.dumps(fit)  # all go on from the last checkpoint, with less at once
                continue
        except Exception as error:  # noqa: BLE001 - the process ends here, and its run has to say why
            cause = failure(error)
        SpoolingJournal(run.path).fail(cause)
        return 1


def _pass_on_a_stop(stopping: threading.Event) -> None:
    """Wait for a SIGTERM, and pass it on to rank 0 as soon as there is one; rank 0 broadcasts it."""
    signal.sigwait({signal.SIGTERM})
    stopping.set()
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # one that has just ended, or not yet begun
                if child.environ().get("RANK") == "0":
                    child.terminate()
                    return
        time.sleep(_POLL)


def _cause(failures: "Iterable[ProcessFailure]") -> tuple[records.Error, dict[str, Any] | None]:
    """The failure that caused the others, of all ranks that failed, and the fit to go on with, if there is one."""
    causes = []
    for failed in failures:
        left = failed.error_file_data.get("message")
        if isinstance(left, dict) and "expected" in left["extraInfo"]:  # as `rank.leave_reason` writes it
            message, fit, expected = left["message"], left["extraInfo"]["fit"], left["extraInfo"]["expected"]
            # Another rank's end may cause an unexpected error, but no expected one.
            order = (False, not expected, left["extraInfo"]["timestamp"])
        else:
            end = f"by {failed.signal_name()}" if failed.exitcode < 0 else f"with status {failed.exitcode}"
            message = (
                f"one of its processes (rank {failed.local_rank} of this machine) was ended {end}, and the others "
                "with it; SIGKILL comes from a person, or from a system without memory. What was saved stays: go on "
                "with --resume"
            )
            fit, expected = None, True
            # A killed rank is noticed after the others may have failed over it. Those that did not end by themselves
            # the launcher ends, by SIGTERM and five seconds later by SIGKILL.
            order = (failed.exitcode == -signal.SIGTERM, True, failed.timestamp - 2)
        causes.append((order, records.Error(message=message, expected=expected), fit))
    _, cause, fit = min(causes, key=operator.itemgetter(0))
    return cause, fit


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes that train a run."""

    count: int
    arguments: list[str]
    """Those of `accelerate launch`, if there are several processes."""
    sharded: bool = False
    """Whether the base is sharded over them (FSDP)."""


def processes(settings: Settings) -> Processes:
    """The processes that train a run of these settings.

    Raises:
        SettingsError: if there are fewer GPUs than asked for, the configuration cannot be used, or the examples of a
            step cannot be shared out evenly; or if what `report_to` names, which they are to use, is not installed.
        EngineError: if the engine asked for cannot train a sharded base.
    """
    if (tracker := settings.report_to) != "none" and importlib.util.find_spec(tracker) is None:
        raise SettingsError([f'report_to = "{tracker}": it is not installed; pip install {tracker}, or leave this out'])
    if settings.accelerate_config:
        found = _configured(settings.accelerate_config)
        engines.choose(settings.engine, sharded=found.sharded)
    elif settings.gpus in ("auto", 1):
        return Processes(1, [])
    else:
        import torch

        there = torch.cuda.device_count()
        count = max(there, 1) if settings.gpus == "all" else int(settings.gpus)
        if count > there:
            has = f"{there} CUDA GPU{'s' if there > 1 else ''}" if there else "no CUDA GPU"
            asked, advice = json.dumps(settings.gpus), there or json.dumps("auto")
            raise SettingsError([f"gpus = {asked}: this machine has {has}; take {advice}"])
        # All of them are given, or accelerate would take the others from the user's default configuration.
        which = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--machine_rank", "0"]
        found = Processes(count, [*which, "--gpu_ids", "all", *_ANY_PORT])
    settings.share(found.count)
    # Precision and compilation are set in SFTConfig, not here.
    told = [*found.arguments, "--mixed_precision", "no", "--dynamo_backend", "no"]
    return dataclasses.replace(found, arguments=told)


_ANY_PORT: Final = ("--main_process_port", "0")
"""A free port, so that two runs do not meet."""


def _configured(name: str) -> Processes:
    """The processes of a configuration, which accelerate reads; what a run could not follow is refused."""
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

    path = user_path(name).absolute()
    try:
        config = load_config_from_file(str(path))
        why = _not_followed(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        why = f"accelerate cannot read it ({words}); write one with: accelerate config"
    if why:
        raise SettingsError([f"accelerate_config = {json.dumps(str(path))}: {why}"])
    port = _ANY_PORT if config.num_machines == 1 and config.main_process_port is None else ()
    arguments = ["--config_file", str(path), *port]
    return Processes(config.num_processes, arguments, sharded=config.distributed_type == "FSDP")


def _not_followed(config: Any) -> str | None:
    """Why a run cannot follow that configuration; None if it can."""
    import torch

    kind = getattr(config.distributed_type, "value", config.distributed_type)
    count, machines, there = config.num_processes, config.num_machines, torch.cuda.device_count()
    if kind not in ("MULTI_GPU", "FSDP"):
        return f"distributed_type is {kind}; take MULTI_GPU, or FSDP (both with use_cpu: true, too)"
    if config.parallelism_config:
        return "parallelism_config: rows, or with FSDP the base, are shared by all processes alike"
    if config.fsdp_config.get("fsdp_offload_params"):  # the other keys of FSDP change no result
        return "fsdp_offload_params: the parts of a base stay on their GPUs; take it out"
    if machines < 1 or count < 2 or count % machines:
        words = "num_processes counts those of all machines, at least 2, and each machine has the same number"
        return f"num_processes is {count} and num_machines {machines}; {words}"
    if config.use_cpu and there:
        return "use_cpu is for a machine without GPUs; take it out, or hide them (CUDA_VISIBLE_DEVICES=)"
    if not config.use_cpu and there < (here := count // machines):
        return f"it asks for {here} processes on this machine, which has {there} CUDA GPUs"
    return None


if __name__ == "__main__":
    with heartbeats(Path(sys.argv[1])):
        status = main(sys.argv[1])
    sys.exit(status)
