"""Decode steps on a GPU as one CUDA graph, for models of Llama's and Mistral's shape in NF4.

A step of a few rows does little arithmetic: through the modules it is thousands of kernels, most of them LoRA's, and
starting those is what takes the time. Here a layer is its products with 4-bit matrices (`nf4.py`) and a dozen of the
kernels in `kernels.py`, captured once and replayed for every token. The modules themselves are neither changed nor
called.

Of many rows a step is arithmetic, for which the matrices are unpacked to 16 bits, where there is memory for them.
"""

import dataclasses
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer

from bizassist_nb.assistant.cuda import nf4
from bizassist_nb.assistant.cuda.compilers import triton_problem

FEW: Final = 8
"""Rows for which the products with 4-bit matrices take less time than with unpacked ones."""
_ROOM: Final = 512
"""The cache grows by so many tokens, so that most questions find the graph of the last one."""
_SPLITS: Final = 16
"""Attention cuts the cache into at least so many parts: with two rows and eight key heads, 256 programs."""
_SPLITS_OF_MANY: Final = 4
"""The same for many rows, which are programs enough."""
_PART: Final = 1024
"""Columns of an A matrix that one program multiplies."""
_GROUPS: Final = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
                  ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
"""A layer's matrices; those of a group read the same vector."""


def most_rows(model: Any, tokens: int) -> int:
    """For how many rows of so many tokens this module computes the model's steps; more go through their own modules."""
    if model.device.type != "cuda":
        return 0
    if problem := triton_problem():  # Python shows a warning once
        warnings.warn(f"answers take longer, as no GPU kernel can be compiled here ({problem})", stacklevel=1)
        return 0
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule) or not computable(model):  # a sharded one has not its whole weights here
        return 0
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    matrices = sum(2 * math.prod(_base(linear).weight.quant_state.shape) for linear in _linears(model))
    config = model.config
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * _room(tokens)
    # What is read of the prompts is there twice for a moment; a tenth is for what else comes up.
    return max(FEW, int((0.9 * free - matrices) / (2 * cache)))


def _room(tokens: int) -> int:
    return math.ceil(tokens / _ROOM) * _ROOM


def _linears(model: Any) -> list[Any]:
    return [layer.get_submodule(name) for layer in model.get_decoder().layers for names in _GROUPS for name in names]


def computable(model: Any) -> bool:
    """Whether the model has the architecture and the 4-bit matrices for it, on whichever device."""
    from bitsandbytes.nn import Linear4bit

    config = model.config
    if (
        config.model_type not in ("llama", "mistral")
        or config.hidden_act != "silu"
        or getattr(config, "sliding_window", None)
    ):
        return False
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return False  # the others change with the length
    linears = _linears(model)
    adapted = {frozenset(linear.r if isinstance(linear, LoraLayer) else ()) for linear in linears}
    bases = [_base(linear) for linear in linears]
    return (
        config.head_dim == _power_of_2(config.head_dim)
        and len(adapted) == 1
        and all(isinstance(base, Linear4bit) and base.bias is None for base in bases)
        and all(base.weight.quant_state.quant_type == "nf4" for base in bases)
    )


