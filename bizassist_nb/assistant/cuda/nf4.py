"""Products of a few vectors with a base's matrices, which are in bitsandbytes' NF4.

On a GPU our own kernel (`nf4.cu`) computes them. It takes about as long for four vectors as for one; bitsandbytes'
spends more time on each vector's arithmetic than on reading the weights. NVIDIA's run-time compiler, which torch
depends on, compiles it for this GPU. Elsewhere bitsandbytes computes them.
"""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources
from typing import Any, Final

import torch

from bizassist_nb.core.errors import brief

_TOGETHER: Final = 3
"""Matrices that the kernel can compute in one go."""
_OUTPUTS, _CHUNK, _BLOCK, _THREADS = 16, 128, 64, 256
"""Outputs of a program, weights it takes at a time, weights that share a scale, threads: as in the kernel."""


@dataclasses.dataclass(frozen=True)
class Matrix:
    """W (n, k) in NF4."""

    weights: torch.Tensor
    """Two to a byte, the first in its higher half."""
    state: Any
    """What bitsandbytes knows of them: its quant_state."""
    scales: torch.Tensor | None
    """(n, k / 64), float32; None where bitsandbytes computes its products."""
    table: tuple[float, ...]
    """The 16 values; on the host, as nothing can be asked of a GPU while a graph is captured."""
    unpacked: torch.Tensor | None = None
    """W in 16 bits, with which cuBLAS computes the products of many vectors."""

    @classmethod
    def of(cls, weight: Any, dtype: torch.dtype, *, unpacked: bool = False) -> "Matrix":
        """From bitsandbytes' parameter, for vectors of that dtype: a few, or many of them with `unpacked`."""
        from bitsandbytes.functional import dequantize_4bit

        state, table = weight.quant_state, tuple(weight.quant_state.code.tolist())
        if unpacked:
            return cls(weight.data, state, None, table, dequantize_4bit(weight.data, state).to(dtype))
        ours = computable(state) and usable(weight.device, dtype)
        return cls(weight.data, state, scales(state) if ours else None, table)


def computable(state: Any) -> bool:
    """Whether the kernel computes products with such a matrix."""
    n, k = state.shape
    return bool(state.quant_type == "nf4") and state.blocksize == _BLOCK and n % _OUTPUTS == 0 and k % _CHUNK == 0


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel can be compiled for that device: tensor cores are Turing's or later, for bfloat16 Ampere's."""
    least = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}
    if device.type != "cuda" or dtype not in least:
        return False
    return torch.cuda.get_device_capability(device) >= least[dtype] and problem(device, dtype) is None


@functools.cache
def problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be compiled, or the driver does not load it; None if it does."""
    try:
        _kernel(1, dtype, tuple(map(float, range(16))), device)
    except (ImportError, RuntimeError) as error:
        return brief(error)
    return None


def scales(state: Any) -> torch.Tensor:
    """The scales (n, k / 64) of a quant_state in float32; mostly they are themselves stored in 8 bits."""
    from bitsandbytes.functional import dequantize_blockwise

    found = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    n, k = state.shape
    return torch.as_tensor(found).float().view(n, k // _BLOCK)


def products(x: torch.Tensor, matrices: Sequence[Matrix]) -> list[torch.Tensor]:
    """x (rows, k) through each W (n, k), of which there are three at most: x W^T (rows, n), in the dtype of x."""
    if unpacked := [matrix.unpacked for matrix in matrices if matrix.unpacked is not None]:
        return [torch.nn.functional.linear(x, each) for each in unpacked]
    if any(matrix.scales is None for matrix in matrices):
        from bitsandbytes import matmul_4bit

        return [matmul_4bit(x, matrix.weights, quant_state=matrix.state) for matrix in matrices]
    from cuda.bindings import driver

    assert len(matrices) <= _TOGETHER
    assert x.is_contiguous()
    outs = [x.new_empty(x.shape[0], matrix.state.shape[0]) for matrix in matrices]
    values: list[Any] = [x.data_ptr(), x.shape[1]]
    for matrix, out in zip(matrices, outs, strict=True):
        values += [tensor.data_ptr() for tensor in (matrix.weights, matrix.scales, out) if tensor is not None]
        values.append(out.shape[1] // _OUTPUTS)
    values += [0] * 4 * (_TOGETHER - len(matrices))
    types = [ctypes.c_void_p, ctypes.c_int, *[*[ctypes.c_void_p] * 3, ctypes.c_int] * _TOGETHER]
    programs = sum(out.shape[1] for out in outs) // _OUTPUTS
    kernel = _kernel(x.shape[0], x.dtype, matrices[0].table, x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    arguments = (tuple(values), tuple(types))
    _checked(driver.cuLaunchKernel(kernel, programs, 1, 1, _THREADS, 1, 1, 0, stream, arguments, 0))
    return outs


@functools.cache
def _kernel(rows: int, dtype: torch.dtype, table: tuple[float, ...], device: torch.device) -> Any:
    """Compiled and loaded."""
    from cuda.bindings import driver

    code = compiled(rows, dtype, table, torch.cuda.get_device_capability(device))
    return _checked(driver.cuModuleGetFunction(_checked(driver.cuModuleLoadData(code)), b"product"))


def compiled(rows: int, dtype: torch.dtype, table: Sequence[float], capability: tuple[int, int]) -> bytes:
    """The kernel's machine code for so many rows, for GPUs of that compute capability.

    Raises:
        RuntimeError: if it cannot be compiled, with the compiler's words.
    """
    from cuda.bindings import nvrtc

    name = "sm_{}{}".format(*capability)
    options = [f"--gpu-architecture={name}", *definitions(rows, dtype, table)]
    if capability < (8, 0):
        options.append("-DTURING")
    program = _checked(nvrtc.nvrtcCreateProgram(source().encode(), b"nf4.cu", 0, [], []))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status:
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        words = log.decode().rstrip("\0 \n")
        raise RuntimeError(f"nf4.cu cannot be compiled for {name}: {words}")
    code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    return bytes(code)


def source() -> str:
    """The kernel, in CUDA's C++."""
    return (resources.files(__package__) / "nf4.cu").read_text("utf-8")


def definitions(rows: int, dtype: torch.dtype, table: Sequence[float]) -> list[str]:
    """What it is compiled for, as options of a compiler."""
    bits = torch.tensor(table).to(dtype).view(torch.int16).tolist()
    kind = ["-DBFLOAT16"] if dtype == torch.bfloat16 else []
    return [f"-DROWS={rows}", f"-DTABLE={','.join(str(each & 0xFFFF) for each in bits)}", *kind]


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status:
        raise RuntimeError(f"{type(status).__name__}: {status.name}")
    return values[0] if values else None
