"""Whether GPU kernels can be compiled and run here: that takes a C compiler, and a driver that knows the code."""

import functools
import subprocess

from bizassist_nb.core.errors import brief, out_of_memory


@functools.cache
def triton_problem() -> str | None:
    """Why this GPU runs no kernel of Triton's; None if it does."""
    import torch

    try:
        from triton.errors import TritonError

        from bizassist_nb.assistant.cuda import kernels
    except ImportError as error:
        return brief(error)
    ones = torch.ones(1, 16, device="cuda")
    try:
        kernels.rms_norm[(1,)](ones, ones[0], torch.empty_like(ones), 1e-5, H=16, BLOCK=16)
        torch.cuda.synchronize()
    except (RuntimeError, OSError, subprocess.SubprocessError, TritonError) as error:
        if out_of_memory(error):
            raise
        return brief(error)
    return None
