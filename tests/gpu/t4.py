"""Train a run as on a T4, on any larger GPU: no bfloat16, and 14.5 GiB. Usage: t4.py RUN_DIRECTORY [--unaware]

The compute capability that libraries see is 7.5, the allocator gives out 14.5 GiB at most, and no more counts as free.
With --unaware all of the GPU counts as free: steps are then cut too large, and memory runs out. Speed is not a T4's.
"""

import sys

import torch

ROOM = 14.5 * 2**30


def pretend(aware: bool = True) -> None:
    """Make this process see a T4; before anything else looks at the device."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(ROOM / total)
    torch.cuda.get_device_capability = lambda *_: (7, 5)
    torch.cuda.is_bf16_supported = lambda *_, **__: False
    if aware:
        torch.cuda.mem_get_info = lambda *_: (int(ROOM) - torch.cuda.memory_reserved(), int(ROOM))


if __name__ == "__main__":
    pretend(aware="--unaware" not in sys.argv)
    from bizassist_nb.training.worker import main

    status = main(sys.argv[1])
    print(f"peak: {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved", flush=True)
    sys.exit(status)
