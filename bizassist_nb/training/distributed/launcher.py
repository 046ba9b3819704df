"""One run in several processes: the same worker, started once a GPU by `accelerate launch`.

Run as `python -m bizassist_nb.training.distributed.launcher RUN_DIRECTORY` it is the process that a run's lock names.
It starts the ranks (`training.distributed.rank`), passes a stop on to the first of them, and writes down why the run
failed where one of them died. The lock is its standard input: of its descriptors the one that torch's launcher hands
down, so that it is held for as long as any rank lives.
"""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from bizassist_nb.core.errors import BizassistError, SettingsError, without_secrets
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.runs.run import WORKER, RunDirectory
from bizassist_nb.training import engines
from bizassist_nb.training.distributed.rank import FIT, LAUNCHER
from bizassist_nb.training.spool import SpoolingJournal

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_POLL: Final = 0.1
"""Seconds between looks at whether there is a first rank to pass a stop on to."""


def main(directory: str) -> int:
    """Launch the ranks of the run in that directory and wait for them; 0 if it finished or was stopped."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    run = RunDirectory(Path(directory))
    # Never delivered: the launcher would end the ranks by it. They inherit this, and listen when they are ready to.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    stopping = threading.Event()
    threading.Thread(target=_pass_on_a_stop, args=(stopping,), daemon=True).start()
    os.environ[LAUNCHER] = str(os.getpid())
    # A rank that waits for one that is gone hears nothing else than SIGKILL; so many seconds it has to end by itself.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    worker = ["--module", WORKER, str(run.path)]
    while True:
        try:
            launch_command(launch_command_parser().parse_args([*processes(run.settings).arguments, *worker]))
        except ChildFailedError as error:
            if run.status == "stopped":  # before training began, so the others had to be ended
                return 0
            failure = _first(list(error.failures.values()))
            if not (fit := _told(failure).get("fit")):
                return _fail(run, *_reason(failure))
            if stopping.is_set():
                SpoolingJournal(run.path).write("state", state="stopped")
                return 0
            os.environ[FIT] = json.dumps(fit)  # memory ran out: all go on from the last checkpoint, with less at once
        except BizassistError as error:
            return _fail(run, str(error), True)
        except Exception as error:  # noqa: BLE001 - the process ends here, and its run has to say why
            print(without_secrets(traceback.format_exc()), file=sys.stderr)
            return _fail(run, without_secrets(f"{type(error).__name__}: {error}"), False)
        else:
            return 0


def _pass_on_a_stop(stopping: threading.Event) -> None:
    """Wait for a SIGTERM, and give it to the first rank as soon as there is one; it tells the others."""
    signal.sigwait({signal.SIGTERM})
    stopping.set()
    while True:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # one that has just ended, or not yet begun
                if child.environ().get("RANK") == "0":
                    child.terminate()
                    return
        time.sleep(_POLL)


def _first(failures: "list[ProcessFailure]") -> "ProcessFailure":
    """The one with which it began, of those of all ranks that did not end well."""

    def order(failure: "ProcessFailure") -> tuple[bool, bool, float]:
        told = _told(failure)
        if told:  # an error that is expected does not come of another rank's end; one that is not may
            return False, not told["expected"], told["time"]
        # One that was killed is noticed when the others may have said already that they miss it. Those that have not
        # ended by themselves the launcher ends, by SIGTERM and five seconds later by SIGKILL.
        return failure.exitcode == -signal.SIGTERM, True, failure.timestamp - 2

    return min(failures, key=order)


def _reason(failure: "ProcessFailure") -> tuple[str, bool]:
    """(why the run failed, whether that is the whole story)."""
    if told := _told(failure):
        return str(failure.error_file_data["message"]["message"]), bool(told["expected"])
    end = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with status {failure.exitcode}"
    return (
        f"one of its processes (rank {failure.local_rank} of this machine) was ended {end}, and the others with it; "
        "SIGKILL comes from a person, or from a system without memory. What was saved is kept: go on with --resume",
        True,
    )


def _told(failure: "ProcessFailure") -> dict[str, Any]:
    """What a rank left of its own error (`ranks.leave_reason`); empty if it left nothing."""
    message = failure.error_file_data.get("message")
    return dict(message["extraInfo"]) if isinstance(message, dict) and "expected" in message["extraInfo"] else {}


def _fail(run: RunDirectory, message: str, expected: bool) -> int:
    journal = SpoolingJournal(run.path)
    journal.write("error", message=message, expected=expected)
    journal.write("state", state="failed")
    return 1


# --- what accelerate is told ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Processes:
    """Those that train a run."""

    count: int
    arguments: list[str]
    """What `accelerate launch` is told about them, if there are several."""
    sharded: bool = False
    """Whether the base is spread over them (FSDP)."""


def processes(settings: Settings) -> Processes:
    """The processes that train a run of these settings.

    Raises:
        SettingsError: if there are fewer GPUs than asked for, the configuration cannot be used, or the examples of a
            step cannot be shared out evenly.
        EngineError: if the engine asked for cannot train a sharded base.
    """
    sharded = False
    if settings.accelerate_config:
        found = _configured(settings.accelerate_config)
        count, which, sharded = found.count, found.arguments, found.sharded
        engines.choose(settings.engine, processes=count, sharded=sharded)
    elif settings.gpus in ("auto", 1):
        return Processes(1, [])
    else:
        count = _gpus(settings.gpus)
        # All is said: what is not, accelerate would take from the user's default configuration.
        which = ["--multi_gpu", "--num_processes", str(count), "--num_machines", "1", "--machine_rank", "0"]
        which += ["--gpu_ids", "all", *_ANY_PORT]
    settings.share(count)
    # Precision and compilation are set in SFTConfig, not here.
    return Processes(count, [*which, "--mixed_precision", "no", "--dynamo_backend", "no"], sharded)


_ANY_PORT: Final = ("--main_process_port", "0")
"""One that is free, so that two runs do not meet."""


def _gpus(asked: int | str) -> int:
    """The number of GPUs asked for, if there are so many."""
    there = _gpu_count()
    wanted = max(there, 1) if asked == "all" else int(asked)
    if wanted <= there:
        return wanted
    has = f"{there} CUDA GPU{'s' if there > 1 else ''}" if there else "no CUDA GPU"
    raise SettingsError([f"gpus = {json.dumps(asked)}: this machine has {has}; take {there or json.dumps('auto')}"])


def _configured(name: str) -> Processes:
    """The processes of an accelerate configuration, once that is looked through."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    path = user_path(name).absolute()
    _check_syntax(path)
    try:
        config = load_config_from_file(str(path))
    except (ValueError, TypeError, KeyError) as error:
        raise _refused(path, f"accelerate does not take it: {error}") from error
    if not isinstance(config, ClusterConfig):
        raise _refused(path, "it is for a cloud service; write one for machines of your own with: accelerate config")
    count, machines = config.num_processes, config.num_machines
    kind = getattr(config.distributed_type, "value", config.distributed_type)
    if kind not in ("MULTI_GPU", "FSDP"):
        raise _refused(
            path,
            f"distributed_type is {kind}; take MULTI_GPU, where each process has the whole base, or FSDP, where they "
            "share one (both with use_cpu: true for processes without GPUs)",
        )
    if config.parallelism_config:
        raise _refused(path, "parallelism_config: rows, or with FSDP the base, are shared by all processes alike")
    if kind == "FSDP":
        _check_fsdp(path, config.fsdp_config)
    if not isinstance(count, int) or not isinstance(machines, int) or machines < 1 or count < 2 or count % machines:
        raise _refused(
            path,
            f"num_processes is {count} and num_machines {machines}; num_processes counts those of all machines, at "
            "least 2, and each machine has the same number",
        )
    here = count // machines
    if config.use_cpu and _gpu_count():
        raise _refused(path, "use_cpu is for a machine without GPUs; take it out, or hide them (CUDA_VISIBLE_DEVICES=)")
    if not config.use_cpu and _gpu_count() < here:
        raise _refused(path, f"it asks for {here} processes on this machine, which has {_gpu_count()} CUDA GPUs")
    port = _ANY_PORT if machines == 1 and config.main_process_port is None else ()
    return Processes(count, ["--config_file", str(path), *port], kind == "FSDP")


