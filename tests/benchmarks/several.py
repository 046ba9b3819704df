"""How a run grows over GPUs, on paper: python tests/benchmarks/several.py prints the table of docs/several-gpus.md.

Each GPU has the whole base in NF4 and 4 rows a step. With N of them a step takes

    compute + exchange + scoring

    compute    one GPU's step of 4 rows of 212 tokens: of 7B as measured, by CUDA graphs (docs/benchmarks.md: 0.073 s);
               of 70B that, times what `preflight` expects of the two shapes
    exchange   bytes / bandwidth + 2 (N - 1) x 10 us, with bytes = 2 (N - 1) / N x adapter weights x 4: a ring
               all-reduce of float32 gradients, none of it hidden behind the backward pass
    scoring    1.0 s once in 48 steps of one GPU (7B, measured), 70B as for compute; N share it, N times as often
    bandwidth  inside a machine of 8 GPUs NVLink; between machines the network card that all 8 share. The slower counts

Memory of a GPU is what `preflight` expects, and a second copy of the gradients, which is averaged. 7B has room for its
matrices in 16 bits besides, 70B has not.
"""

from typing import Final

from transformers import MistralConfig

from bizassist_nb.runs.records import Engine, Fit
from bizassist_nb.training.preflight import Device, Placement, Shape

MISTRAL: Final = Shape.of(MistralConfig(vocab_size=32768))
"""7B v0.3."""
LLAMA_70B: Final = Shape(
    layers=80, hidden=8192, intermediate=28672, query=8192, key_value=1024, vocabulary=128256, tied=False
)
RANK: Final = 16
ROWS: Final = [212] * 4
"""Tokens of a GPU's rows in a step: 848, the mean of the run that was measured."""
MEASURED: Final = 0.073
"""Seconds of a step of those rows on one H100, Mistral-7B."""
SCORING: Final = 1.0 / 48
"""Seconds of a step, spread: 64 held-out rows, once in 48 steps."""
NVLINK: Final = 46e9
"""Bytes a second, one way, inside a machine: 168 MB in 3.67 ms between two H100s, copies included (2026-11-27)."""
NETWORKS: Final = {"8 x 400 Gbit/s": 400e9, "100 Gbit/s": 12.5e9}
"""Bytes a second, one way, of a machine's network cards."""
ENGINE: Final = Engine(name="transformers", reason="measured", graphs=True)
H100: Final = Device("cuda:0", (9, 0), 79.0)
FIT: Final = Fit(micro_batch=4, checkpointing=False, precision="bfloat16", reason="on paper", graphs=True)
UNPACKED: Final = Fit(
    micro_batch=4, checkpointing=False, precision="bfloat16", reason="measured", graphs=True, unpacked=True
)


def step(shape: Shape, gpus: int, network: float) -> tuple[float, float, float]:
    """(seconds of a step, of which exchange, bytes that each GPU sends) of so many GPUs."""
    fit = UNPACKED if shape is MISTRAL else FIT
    known = Placement(MISTRAL, RANK, ENGINE, H100).work([ROWS], UNPACKED)
    times = Placement(shape, RANK, ENGINE, H100).work([ROWS], fit) / known
    sent = 2 * (gpus - 1) / gpus * shape.adapter(RANK) * 4
    bandwidth = NVLINK if gpus <= 8 else min(NVLINK, network)
    exchange = sent / bandwidth + 2 * (gpus - 1) * 1e-5
    return (MEASURED + SCORING) * times + exchange, exchange, sent


def table() -> str:
    """The table, in Markdown."""
    lines = [
        "| base | network | GPUs | tokens/s | times one GPU | sent a step and GPU | exchange | GiB a GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, shape in (("7B", MISTRAL), ("70B", LLAMA_70B)):
        one = sum(ROWS) / step(shape, 1, NVLINK)[0]
        for gpus in (1, 2, 4, 8, 16, 32, 64):
            inside = {"NVLink" if gpus > 1 else "none": NVLINK}
            for network, bandwidth in (NETWORKS if gpus > 8 else inside).items():
                seconds, exchange, sent = step(shape, gpus, bandwidth)
                speed = gpus * sum(ROWS) / seconds
                place = Placement(shape, RANK, ENGINE, H100)
                memory = place.need(ROWS, checkpointing=False) + (place.unpacked if shape is MISTRAL else 0)
                memory += shape.adapter(RANK) * 4 / 2**30 if gpus > 1 else 0
                lines.append(
                    f"| {name} | {network} | {gpus} | {speed:,.0f} | {speed / one:.2f} | {sent / 1e6:,.0f} MB | "
                    f"{1000 * exchange:.1f} ms, {exchange / seconds:.1%} | {memory:.1f} |"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
