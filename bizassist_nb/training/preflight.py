"""What a run will need, said before anything heavy is loaded, and how its steps are cut to fit.

Memory is counted from the base's config: how many numbers each part holds, and what each engine keeps of a token for
the way back. docs/benchmarks.md has estimates beside measured peaks.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bizassist_nb.core.rendering import duration
from bizassist_nb.core.settings import Settings
from bizassist_nb.models import base as models
from bizassist_nb.training.engines import Engine, own_kernels

GIB: Final = 2**30
_SCALES: Final = 1 / 64 + 4 / (64 * 256)
_NF4: Final = 0.5 + _SCALES
"""Bytes of a weight in NF4: 4 bits, an 8-bit scale for 64 of them, and a float32 for 256 scales (QLoRA, section 3)."""
_ADAPTER: Final = 16
"""Bytes of an adapter weight in training, in float32: itself, its gradient, and Adam's two moments."""
_SPARE: Final = 0.06
"""Share of the memory that is left alone: what the allocator cannot hand out because it lies in pieces."""
_MARGIN: Final = 0.25
"""GiB left alone besides: libraries' own workspaces, which the allocator does not see."""
_SCORING: Final = 1.5
"""GiB that held-out scoring takes on a CPU: logits, copied in line, and their logarithms (`evaluation.score`)."""
_PROCESS_RAM: Final = {"cuda:0": 1.2, "cpu": 0.6}
"""GiB of RAM of a worker without its weights: Python, torch with its kernels, and the engine."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that decide what it takes; widths are in elements."""

    layers: int
    hidden: int
    intermediate: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, as of all value heads."""
    vocabulary: int
    tied: bool
    """Whether the embeddings serve as output layer, too."""

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The numbers of a transformers config of a Llama-like decoder."""
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            query=config.num_attention_heads * head,
            key_value=config.num_key_value_heads * head,
            vocabulary=config.vocab_size,
            tied=config.tie_word_embeddings,
        )

    @property
    def linear(self) -> int:
        """Weights of the linear layers in the blocks, which are stored in 4 bits."""
        block = self.hidden * (2 * self.query + 2 * self.key_value + 3 * self.intermediate)
        return self.layers * block

    @property
    def embeddings(self) -> int:
        """Weights of the embeddings and the output layer."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """Weights of an adapter of that rank on `models.TARGETS`: each layer has one matrix in and one out."""
        attention = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key_value)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


MISTRAL: Final = Shape(
    layers=32, hidden=4096, intermediate=14336, query=4096, key_value=1024, vocabulary=32768, tied=False
)
"""Mistral-7B v0.3: known, so that a machine without it need not ask the hub."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What the run has at hand."""

    name: str
    """"cuda:0" or "cpu"."""
    capability: tuple[int, int]
    """Compute capability; (0, 0) on a CPU."""
    free: float
    """GiB that training can take: of GPU memory, or of RAM on a CPU."""
    sharing: int = 1
    """Devices over which the base is spread (FSDP)."""

    @property
    def on_gpu(self) -> bool:
        """Whether it is one."""
        return self.name != "cpu"

    @property
    def precision(self) -> str:
        """The dtype of arithmetic, as `models.compute_dtype` chooses it."""
        if not self.on_gpu:
            return "float32"
        return "bfloat16" if self.capability >= (8, 0) else "float16"

    @property
    def width(self) -> int:
        """Bytes of a number in that dtype."""
        return 2 if self.on_gpu else 4

    @property
    def memory(self) -> str:
        """What its memory is called."""
        return "GPU memory" if self.on_gpu else "RAM"


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a step is cut up, and why."""

    micro_batch: int
    """Rows that go through the model at once; it divides the batch size."""
    checkpointing: bool
    """Whether activations are computed again on the way back instead of kept, in steps that have no room for them."""
    precision: str
    """dtype of arithmetic: "bfloat16", "float16" or "float32"."""
    reason: str
    kept: int = 0
    """Micro-batches with more tokens than this are checkpointed; 0 means all of them."""
    graphs: bool = False
    """Whether passes without checkpointing are replayed as CUDA graphs."""
    unpacked: bool = False
    """With graphs: whether there is room for the base's matrices in 16 bits, too, which saves unpacking them."""

    def checkpoints(self, rows: Sequence[int], engine: Engine) -> bool:
        """Whether rows of these lengths, which go through in this fit's micro-batches, need checkpointing."""
        batches = micro_batches(rows, self.micro_batch)
        return self.checkpointing and any(_tokens(batch, engine) > self.kept for batch in batches)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a run is expected to need. All sizes in GiB."""

    fit: Fit
    parts: dict[str, float]
    """Peak memory of the device by what takes it: weights, adapter, activations, scratch."""
    free: float
    """What the device has free."""
    memory: str
    """"GPU memory" or "RAM"."""
    ram: float
    disk: float
    seconds: float | None
    """Of training; None where the speed of the device is not known."""

    @property
    def peak(self) -> float:
        """Memory of the device at its fullest, as its allocator counts it."""
        return sum(self.parts.values())

    @property
    def sentence(self) -> str:
        """The estimate in words."""
        parts = ", ".join(f"{name} {size:.1f}" for name, size in self.parts.items())
        words = f"about {self.peak:.1f} GiB of {self.memory} of {self.free:.1f} free ({parts})"
        if self.memory != "RAM":
            words += f", {self.ram:.1f} GiB of RAM"
        words += f", {self.disk:.1f} GiB of disk"
        return words if self.seconds is None else f"{words}; {duration(self.seconds)} of training"


# Per compute capability, of Unsloth: seconds in which a block is launched forward and back without checkpointing,
# operations a second, and bytes of memory a second. Hopper's are from docs/benchmarks.md. No T4 was at hand: its bytes
# are its data sheet's less a fifth, and the rest gives the 1,033.9 s that the notebook that this package grew out of
# recorded there for 1,000 Dolly rows one by one.
_SPEED: Final[dict[tuple[int, int], tuple[float, float, float]]] = {
    (7, 5): (0.011, 1.35e13, 2.5e11),
    (9, 0): (0.0063, 3.2e14, 2.5e12),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A base of that shape with an adapter of that rank, in training by an engine on a device."""

    model: Shape
    rank: int
    engine: Engine
    on: Device

    def peak(self, rows: Sequence[int], *, checkpointing: bool) -> dict[str, float]:
        """GiB that the device holds at its fullest, by what takes it, when rows of these lengths go through at once."""
        tokens = _tokens(rows, self.engine)
        block = self._kept(rows)
        inputs = self.model.hidden * self.on.width
        matrix = self.model.hidden * self.model.intermediate * self.on.width  # a weight in the dtype of arithmetic
        logits = self._logits(tokens)
        # (bytes of an adapter weight, activations, scratch) at the moments that may be the fullest
        plain = self.on.on_gpu and self.engine.name == "transformers" and not self.engine.graphs
        if not checkpointing:
            kept = tokens * (self.model.layers * block + 2 * inputs)
            if self.engine.graphs:  # what a pass holds when the logits are there stays taken
                moments = [(_ADAPTER, kept, logits)]
            else:
                moments = [(12, kept, logits)] if plain else [(_ADAPTER, kept, 2 * matrix + logits)]
        elif own_kernels(self.engine, on_gpu=self.on.on_gpu):  # it moves the blocks' inputs to RAM, all but two
            passing = tokens * (2 * inputs + block + 1.5 * self.model.intermediate * self.on.width)
            moments = [(12, 2 * tokens * inputs, logits), (_ADAPTER, passing, 2 * matrix)]
        else:  # the loss, before there are gradients, or a block on the way back
            inputs *= self.model.layers
            moments = [(12, tokens * inputs, logits), (_ADAPTER, tokens * (inputs + block), matrix)]
        adapter, activations, scratch = max(
            moments, key=lambda moment: self.model.adapter(self.rank) * moment[0] + sum(moment[1:])
        )
        return {
            "weights": self.weights,
            "adapter": self.model.adapter(self.rank) * adapter / GIB,
            "activations": activations / GIB,
            "scratch": scratch / GIB,
        }

    def need(self, rows: Sequence[int], *, checkpointing: bool) -> float:
        """The same in one number."""
        return sum(self.peak(rows, checkpointing=checkpointing).values())

    @property
    def weights(self) -> float:
        """GiB of the base; where it is spread: a device's part, scales, embeddings, the block at hand and the next."""
        spread = float(self.model.linear)
        if self.on.sharing > 1:
            spread = min(spread, spread / self.on.sharing + 2 * spread / self.model.layers)
        return (spread * 0.5 + self.model.linear * _SCALES + self.model.embeddings * self.on.width) / GIB

    @property
    def unpacked(self) -> float:
        """GiB of the base's matrices in the dtype of arithmetic."""
        return self.model.linear * self.on.width / GIB

    @property
    def room(self) -> float:
        """GiB that a run may take of the device."""
        return self.on.free * (1 - _SPARE) - _MARGIN

    def roomy(self, lengths: Sequence[Sequence[int]], size: int) -> int:
        """Tokens of the largest micro-batch of the run that fits without checkpointing, as all smaller ones do."""
        most = 0
        batches = (rows for step in lengths for rows in micro_batches(step, size))
        for rows in sorted(batches, key=lambda rows: _tokens(rows, self.engine)):
            if self.need(rows, checkpointing=False) > self.room:
                break
            most = _tokens(rows, self.engine)
        return most

    def longest_that_fits(self, *, beside: bool = False) -> int:
        """Tokens of a row that fits alone with checkpointing, a multiple of 64; 0 if none does.

        `beside` weights and adapter that are loaded already, where it is True, so that the free memory is without them.
        """
        fits = 0
        for tokens in range(64, 131_072, 64):
            parts = self.peak([tokens], checkpointing=True)
            if (
                sum(size for name, size in parts.items() if not beside or name in ("activations", "scratch"))
                > self.room
            ):
                break
            fits = tokens
        return fits

    def work(self, lengths: Sequence[Sequence[int]], fit: Fit) -> float:
        """Seconds of training: of each micro-batch, the longer of launching its kernels and running them.

        Where the device is not known they are a Hopper's, which is good enough to compare by.
        """
        launch, operations, bandwidth = _SPEED.get(self.on.capability, _SPEED[9, 0])
        launch *= self.model.layers
        read = (
            self.on.width if fit.unpacked else _NF4 + 2 * self.on.width
        )  # or read, written in 16 bits, and read again
        weights = 2 * self.model.linear * read / bandwidth
        each = (
            4 * self.model.linear / operations
        )  # a token's two passes, as gradients of the base's weights are not wanted
        seconds = 0.0
        for step in lengths:
            checkpointed = fit.checkpoints(step, self.engine)
            launches = launch * (1 if self.engine.name == "unsloth" else 0.15 if fit.graphs and not checkpointed else 2)
            batches = micro_batches(step, fit.micro_batch)
            each_takes = (max(launches, weights + each * _tokens(rows, self.engine)) for rows in batches)
            seconds += (1.5 if checkpointed else 1) * sum(each_takes)
        return seconds

    def _kept(self, rows: Sequence[int]) -> float:
        """Bytes that one block keeps of a token for the way back."""
        h, i, q, kv = self.model.hidden, self.model.intermediate, self.model.query, self.model.key_value
        if own_kernels(self.engine, on_gpu=self.on.on_gpu):
            # What goes into and comes out of both norms, attention's four, gate and up; its kernels compute the rest.
            return self.on.width * (4 * h + 4 * q + 2 * i)
        if (
            self.engine.graphs
        ):  # what goes into norms, linear layers and attention, its output, gate, up and their product
            return self.on.width * (4 * h + 4 * q + 2 * kv + 4 * i)
        if (
            not self.on.on_gpu
        ):  # as measured (tests/benchmarks/cpu_memory.py), with what the allocator of the process keeps
            return self.on.width * 7 * (h + q + i)
        # Norms go through float32. A batch with padding has a mask, with which keys and values are kept for every head.
        masked = 2 * (q - kv) + max(rows) if len(set(rows)) > 1 else 0
        return 8 * h + self.on.width * (2 * h + 2 * q + 2 * kv + 4 * i + 13 * self.rank + masked)

    def _logits(self, tokens: int) -> float:
        """Bytes of the logits that exist at once: both engines' losses go through the tokens in chunks."""
        if own_kernels(self.engine, on_gpu=self.on.on_gpu):
            return max(512, min(8192, tokens // 8)) * self.model.vocabulary * 8
        return (
            min(tokens, 1024) * self.model.vocabulary * 14
            if self.engine.graphs
            else min(tokens, 256) * self.model.vocabulary * 20
        )


def process_ram(on: Device) -> float:
    """GiB of RAM of a worker without weights and what goes through them."""
    return _PROCESS_RAM[on.name]


def device() -> Device:
    """The device of this process, with what is free on it now."""
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", (0, 0), _free_ram())
    return Device("cuda:0", torch.cuda.get_device_capability(), torch.cuda.mem_get_info()[0] / GIB)


@functools.cache
def shape(source: str) -> Shape:
    """The numbers of a base, from its config.json alone.

    Raises:
        ModelError: if it cannot be read, or is of a kind this package does not train.
    """
    if source == models.MISTRAL:
        return MISTRAL
    from transformers import AutoConfig

    try:
        return Shape.of(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, AttributeError) as error:
        raise models.unreachable("config", source, error) from error


def estimate(
    settings: Settings,
    engine: Engine,
    base: models.Base,
    lengths: Sequence[Sequence[int]] | None = None,
    on: Device | None = None,
) -> Estimate:
    """What a run of these settings will need on this machine, and how its steps are cut up.

    `lengths` has the tokens of each row, step by step; without it every row is taken to be of `max_length`. `on` is the
    device of this process where nothing else is said.
    Nothing is loaded but the base's config.json.

    Raises:
        ModelError: if that cannot be read.
    """
    if lengths is None:
        count = -(-settings.subset * settings.epochs // settings.batch_size)
        lengths = [[settings.max_length] * settings.batch_size] * min(count, 10_000)
    place = Placement(shape(base.source), settings.rank, engine, on or device())
    return estimate_on(place, settings, lengths)


def estimate_on(place: Placement, settings: Settings, lengths: Sequence[Sequence[int]]) -> Estimate:
    """`estimate` for a given device, from the tokens of each row, step by step."""
    model, engine, on = place.model, place.engine, place.on
    fit = choose(settings, place, lengths)
    rows = longest(lengths, fit.micro_batch, engine)
    parts = place.peak(rows, checkpointing=fit.checkpointing)
    if fit.unpacked:
        parts["unpacked weights"] = place.unpacked
    if fit.kept:  # the fullest may be a step that does without checkpointing
        spared = [step for step in lengths if not fit.checkpoints(step, engine)]
        whole = place.peak(longest(spared, fit.micro_batch, engine), checkpointing=False)
        parts = max(parts, whole, key=lambda found: sum(found.values()))
    # On the way to a GPU weights are mapped into RAM; on a CPU all is there.
    mapped = dataclasses.replace(place, on=dataclasses.replace(on, sharing=1)).weights
    ram = process_ram(on) + mapped if on.on_gpu else _cpu_ram(on, parts)
    if fit.checkpointing and own_kernels(engine, on_gpu=on.on_gpu):
        # That is where Unsloth moves the blocks' inputs.
        ram += _tokens(rows, engine) * model.layers * model.hidden * on.width / GIB
    saved = 3 * 12 + 2 * 4  # two checkpoints and one being written, with both moments; the adapter and the best one
    return Estimate(
        fit=fit,
        parts=parts,
        free=on.free,
        memory=on.memory,
        ram=ram,
        disk=saved * model.adapter(place.rank) / GIB,
        seconds=place.work(lengths, fit) if on.capability in _SPEED else None,  # else the device's speed is not known
    )


def _cpu_ram(on: Device, parts: dict[str, float]) -> float:
    return process_ram(on) + max(sum(parts.values()), parts["weights"] + _SCORING)


def choose(settings: Settings, place: Placement, lengths: Sequence[Sequence[int]]) -> Fit:
    """How steps are cut so that they take the least time, of all ways in which the longest rows that will occur fit.

    A step that has room for its activations goes without checkpointing, which does the forward pass twice; and fewer
    micro-batches mean fewer launches of kernels. Which of the two weighs more, the device decides (see `_SPEED`).
    """
    sizes = [settings.micro_batch] if isinstance(settings.micro_batch, int) else divisors(settings.batch_size)
    fits = [found for size in sizes if (found := _fit(settings, place, lengths, size))]
    if fits:
        return min(fits, key=lambda found: place.work(lengths, found))
    on, most = place.on, place.longest_that_fits()
    need = place.need(longest(lengths, sizes[-1], place.engine), checkpointing=True)
    reason = f"even so the longest row is expected to take {need:.1f} GiB of {on.free:.1f} free; " + (
        f"max_length = {most} would fit" if most else "the model itself is too large for this device"
    )
    return Fit(sizes[-1], True, on.precision, reason)


def _fit(settings: Settings, place: Placement, lengths: Sequence[Sequence[int]], size: int) -> Fit | None:
    """The best with micro-batches of that size; None if none fits."""
    engine, on = place.engine, place.on
    graphs = engine.graphs and settings.dropout == 0
    rows = longest(lengths, size, engine)
    whole, checkpointed = (place.need(rows, checkpointing=each) for each in (False, True))
    if whole <= place.room:
        also = place.unpacked if graphs and whole + place.unpacked <= place.room else 0
        return Fit(size, False, on.precision, _why(settings, whole + also, on), graphs=graphs, unpacked=bool(also))
    if checkpointed > place.room:
        return None
    why = f"{_why(settings, checkpointed, on)}; without checkpointing {whole:.1f}"
    found = Fit(size, True, on.precision, why, place.roomy(lengths, size), graphs)
    spared = any(not found.checkpoints(step, engine) for step in lengths)
    return found if spared else dataclasses.replace(found, kept=0, graphs=False)


def _why(settings: Settings, need: float, on: Device) -> str:
    asked = "asked for" if isinstance(settings.micro_batch, int) else f"of the {settings.batch_size} of a step"
    return f"{asked}: the longest take about {need:.1f} GiB of {on.free:.1f} free"


def divisors(batch_size: int) -> list[int]:
    """The sizes that a micro-batch can have, the largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def longest(lengths: Sequence[Sequence[int]], micro_batch: int, engine: Engine) -> list[int]:
    """The rows of the largest micro-batch that will occur."""
    batches = (rows for step in lengths for rows in micro_batches(step, micro_batch))
    return max(batches, key=lambda rows: _tokens(rows, engine))


def micro_batches(step: Sequence[int], size: int) -> Iterator[list[int]]:
    """A step's rows as they go through the model: the longest first, so that rows of like length meet."""
    ordered = sorted(step, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _tokens(rows: Sequence[int], engine: Engine) -> int:
    """Tokens of a micro-batch, padding to the longest included, unless rows are laid end to end."""
    if engine.end_to_end:
        return sum(rows)
    return len(rows) * (padded(max(rows)) if engine.graphs else max(rows))


def padded(tokens: int) -> int:
    """Tokens of a row in the smallest CUDA graph that has room for it: up to 64 by 32s, and further up an eighth of the
    power of 2 above it more each.
    """
    step = max(32, (1 << (tokens - 1).bit_length()) // 8)
    return -(-tokens // step) * step


def _free_ram() -> float:
    """GiB of RAM that could be had without swapping."""
    import psutil

    return float(psutil.virtual_memory().available / GIB)