_FSDP: Final[dict[str, tuple[tuple[Any, ...], str]]] = {
    "fsdp_version": (
        (2,),
        "FSDP1, which accelerate takes where it is not said, lays the weights of a block end to end in one dtype, and "
        "those in 4 bits are bytes",
    ),
    "fsdp_reshard_after_forward": ((True,), "blocks that stay whole between a pass there and back were not tried"),
    "fsdp_auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "what is gathered at a time is one decoder block"),
    "fsdp_offload_params": ((False,), "weights in RAM were not tried"),
    "fsdp_activation_checkpointing": ((False,), "a run turns checkpointing on itself, if it has to"),
    "fsdp_cpu_ram_efficient_loading": (
        (True, False),
        "a machine's processes load the base one after the other either way",
    ),
    "fsdp_state_dict_type": (("FULL_STATE_DICT", "SHARDED_STATE_DICT"), "checkpoints are those of every run"),
}
"""What each key of `fsdp_config` may be, and why."""


def _check_fsdp(path: Path, found: dict[str, Any]) -> None:
    for key, (allowed, why) in _FSDP.items():
        value = found.get(key, 1 if key == "fsdp_version" else allowed[0])
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise _refused(path, f"{key} is {value}, and has to be {' or '.join(map(str, allowed))}: {why}")
    if unknown := sorted(found.keys() - _FSDP.keys()):
        raise _refused(path, f"{', '.join(unknown)} of fsdp_config cannot be followed; take it out")


def _gpu_count() -> int:
    import torch

    return int(torch.cuda.device_count())


def _check_syntax(path: Path) -> None:
    """Refuse a configuration that cannot be read, is not YAML (which JSON is, too), or holds no settings."""
    import yaml

    try:
        text = path.read_text("utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise _refused(path, f"it cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise _refused(path, f"it is not text in UTF-8 ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refused(path, f"line {line} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:  # a character that YAML does not know
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        raise _refused(path, f"line {line} is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise _refused(path, "line 1 begins no settings; they are lines like: num_processes: 2")


def _refused(path: Path, why: str) -> SettingsError:
    return SettingsError([f"accelerate_config = {json.dumps(str(path))}: {why}"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
