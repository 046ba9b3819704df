"""Estimates what a run will need, before anything heavy is loaded, and chooses how its steps are cut to fit.

Memory is estimated from the base's config: the size of each part, and the activations that each engine stores for the
backward pass. docs/benchmarks.md has estimates beside measured peaks.
"""

import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from bizassist_nb.core.errors import ModelError
from bizassist_nb.core.rendering import duration
from bizassist_nb.core.settings import Settings
from bizassist_nb.models import base as models
from bizassist_nb.models.named import NAMED
from bizassist_nb.runs.records import Engine, Fit, Preflight, Rate
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training.engines import own_kernels

T = TypeVar("T")
GIB: Final = 2**30
_SCALES: Final = 1 / 64 + 4 / (64 * 256)
_NF4: Final = 0.5 + _SCALES
"""Bytes of a weight in NF4: 4 bits, an 8-bit scale for 64 of them, and a float32 for 256 scales (QLoRA, section 3)."""
_ADAPTER: Final = 16
"""Bytes of an adapter weight in training, in float32: itself, its gradient, and Adam's two moments."""
_SPARE: Final = 0.06
"""Share of the memory that is not planned for: fragments that the allocator cannot use."""
_MARGIN: Final = 0.25
"""GiB besides that are not planned for: libraries' own workspaces, which the allocator does not see."""
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""What configs call the number of experts of a block."""
_SCORING: Final = 1.5
"""GiB that held-out scoring takes on a CPU: logits, copied in line, and their logarithms (`scoring.score`)."""
_TOKEN: Final = 64
"""Bytes of RAM of a training row's token: a Python integer of 32, its places in the row's ids and labels, and both in
the trainer's Arrow table."""
PROCESS_RAM: Final = {"cuda:0": 1.2, "cpu": 0.6}
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
        """The numbers of a transformers config of a Llama-like decoder.

        Raises:
            ModelError: for a mixture of experts, or a model of more than text.
        """
        if config.get_text_config() is not config:
            raise ModelError(f"{config.model_type} reads more than text, which is not trained here; take a text model")
        if several := [name for name in _EXPERTS if (getattr(config, name, None) or 1) > 1]:
            raise ModelError(
                f"{config.model_type} is a mixture of experts ({several[0]} = {getattr(config, several[0])}), whose "
                "experts get no adapter here; take a model without"
            )
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

    @property
    def learning_rate(self) -> float:
        """The peak learning rate that suits it, to two digits.

        QLoRA (Dettmers et al. 2023, table 9) trains 7B models, whose hidden size is 4096, at 2e-4. How the best rate
        falls with the hidden size, to the power of 0.781, was fitted to Llama models for "LoRA Without Regret"
        (Schulman et al. 2025; tinker_cookbook.hyperparam_utils.get_lr). It agrees with QLoRA's 1e-4 for 33B and 65B.
        """
        return float(f"{2e-4 * (4096 / self.hidden) ** 0.781:.1e}")

    def adapter(self, rank: int) -> int:
        """Weights of an adapter of that rank on all linear layers: each has one matrix in and one out."""
        attention = 2 * (self.hidden + self.query) + 2 * (self.hidden + self.key_value)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


@dataclasses.dataclass(frozen=True)
class Device:
    """The device that a run trains on."""

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
        """Whether it is a GPU."""
        return self.name != "cpu"

    @property
    def precision(self) -> str:
        """The dtype of arithmetic, as `models.compute_dtype` chooses it."""
        return "float32" if not self.on_gpu else "bfloat16" if self.capability >= (8, 0) else "float16"

    @property
    def width(self) -> int:
        """Bytes of a number in that dtype."""
        return 2 if self.on_gpu else 4


# Per compute capability, of Unsloth: seconds in which a block is launched forward and back without checkpointing,
# operations a second, bytes of memory a second, and bytes a second between GPUs (as NVLink and PCIe 3 may have).
# Hopper's are from docs/benchmarks.md. No T4 was measured: its bytes of memory are its data sheet's less a fifth, all
# else gives the 1,033.9 s that the notebook from which this package grew recorded on one for 1,000 rows one by one.
_SPEED: Final[dict[tuple[int, int], tuple[float, float, float, float]]] = {
    (7, 5): (0.011, 1.35e13, 2.5e11, 5e9),
    (9, 0): (0.0063, 3.2e14, 2.5e12, 3e11),
}


