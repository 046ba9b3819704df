"""The 4-bit products of a decode step on a GPU: ours (`nf4.cu`) against bitsandbytes'. No arguments, no model.

Prints how far each is from the exact product (relative, in the Frobenius norm), and milliseconds of all products of a
step of Mistral-7B, each with weights of its own, in a CUDA graph.
"""

import time

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import quantize_4bit

from bizassist_nb.assistant.cuda import nf4

LAYERS = 32
SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
TOGETHER = ((0, 1, 2), (3,), (4, 5), (6,))
"""Those that read the same vectors."""


def matrix(n, k, dtype):
    weights = torch.randn(n, k, device="cuda", dtype=dtype) * 0.02
    packed, state = quantize_4bit(weights, quant_type="nf4", blocksize=64, compress_statistics=True)
    return nf4.Matrix(packed, state, nf4.scales(state), tuple(state.code.tolist()))


def errors(rows, dtype, n, k):
    """(ours, bitsandbytes')."""
    found = matrix(n, k, dtype)
    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    packed = found.weights.view(-1)
    codes = torch.stack((packed >> 4, packed & 15), 1).view(n, k).long()
    weights = found.state.code.double()[codes] * found.scales.double().repeat_interleave(64, 1)
    exact = x.double() @ weights.t()
    products = nf4.products(x, [found])[0], matmul_4bit(x, found.weights, quant_state=found.state)
    return [f"{((each.double() - exact).norm() / exact.norm()).item():.2e}" for each in products]


def milliseconds(step, times=20):
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        graph.replay()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) * 1000 / times, 3)


def main():
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(0), torch.__version__)
    for dtype in (torch.bfloat16, torch.float16):
        for rows, n, k in ((1, 1024, 4096), (2, 4096, 14336), (5, 1024, 4096), (8, 2048, 5632)):
            print("off", dtype, rows, (n, k), *errors(rows, dtype, n, k))
    layers = [[matrix(n, k, torch.bfloat16) for n, k in SHAPES] for _ in range(LAYERS)]
    for rows in (1, 2, 4, 8):
        x = {k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for k in (4096, 14336)}

        def theirs(x=x):
            return [matmul_4bit(x[m.state.shape[1]], m.weights, quant_state=m.state) for layer in layers for m in layer]

        def ours(x=x):
            for layer in layers:
                for group in TOGETHER:
                    nf4.products(x[SHAPES[group[0]][1]], [layer[i] for i in group])

        print("ms", rows, "ours", milliseconds(ours), "bitsandbytes", milliseconds(theirs), flush=True)


with torch.inference_mode():
    main()
