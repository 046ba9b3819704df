"""Memory that runs out, and the most that was taken."""

import resource
import sys
from collections.abc import Callable
from typing import TypeVar

from bizassist_nb.core.errors import out_of_memory
from bizassist_nb.runs import records
from bizassist_nb.training.distributed.rank import this_rank

T = TypeVar("T")
R = TypeVar("R")


def in_halves(work: Callable[[list[T]], list[R]], items: list[T]) -> list[R]:
    """What `work` gives for all items at once, or where memory runs out for each half of them, down to a single item.

    Not where the base is sharded: the other ranks wait for this one in the middle of a pass.
    """
    import torch

    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if len(items) == 1 or this_rank().sharded or not out_of_memory(error):
            raise
    # Only now, when the error is gone and with it the frames that hold the tensors.
    torch.cuda.empty_cache()
    half = -(-len(items) // 2)
    return in_halves(work, items[:half]) + in_halves(work, items[half:])


def peak_memory() -> records.Memory:
    """Bytes taken at most so far: of GPU memory by torch, or without a GPU of memory by this process."""
    import torch

    if torch.cuda.is_available():
        return records.Memory(of="GPU", peak=torch.cuda.max_memory_reserved())
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return records.Memory(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