@dataclasses.dataclass(frozen=True)
class Placement:
    """A base of that shape with an adapter of that rank, in training by an engine on a device."""

    model: Shape
    rank: int
    engine: Engine
    on: Device
    ranks: int = 1
    """Among which the rows of a step are dealt."""

    def dealt(self, steps: Sequence[Sequence[int]]) -> list[list[int]]:
        """Tokens of the rows of every rank's share of the first step, then of the second, and so on."""
        # A rank without rows gets one of which nothing is learned (`trainer._batches`).
        return [share or [1] for step in steps for share in deal(step, self.ranks, int)]

    def peak(self, rows: Sequence[int], *, checkpointing: bool) -> dict[str, float]:
        """Peak memory of the device in GiB, by what takes it, when rows of these lengths go through at once."""
        tokens, block = _tokens(rows, self.engine, checkpointing=checkpointing), self._block(rows)
        inputs, layers = self.model.hidden * self.on.width, self.model.layers
        matrix = self.model.hidden * self.model.intermediate * self.on.width  # a weight in the dtype of arithmetic
        logits = self._logits(tokens)
        # (bytes of an adapter weight, activations, scratch) at the moments that may be the fullest
        if checkpointing and self.own_kernels:  # they move the blocks' inputs to RAM, all but two
            passing = tokens * (2 * inputs + block + 1.5 * self.model.intermediate * self.on.width)
            moments = [(12, 2 * tokens * inputs, logits), (_ADAPTER, passing, 2 * matrix)]
        elif checkpointing:  # the loss, before there are gradients, or a block in the backward pass
            inputs *= layers
            moments = [(12, tokens * inputs, logits), (_ADAPTER, tokens * (inputs + block), matrix)]
        else:  # the loss; what a graph takes then stays taken
            plain = self.on.on_gpu and self.engine.name == "transformers"
            gradients = 12 if plain and not self.engine.graphs else _ADAPTER
            moments = [(gradients, tokens * (layers * block + 2 * inputs), logits if plain else 2 * matrix + logits)]
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
        """The sum of `peak`."""
        return sum(self.peak(rows, checkpointing=checkpointing).values())

    @property
    def weights(self) -> float:
        """GiB of the base; where it is spread: a device's part, scales, embeddings, this block and the next."""
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

    def longest_that_fits(self, *, beside: bool = False) -> int:
        """Tokens of a row that fits alone with checkpointing, a multiple of 64; 0 if none does.

        With `beside`, weights and adapter are loaded already, so the free memory does not include theirs.
        """

        def fits(tokens: int) -> bool:
            parts = self.peak([tokens], checkpointing=True)
            return sum(parts.values()) - (parts["weights"] + parts["adapter"]) * beside <= self.room

        return max(itertools.takewhile(fits, range(64, 131_072, 64)), default=0)

    def work(self, lengths: Sequence[Sequence[int]], fit: Fit) -> float:
        """Seconds of training: a micro-batch takes as long as launching its kernels or running them, what is longer.

        `lengths` are as `dealt` gives them: a step takes as long as its longest share, and an all-reduce of gradients.
        A device that is not in `_SPEED` counts as a Hopper GPU, which is good enough to compare ways of cutting.
        """
        launch, operations, bandwidth, link = _SPEED.get(self.on.capability, _SPEED[9, 0])
        launch *= self.model.layers
        # Weights are read in 16 bits, or read in 4, written in 16 and read again.
        read = self.on.width if fit.unpacked else _NF4 + 2 * self.on.width
        weights = 2 * self.model.linear * read / bandwidth
        each = 4 * self.model.linear / operations  # of a token's two passes, without gradients of the base's weights
        exchange = 2 * (self.ranks - 1) / self.ranks * self.model.adapter(self.rank) * 4 / link
        seconds = []
        for step in lengths:
            checkpointed = checkpointed_in(fit, step, self.engine)
            launches = launch * (1 if self.engine.name == "unsloth" else 0.15 if fit.graphs and not checkpointed else 2)
            batches = micro_batches(step, fit.micro_batch)
            tokens = (_tokens(rows, self.engine, checkpointing=checkpointed) for rows in batches)
            each_takes = (max(launches, weights + each * some) for some in tokens)
            seconds.append((1.5 if checkpointed else 1) * sum(each_takes))
        starts = range(0, len(seconds), self.ranks)
        return sum(max(seconds[start : start + self.ranks]) + exchange for start in starts)

    @property
    def own_kernels(self) -> bool:
        """Whether the engine computes by kernels of its own."""
        return own_kernels(self.engine, on_gpu=self.on.on_gpu)

    def _block(self, rows: Sequence[int]) -> float:
        """Bytes of activations that one block stores of a token for the backward pass."""
        h, i, q, kv = self.model.hidden, self.model.intermediate, self.model.query, self.model.key_value
        if self.own_kernels:  # inputs and outputs of both norms, attention's four, gate and up; the rest is recomputed
            return self.on.width * (4 * h + 4 * q + 2 * i)
        if self.engine.graphs:  # inputs of norms, linear layers and attention, its output, gate, up and their product
            return self.on.width * (4 * h + 3 * q + 2 * kv + 4 * i)
        if not self.on.on_gpu:  # measured (tests/benchmarks/cpu_memory.py), with what the process's allocator retains
            return self.on.width * 7 * (h + q + i)
        # Norms go through float32. A batch with padding has a mask, and with it keys and values of every head.
        masked = 2 * (q - kv) + max(rows) if len(set(rows)) > 1 else 0
        return 8 * h + self.on.width * (2 * h + 2 * q + 2 * kv + 4 * i + 13 * self.rank + masked)

    def _logits(self, tokens: int) -> float:
        """Bytes of the logits that exist at once: both engines' losses go through the tokens in chunks."""
        if self.own_kernels:
            return max(512, min(8192, tokens // 8)) * self.model.vocabulary * 8
        chunk, each = (1024, 14) if self.engine.graphs else (256, 20)
        return min(tokens, chunk) * self.model.vocabulary * each


def device() -> Device:
    """The device of this process, with what is free on it now."""
    import psutil
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", (0, 0), psutil.virtual_memory().available / GIB)  # without swapping
    return Device("cuda:0", torch.cuda.get_device_capability(), torch.cuda.mem_get_info()[0] / GIB)


def on_t4(name: str) -> float:
    """GiB that training the named base takes on a T4: plain transformers, rank 16, a row of 512 tokens at once."""
    engine = Engine(name="transformers", reason="")
    place = Placement(Shape(**NAMED[name].numbers), 16, engine, Device("cuda:0", (7, 5), 14.6))
    return place.need([512], checkpointing=False)


@functools.cache
def shape(source: str, commit: str | None = None) -> Shape:
    """The numbers of a base, from its config.json alone.

    Raises:
        ModelError: if it cannot be read, or is of a kind this package does not train.
    """
    from transformers import AutoConfig

    try:
        return Shape.of(AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False))
    except (OSError, ValueError, AttributeError) as error:
        raise models.unreachable("config", source, error) from error


def learning_rate(run: RunDirectory, model: Shape) -> Rate:
    """The run's peak learning rate, and why: its own if it is resumed, else its settings' or the model's."""
    if found := run.last(Rate):
        return found
    asked = run.settings.learning_rate
    if not isinstance(asked, str):
        return Rate(learning_rate=asked, reason="asked for")
    return Rate(learning_rate=model.learning_rate, reason=f"auto, from the model's hidden size of {model.hidden:,}")


def estimate(place: Placement, settings: Settings, steps: Sequence[Sequence[int]]) -> tuple[Fit, Preflight]:
    """(how steps are cut up, what the run will need); `steps` are its rows' tokens by step."""
    if settings.dropout:  # a graph would drop the same each time
        place = dataclasses.replace(place, engine=msgspec.structs.replace(place.engine, graphs=False))
    model, engine, on, lengths = place.model, place.engine, place.on, place.dealt(steps)
    fit = choose(settings.share(place.ranks), place, lengths)
    rows = largest(lengths, fit.micro_batch, engine, checkpointing=fit.checkpointing)[-1]
    parts = place.peak(rows, checkpointing=fit.checkpointing)
    if fit.unpacked:
        parts["unpacked weights"] = place.unpacked
    if fit.checkpoint_above:  # the fullest may be a step that does without checkpointing
        spared = [step for step in lengths if not checkpointed_in(fit, step, engine)]
        whole = place.peak(largest(spared, fit.micro_batch, engine)[-1], checkpointing=False)
        parts = max(parts, whole, key=lambda found: sum(found.values()))
    ram = PROCESS_RAM[on.name] + sum(map(sum, lengths)) / settings.epochs * _TOKEN / GIB
    if on.on_gpu:  # weights are mapped into RAM on their way there
        ram += dataclasses.replace(place, on=dataclasses.replace(on, sharing=1)).weights
    else:
        ram += max(sum(parts.values()), parts["weights"] + _SCORING)
    if fit.checkpointing and place.own_kernels:  # Unsloth moves the blocks' inputs there
        ram += _tokens(rows, engine) * model.layers * model.hidden * on.width / GIB
    saved = 3 * 12 + 2 * 4  # two checkpoints and one being written, with both moments; the adapter and the best one
    found = Preflight(
        sentence="",
        peak=sum(parts.values()),
        parts=parts,
        free=on.free,
        memory="GPU memory" if on.on_gpu else "RAM",
        ram=ram,
        disk=saved * model.adapter(place.rank) / GIB,
        seconds=place.work(lengths, fit) if on.capability in _SPEED else None,  # else the device's speed is not known
    )
    reason = fit.reason + _slower(place, settings, steps)
    return msgspec.structs.replace(fit, reason=reason), msgspec.structs.replace(found, sentence=_sentence(found))


def _sentence(found: Preflight) -> str:
    parts = ", ".join(f"{name} {size:.1f}" for name, size in found.parts.items())
    ram = "" if found.memory == "RAM" else f", {found.ram:.1f} GiB of RAM"
    time = "" if found.seconds is None else f"; {duration(found.seconds)} of training"
    of = f"{found.memory} of {found.free:.1f} free ({parts})"
    return f"about {found.peak:.1f} GiB of {of}{ram}, {found.disk:.1f} GiB of disk{time}"


def _slower(place: Placement, settings: Settings, steps: Sequence[Sequence[int]]) -> str:
    """Words for where so many ranks take no less time than one, with the batch_size from which they pay.

    Not where the base is spread over them, since one device may have no room for it.
    """

    def takes(ranks: int, times: int) -> float:
        at, batch = dataclasses.replace(place, ranks=ranks), times * settings.batch_size
        lengths = at.dealt([[*itertools.chain(*steps[s : s + times])] for s in range(0, len(steps), times)])
        return at.work(lengths, choose(dataclasses.replace(settings, batch_size=batch).share(ranks), at, lengths))

    known = place.ranks > 1 and place.on.sharing == 1 and place.on.capability in _SPEED
    if not known or takes(place.ranks, 1) < takes(1, 1):
        return ""
    pays = [times for times in (2, 4, 8, 16) if takes(place.ranks, times) < takes(1, times)]
    more = f"they pay from batch_size = {pays[0] * settings.batch_size} on" if pays else 'take gpus = "auto"'
    return f"; {place.ranks} GPUs take no less time than one ({duration(takes(1, 1))}), {more}"


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
    need = place.need(largest(lengths, sizes[-1], place.engine, checkpointing=True)[-1], checkpointing=True)
    reason = f"even so the longest row is expected to take {need:.1f} GiB of {on.free:.1f} free; " + (
        f"max_length = {most} would fit" if most else "the model itself is too large for this device"
    )
    return Fit(micro_batch=sizes[-1], checkpointing=True, precision=on.precision, reason=reason)


def _fit(settings: Settings, place: Placement, lengths: Sequence[Sequence[int]], size: int) -> Fit | None:
    """The best with micro-batches of that size; None if none fits."""
    engine, on = place.engine, place.on
    batches = largest(lengths, size, engine)
    longest = largest(lengths, size, engine, checkpointing=True)[-1]
    whole, checkpointed = place.need(batches[-1], checkpointing=False), place.need(longest, checkpointing=True)
    fits = whole <= place.room
    if not fits and checkpointed > place.room:
        return None
    unpacked = fits and engine.graphs and whole + place.unpacked <= place.room
    need = (whole + place.unpacked * unpacked) if fits else checkpointed
    asked = "asked for" if isinstance(settings.micro_batch, int) else f"of the {settings.batch_size} of a step"
    why = f"{asked}: the longest take about {need:.1f} GiB of {on.free:.1f} free"
    fit = Fit(micro_batch=size, checkpointing=not fits, precision=on.precision, reason=why)
    if fits:
        return msgspec.structs.replace(fit, graphs=engine.graphs, unpacked=unpacked)
    roomy = itertools.takewhile(lambda rows: place.need(rows, checkpointing=False) <= place.room, batches)
    most = max((_tokens(rows, engine) for rows in roomy), default=0)
    fit = msgspec.structs.replace(fit, reason=f"{why}; without checkpointing {whole:.1f}")
    sparing = msgspec.structs.replace(fit, checkpoint_above=most, graphs=engine.graphs)
    return sparing if any(not checkpointed_in(sparing, step, engine) for step in lengths) else fit


def checkpointed_in(fit: Fit, rows: Sequence[int], engine: Engine) -> bool:
    """Whether rows of these lengths, which go through in the fit's micro-batches, need checkpointing."""
    batches = micro_batches(rows, fit.micro_batch)
    return fit.checkpointing and any(_tokens(batch, engine) > fit.checkpoint_above for batch in batches)


def deal(rows: Sequence[T], ranks: int, tokens: Callable[[T], int]) -> list[list[T]]:
    """The rows of a step for each rank, by falling length: the longest first, each to the rank with the fewest tokens.

    No rank gets more rows than its part of the step, rounded up (the longest-processing-time rule, Graham 1969).
    """
    shares: list[list[T]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]  # a heap of those with room
    for row in sorted(rows, key=tokens, reverse=True):
        load, rank = heapq.heappop(loads)
        shares[rank].append(row)
        if len(shares[rank]) < len(rows) / ranks:
            heapq.heappush(loads, (load + tokens(row), rank))
    return shares


def divisors(batch_size: int) -> list[int]:
    """The sizes that a micro-batch can have, the largest first."""
    return [size for size in range(batch_size, 0, -1) if batch_size % size == 0]


def largest(
    lengths: Sequence[Sequence[int]], size: int, engine: Engine, *, checkpointing: bool = False
) -> list[list[int]]:
    """The micro-batches of a run, the largest last."""
    batches = (rows for step in lengths for rows in micro_batches(step, size))
    return sorted(batches, key=lambda rows: _tokens(rows, engine, checkpointing=checkpointing))


def micro_batches(step: Sequence[int], size: int) -> Iterator[list[int]]:
    """A step's rows as they go through the model: the longest first, so that rows of like length meet."""
    ordered = sorted(step, reverse=True)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _tokens(rows: Sequence[int], engine: Engine, *, checkpointing: bool = False) -> int:
    """Tokens of a micro-batch, padding to the longest included, unless rows lie end to end, as in CUDA graphs.

    A step with checkpointing does not go through a graph.
    """
    if engine.end_to_end:
        return sum(rows)
    return padded(sum(rows)) if engine.graphs and not checkpointing else len(rows) * max(rows)


def padded(tokens: int) -> int:
    """Tokens of the smallest pass that may be captured as a CUDA graph and has room for so many."""
    return -(-tokens // 64) * 64
