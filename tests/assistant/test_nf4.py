"""The GPU's 4-bit products: the kernel compiled for a CPU and run there, and compiled for GPUs."""

import ctypes
import subprocess
import sys
from pathlib import Path

import machine
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from bizassist_nb.assistant.cuda import nf4

# pyproject.toml installs it on Linux, where CI is; for macOS there is none.
needs_compiler = pytest.mark.skipif(sys.platform != "linux", reason="NVIDIA has no compiler for this system")

K = 1152
"""Nine of the 128 weights that a warp takes at a time, so that one of eight takes two."""
TALL = (32, 16, 48)
"""Outputs of three matrices that are computed in one go."""


def matrix(n: int, nested: bool = True) -> tuple[torch.Tensor, nf4.Matrix]:
    """(its values, packed) of a random one of n outputs."""
    weights = torch.randn(n, K) * torch.logspace(-3, 0, n)[:, None]
    packed, state = quantize_4bit(weights, quant_type="nf4", blocksize=64, compress_statistics=nested)
    found = nf4.Matrix(packed, state, nf4.scales(state), tuple(state.code.tolist()))
    return dequantize_4bit(packed, state), found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Compiles the kernel for a CPU: (rows, dtype) to its `run`."""
    compiler = machine.compiler()
    assert compiler, "the kernel's test compiles it; run: python tests/machine.py"
    folder = tmp_path_factory.mktemp("nf4")
    (folder / "nf4.cpp").write_text(nf4.source())

    def build(rows: int, dtype: torch.dtype):
        target = folder / f"{rows}-{dtype}.so"
        shim = Path(__file__).parents[1] / "nf4_on_cpu.h"
        command = [compiler, "-O1", "-std=c++20", "-pthread", "-shared", "-fPIC", "-w", "-include", str(shim)]
        options = nf4.definitions(rows, dtype, matrix(16)[1].table)
        subprocess.run([*command, *options, "-o", target, folder / "nf4.cpp"], check=True)
        return ctypes.CDLL(str(target)).run

    return build


@pytest.mark.parametrize("nested", [True, False])
def test_scales_are_bitsandbytes(nested):
    values, found = matrix(32, nested)
    packed = found.weights.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(32, K).long()
    mine = torch.tensor(found.table)[codes] * found.scales.repeat_interleave(64, 1)
    assert torch.equal(mine, values)


@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, torch.bfloat16), (2, torch.bfloat16), (2, torch.float16), (5, torch.bfloat16)]
)
def test_the_kernel_computes_the_products(kernel, rows, dtype):
    torch.manual_seed(rows)
    exact, matrices = zip(*(matrix(n) for n in TALL), strict=True)
    x = torch.randn(rows, K).to(dtype)
    outs = [torch.full((rows, n), torch.nan, dtype=dtype) for n in TALL]
    arguments: list[object] = [ctypes.c_void_p(x.data_ptr()), K]
    for each, out in zip(matrices, outs, strict=True):
        arguments += [ctypes.c_void_p(tensor.data_ptr()) for tensor in (each.weights, each.scales, out)]
        arguments.append(out.shape[1] // 16)
    kernel(rows, dtype)(sum(TALL) // 16, *arguments)
    for values, out in zip(exact, outs, strict=True):
        product = x.double() @ values.double().T
        # Of each output, as they differ in size by a factor of 1,000: what rounding 16 values and a sum can do.
        worst = ((out.double() - product).abs() / values.double().norm(dim=1)).max()
        assert worst < {torch.bfloat16: 0.02, torch.float16: 0.0025}[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((8, 9), torch.float16), ((9, 0), torch.bfloat16)],
)
def test_the_kernel_compiles_for_gpus(capability, dtype):
    table = matrix(16)[1].table
    for rows in (1, 2, 8):
        assert nf4.compiled(rows, dtype, table, capability).startswith(b"\x7fELF")


@needs_compiler
def test_what_cannot_be_compiled_is_said_in_the_compiler_s_words():
    with pytest.raises(RuntimeError, match=r"nf4.cu cannot be compiled for sm_90: .*\"few\" is undefined"):
        nf4.compiled("few", torch.bfloat16, matrix(16)[1].table, (9, 0))


def test_a_matrix_of_another_kind_is_left_to_bitsandbytes():
    weights = torch.randn(32, 192)
    for options in ({"quant_type": "fp4"}, {"quant_type": "nf4", "blocksize": 128}):
        _, state = quantize_4bit(torch.randn(32, 256), **options)
        assert not nf4.computable(state)
    _, narrow = quantize_4bit(weights, quant_type="nf4", blocksize=64)  # k is no multiple of 128
    assert not nf4.computable(narrow)
    assert nf4.computable(matrix(16)[1].state)
    assert not nf4.usable(torch.device("cpu"), torch.float32)