class FusedSteps:
    """The decode step of one set of adapters for a fixed number of rows, captured when it is first taken."""

    @torch.inference_mode()
    def __init__(self, model: Any, adapters: Sequence[str], rows: int, room: int):
        """Gather the weights; `room` is how many tokens a row may have, question and answer together."""
        from bizassist_nb.assistant.cuda import kernels

        config, decoder = model.config, model.get_decoder()
        self._kernels: Any = kernels  # imported only here, as there is no Triton without a GPU
        self.rows, self.room, self.adapters = rows, room, tuple(adapters)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head, self._hidden, self._wide = config.head_dim, config.hidden_size, config.intermediate_size
        self._eps = config.rms_norm_eps
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm.weight
        device, dtype = model.device, self._embedding.dtype
        lora = decoder.layers[0].self_attn.q_proj
        self._rank_of = {name: int(lora.r[name]) for name in self.adapters}
        # Ranks of all adapters together, rounded up to a power of 2.
        self._ranks = max(16, _power_of_2(sum(self._rank_of.values()))) if self._rank_of else 0
        self._layers = [
            [
                _Group.of(list(map(layer.get_submodule, names)), self.adapters, self._ranks, dtype, unpacked=rows > FEW)
                for names in _GROUPS
            ]
            for layer in decoder.layers
        ]
        self._norms = [
            (layer.input_layernorm.weight, layer.post_attention_layernorm.weight) for layer in decoder.layers
        ]
        self._output = model.get_output_embeddings().weight
        positions = torch.arange(room, device=device)[None]
        cos, sin = decoder.rotary_emb(self._embedding[:1, None], positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        shape = (len(self._layers), rows, self._kv_heads, room, self._head)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._start = torch.zeros(rows, dtype=torch.int32, device=device)
        self._length = torch.zeros(1, dtype=torch.int32, device=device)
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._scale = torch.zeros(rows, max(self._ranks, 1), device=device)
        self._logits = torch.empty(rows, self._output.shape[0], dtype=dtype, device=device)
        self._graph: Any = None

    @torch.inference_mode()
    def begin(self, cache: Any, mask: torch.Tensor, scales: Mapping[str, Sequence[float]]) -> None:
        """Take over after the prompt: its cache (transformers' DynamicCache), attention mask and each row's scaling.

        `scales` maps each adapter to what its output is multiplied by in every row (see `decoding.scales`).
        """
        length = mask.shape[1]
        self._living = list(range(self.rows))
        for number, layer in enumerate(cache.layers):
            self._keys[number, :, :, :length].copy_(layer.keys)
            self._values[number, :, :, :length].copy_(layer.values)
        self._length.fill_(length)
        self._start.copy_(length - mask.sum(1))
        column = 0
        for name in self.adapters:
            rank = self._rank_of[name]
            self._scale[:, column : column + rank] = torch.tensor(scales[name], device=self._scale.device)[:, None]
            column += rank

    def select(self, living: Sequence[int]) -> None:
        """Leave out the rows that are over: they are computed on, but their logits are not given."""
        self._living = [self._living[i] for i in living]

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits (rows that are left, vocabulary) in float32 after one more token in each of them."""
        read = dict(zip(self._living, tokens, strict=True))
        self._tokens.copy_(torch.tensor([read.get(row, 0) for row in range(self.rows)]))
        if self._logits.device.type != "cuda":
            self._step()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
        # All rows are the common case: selecting some copies their numbers to the GPU first.
        return (self._logits if len(self._living) == self.rows else self._logits[self._living]).float()

    def _capture(self) -> None:
        length = self._length.clone()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no annotation there
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()  # compiles the kernels, which cannot be done while capturing
        torch.cuda.current_stream().wait_stream(side)
        self._length.copy_(length)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph  # only now: if that fails, the next call captures again
        self._length.copy_(length)

    def _step(self) -> None:
        kernels = self._kernels
        block = _power_of_2(self._hidden)
        h = torch.nn.functional.embedding(self._tokens, self._embedding)
        x = torch.empty_like(h)
        for number, (qkv, output, gate_up, down) in enumerate(self._layers):
            norm, mlp_norm = self._norms[number]
            kernels.rms_norm[(self.rows,)](h, norm, x, self._eps, H=self._hidden, BLOCK=block)
            self._add(h, self._attention(number, qkv, x), output)
            kernels.rms_norm[(self.rows,)](h, mlp_norm, x, self._eps, H=self._hidden, BLOCK=block)
            self._add(h, self._mlp(gate_up, x), down)
        kernels.rms_norm[(self.rows,)](h, self._norm, x, self._eps, H=self._hidden, BLOCK=block)
        torch.mm(x, self._output.t(), out=self._logits)
        self._length += 1

    def _attention(self, number: int, qkv: "_Group", x: torch.Tensor) -> torch.Tensor:
        q, k, v = nf4.products(x, qkv.matrices)
        keys, values = self._keys[number], self._values[number]
        rotated = x.new_empty(self.rows, self._heads, self._head)
        self._kernels.rotate_and_cache[(self._heads + 2 * self._kv_heads, self.rows)](
            q, k, v, self._down(x, qkv), qkv.b, self._cos, self._sin, self._length, self._start,
            rotated, keys, values, self.room,
            HEADS=self._heads, KV_HEADS=self._kv_heads, D=self._head, HALF=self._head // 2,
            R=self._ranks, PARTS=qkv.parts,
        )  # fmt: skip
        splits = max(_SPLITS, _power_of_2(self.room // 64)) if self.rows <= FEW else _SPLITS_OF_MANY
        slots = (self.rows, self._heads, splits)
        partial = torch.empty(*slots, self._head, dtype=torch.float32, device=x.device)
        peaks, sums = (torch.empty(slots, dtype=torch.float32, device=x.device) for _ in range(2))
        group = self._heads // self._kv_heads
        self._kernels.attend[(self.rows, self._kv_heads, splits)](
            rotated, keys, values, self._length, self._start, partial, peaks, sums, self.room, self._head**-0.5,
            KV_HEADS=self._kv_heads, GROUP=group, GROUP_UP=_power_of_2(group), D=self._head, BLOCK=16, SPLITS=splits,
        )  # fmt: skip
        out = torch.empty_like(rotated)
        self._kernels.combine[(self.rows * self._heads,)](partial, peaks, sums, out, D=self._head, SPLITS=splits)
        return out.view(self.rows, -1)

    def _mlp(self, group: "_Group", x: torch.Tensor) -> torch.Tensor:
        gate, up = nf4.products(x, group.matrices)
        out = torch.empty_like(gate)
        self._kernels.gated[(math.ceil(self._wide / 64), self.rows)](
            gate, up, self._down(x, group), group.b, out, N=self._wide, R=self._ranks, PARTS=group.parts, BLOCK=64
        )
        return out

    def _add(self, h: torch.Tensor, x: torch.Tensor, group: "_Group") -> None:
        """h += the group's one matrix, adapter included, of x."""
        (y,) = nf4.products(x, group.matrices)
        self._kernels.add_output[(math.ceil(self._hidden / 32), self.rows)](
            h, y, self._down(x, group), group.b, N=self._hidden, R=self._ranks, PARTS=group.parts, BLOCK=32
        )

    def _down(self, x: torch.Tensor, group: "_Group") -> torch.Tensor:
        """x through the A matrices of all adapters, scaled: (rows, matrices * R)."""
        if not self._ranks:
            return self._scale
        width, inner = group.a.shape
        out = torch.empty(self.rows, width, group.parts, dtype=torch.float32, device=x.device)
        together = min(FEW, _power_of_2(self.rows))
        self._kernels.lora_down[(width, group.parts, math.ceil(self.rows / together))](
            x, group.a, self._scale, out, self.rows, K=inner, J=width, R=self._ranks, ROWS=together, BLOCK=_PART
        )
        return out


@dataclasses.dataclass(frozen=True)
class _Group:
    """Matrices that read the same vector, and their adapters side by side: a (matrices * R, K), b (outputs, R)."""

    matrices: list[nf4.Matrix]
    a: torch.Tensor
    b: torch.Tensor

    @property
    def parts(self) -> int:
        """How many parts `lora_down` cuts K into: a power of 2, so some of the last may be empty."""
        return _power_of_2(math.ceil(self.a.shape[-1] / _PART))

    @classmethod
    def of(
        cls, linears: list[Any], adapters: tuple[str, ...], ranks: int, dtype: torch.dtype, *, unpacked: bool
    ) -> "_Group":
        matrices = [nf4.Matrix.of(_base(linear).weight, dtype, unpacked=unpacked) for linear in linears]
        if not ranks:
            empty = torch.zeros(1, device=matrices[0].weights.device)
            return cls(matrices, empty, empty)
        a, b = [], []
        for linear in linears:
            inner, outer = _base(linear).in_features, _base(linear).out_features
            downs = [linear.lora_A[name].weight for name in adapters]
            ups = [linear.lora_B[name].weight for name in adapters]
            spare = ranks - sum(down.shape[0] for down in downs)
            a.append(torch.cat([*downs, downs[0].new_zeros(spare, inner)]))
            b.append(torch.cat([*ups, ups[0].new_zeros(outer, spare)], dim=1))
        return cls(matrices, torch.cat(a).detach().contiguous(), torch.cat(b).detach().contiguous())


idle: Final["weakref.WeakKeyDictionary[Any, FusedSteps]"] = weakref.WeakKeyDictionary()
"""By model, the steps of the last question, for the next one; while an answer takes them they are not here."""


def take(model: Any, adapters: Sequence[str], rows: int, tokens: int) -> FusedSteps:
    """Steps with room for so many tokens a row: those of the last question where they will do, else new ones."""
    steps = idle.pop(model, None)
    if steps and steps.rows == rows and steps.adapters == tuple(adapters) and steps.room >= tokens:
        return steps
    del steps  # its memory first
    return FusedSteps(model, adapters, rows, _room(tokens))


def put_back(model: Any, steps: FusedSteps) -> None:
    """Leave steps for the next question, unless they have the base's weights in 16 bits."""
    if steps.rows <= FEW:
        idle[model] = steps


def _base(linear: Any) -> Any:
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
