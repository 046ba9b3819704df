"""The processes (ranks) that train one run together, as each of them sees itself. A run on one device has one rank."""

import dataclasses
import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from bizassist_nb.core.errors import BizassistError, RunError, without_secrets
from bizassist_nb.core.files import write_atomic
from bizassist_nb.runs import records

T = TypeVar("T")
R = TypeVar("R")

LAUNCHER: Final = "BIZASSIST_LAUNCHER"
"""Environment variable with the number of the process that launched the ranks of this machine."""
SHARDED: Final = "ACCELERATE_USE_FSDP"
"""Environment variable that `accelerate launch` sets where a configuration is for FSDP."""
FIT: Final = "BIZASSIST_FIT"
"""Environment variable with the fit to go on with (JSON), where the ranks are started again after memory ran out."""
_POLL: Final = 0.2
"""Seconds between looks at whether the launcher is still there."""
_PATIENCE: Final = timedelta(hours=12)
"""How long ranks wait for one another: rank 0 may download a base. The launcher notices a rank that has died."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """One of the processes of a run, and its exchange with the others."""

    number: int = 0
    """Counted from 0. The first alone writes the run directory."""
    count: int = 1
    beside: int = 1
    """How many ranks are on this machine."""
    sharded: bool = False
    """Whether the base is sharded over the ranks (`training.distributed.fsdp`): all take part in every pass."""

    @property
    def first(self) -> bool:
        """Whether it is rank 0, which alone writes."""
        return self.number == 0

    def join(self) -> None:
        """Join the process group and claim this process's GPU, if there is one."""
        import torch
        from accelerate import PartialState

        if not torch.cuda.is_available():
            # Else accelerate calls it "cpu:0", to which torch 2.13 can load no checkpoint (serialization.py).
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        # The model is sharded when it is loaded, not by accelerate when it is trained: that would be too late for
        # scoring, is not there for CPUs (state.py of 1.15 looks for FSDP on GPUs only), and would shard the adapter.
        os.environ.pop(SHARDED, None)
        # The Trainer will find the process group that this makes, and use it.
        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)

    def one_at_a_time(self, work: Callable[[], T]) -> T:
        """The result of `work`; if the base is sharded, the ranks of a machine work one after the other."""
        if not self.sharded:
            return work()
        for turn in range(self.beside):
            if turn == self.number % self.beside:
                found = work()
            self.barrier()
        return found

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.all_gather(None)

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in every rank."""
        import torch

        found: list[Any] = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def shared(self, items: list[T], work: Callable[[list[T]], list[R]]) -> list[R]:
        """What `work` gives of each item, in every rank; each rank does the work for its share of them."""
        everyone = self.all_gather(work(items[self.number :: self.count]))
        return [everyone[place % self.count][place // self.count] for place in range(len(items))]

    def average(self, tensors: list[Any]) -> None:
        """Set tensors of one device, the same shapes in each rank, to their means over the ranks, in one all-reduce."""
        import torch

        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        parts = torch.split(flat.div_(self.count), [tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


class RefitError(RunError):
    """All ranks have to be started again, with the fields of a `records.Fit` in `fit`; over several machines not."""

    def __init__(self, fit: dict[str, Any]):
        self.fit = fit
        super().__init__(
            f"{fit['reason']}. Over several machines a run is not started again by itself: start it under a new name, "
            f"with micro_batch = {fit['micro_batch']}, a lower max_length or another engine"
        )


@functools.cache
def this_rank() -> Rank:
    """The rank of this process, from the environment that torch's launcher sets."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Rank()
    number, count, beside = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Rank(number, count, beside, os.environ.get(SHARDED) == "true")


def end_with_launcher() -> None:
    """End this process as soon as its launcher is gone.

    The launcher gives each rank a session of its own (torch/distributed/elastic, subprocess_handler.py), so a kill of
    the run's process group does not reach them.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # which may be gone already

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def failure(error: Exception) -> records.Error:
    """The event that says why this process fails; the log gets the traceback of an error that nobody expected."""
    if isinstance(error, BizassistError):
        return records.Error(message=str(error), expected=True)
    print(without_secrets(traceback.format_exc()), file=sys.stderr)
    return records.Error(message=without_secrets(f"{type(error).__name__}: {error}"), expected=False)


def leave_reason(reason: records.Error, error: Exception) -> None:
    """Tell the launcher why this rank fails, in the file and form that torch's errors have (ErrorHandler)."""
    rank = this_rank()
    extra = {
        "timestamp": time.time(),
        "expected": reason.expected,
        "fit": error.fit if isinstance(error, RefitError) and rank.beside == rank.count else None,
    }
    text = json.dumps({"message": {"message": reason.message, "extraInfo": extra}})
    # Whole or absent: the launcher, which fails over half of it, may end this rank while it writes.
    write_atomic(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), lambda part: part.write_text(text, "utf-8"))
