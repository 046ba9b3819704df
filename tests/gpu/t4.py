"""Train a run as on a T4, on any larger GPU: float16, and 14.5 GiB. Usage: t4.py RUN_DIRECTORY [--unaware]

The allocator gives out 14.5 GiB at most, no more counts as free, and this package sees compute capability 7.5. Its
libraries see the GPU that is there, as they compile kernels for it. With --unaware all of the GPU counts as free: steps
are then cut too large, and memory runs out. Speed is not a T4's.
"""

import dataclasses
import sys

import torch

ROOM = 14.5 * 2**30


def pretend(aware: bool = True, as_fast: bool = False) -> None:
    """Make this package see a T4 in this process. Unsloth, if it is used, has to be imported before.

    With `as_fast` it sees this GPU's compute capability, so steps are cut for its speed, and only memory is a T4's.
    """
    from bizassist_nb.models import base as models
    from bizassist_nb.training import preflight

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(ROOM / total)
    models.compute_dtype = lambda: torch.float16
    real = preflight.device

    def device() -> preflight.Device:
        free = (ROOM - torch.cuda.memory_reserved()) / preflight.GIB if aware else real().free
        found = real()
        return dataclasses.replace(found, capability=found.capability if as_fast else (7, 5), free=free)

    preflight.device = device


if __name__ == "__main__":
    import unsloth  # noqa: F401 - before everything it patches

    pretend(aware="--unaware" not in sys.argv)
    from bizassist_nb.training.worker import main

    status = main(sys.argv[1])
    print(f"peak: {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved", flush=True)
    sys.exit(status)
