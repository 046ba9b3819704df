"""The processes (ranks) that train one run together, as each of them sees itself. A run on one device has one."""

import dataclasses
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

from bizassist_nb.core.errors import BizassistError, RunError
from bizassist_nb.core.files import write_atomic

T = TypeVar("T")

LAUNCHER: Final = "BIZASSIST_LAUNCHER"
"""Environment variable with the number of the process that launched the ranks of this machine."""
SHARDED: Final = "ACCELERATE_USE_FSDP"
"""Environment variable by which `accelerate launch` says that a configuration is for FSDP."""
FIT: Final = "BIZASSIST_FIT"
"""Environment variable with the fit to go on with (JSON), where the ranks are launched anew as memory ran out."""
_POLL: Final = 0.2
"""Seconds between looks at whether the launcher is still there."""
_PATIENCE: Final = timedelta(hours=12)
"""How long the others wait for the first rank, which may score alone. One that died is noticed by the launcher."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """One of the processes of a run, and what they tell each other."""

    number: int = 0
    """Counted from 0. The first alone writes the run directory."""
    count: int = 1
    beside: int = 1
    """How many of them are on this machine."""
    sharded: bool = False
    """Whether the base is spread over them (`training.distributed.fsdp`). Then all have to take part in every
    forward pass; else the first alone scores and answers."""

    @property
    def first(self) -> bool:
        """Whether it is the one that writes."""
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

    def shares(self, rows: Sequence[T]) -> list[list[T]]:
        """Rank r gets rows r, r + count, …: where rows are sorted by length, loads are even."""
        return [list(rows[number :: self.count]) for number in range(self.count)]

    def longest(self, lengths: Sequence[int]) -> list[int]:
        """The share of a step that has its longest rows, by their tokens; it is the first rank's."""
        return self.shares(sorted(lengths, reverse=True))[0]

    def one_at_a_time(self, work: Callable[[], T]) -> T:
        """Have the ranks of each machine do this one after the other, as far as the base is sharded; what it gives."""
        if not self.sharded:
            return work()
        found: list[T] = []
        for turn in range(self.beside):
            if turn == self.number % self.beside:
                found.append(work())
            self.barrier()
        return found[0]

    def barrier(self) -> None:
        """Wait until all are here."""
        import torch

        if self.count > 1:
            torch.distributed.barrier()

    def broadcast(self, answers: Sequence[bool]) -> list[bool]:
        """The first rank's answers, in every rank."""
        return [bool(answer) for answer in self._collective("broadcast", answers, 0)]

    def all_reduce_min(self, number: float) -> float:
        """The least of all ranks' numbers."""
        import torch

        return self._collective("all_reduce", [number], torch.distributed.ReduceOp.MIN)[0]

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in every rank."""
        import torch

        found: list[Any] = [value] * self.count
        if self.count > 1:
            torch.distributed.all_gather_object(found, value)
        return found

    def _collective(self, name: str, numbers: Sequence[float], how: Any) -> list[float]:
        import torch

        if self.count == 1:
            return list(numbers)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
        getattr(torch.distributed, name)(tensor, how)
        return [float(number) for number in tensor.tolist()]


class NoRoomError(RunError):
    """Memory ran out in this rank; `fit` is what is to be tried next (the fields of a `preflight.Fit`)."""

    def __init__(self, fit: dict[str, Any]):
        """Say so, for where nobody launches the ranks anew."""
        self.fit = fit
        super().__init__(
            f"{fit['reason']}. Over several machines a run does not go on with less by itself: start it under a new "
            f"name, with micro_batch = {fit['micro_batch']} or a lower max_length"
        )


@functools.cache
def this_rank() -> Rank:
    """The rank that this process is, which torch's launcher says in its environment."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Rank()
    number, count, beside = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Rank(number, count, beside, os.environ.get(SHARDED) == "true")


def scorers() -> Rank:
    """This rank among those that score and answer: all of them where the base is sharded, else it alone."""
    return this_rank() if this_rank().sharded else Rank()


def end_with_launcher() -> None:
    """End this process at once when the one that launched it is gone.

    The launcher gives each rank a session of its own (torch/distributed/elastic, subprocess_handler.py), so a kill of
    the run's process group does not reach them.
    """
    launcher = int(os.environ.get(LAUNCHER, os.getppid()))  # which may be gone already

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_POLL)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def leave_reason(message: str, error: Exception) -> None:
    """Tell the launcher why this rank fails, in the file and form that torch's errors have (ErrorHandler)."""
    rank = this_rank()
    extra = {
        "timestamp": str(int(time.time())),
        "time": time.time(),
        "expected": isinstance(error, BizassistError),
        "fit": error.fit if isinstance(error, NoRoomError) and rank.beside == rank.count else None,
    }
    text = json.dumps({"message": {"message": message, "extraInfo": extra}})
    # Whole or absent: the launcher, which fails over half of it, may end this rank while it writes.
    write_atomic(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), lambda part: part.write_text(text, "utf-8"))
