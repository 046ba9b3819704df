"""Decode steps on a GPU as one CUDA graph, for models of Llama's and Mistral's shape in NF4.

A step of a few rows does little arithmetic: through the modules it is thousands of kernels, most of them LoRA's, and
starting those is what takes the time. Here a layer is its products with 4-bit matrices (`nf4.py`) and a dozen of the
kernels in `kernels.py`, captured once and replayed for every token. The modules themselves are neither changed nor
called.
"""

import dataclasses
import importlib.util
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer

from bizassist_nb.assistant.cuda import nf4

_SHAPES: Final = ("llama", "mistral")
_MOST_ROWS: Final = 8
"""The kernels write out what they do row by row, and take ever longer to compile; with more, launching costs less."""
_ROOM: Final = 512
"""The cache grows by so many tokens, so that most questions find the graph of the last one."""
_SPLITS: Final = 16
"""Parts at the least in which the cache is attended to: with two rows and eight key heads, 256 programs."""
_PART: Final = 1024
"""Columns of an A matrix that one program multiplies."""
_GROUPS: Final = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("self_attn", ("o_proj",)),
                  ("mlp", ("gate_proj", "up_proj")), ("mlp", ("down_proj",)))  # fmt: skip


def fits(model: Any, rows: int) -> bool:
    """Whether this module computes such a model for so many rows; others take the way through their own modules."""
    if rows > _MOST_ROWS or model.device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from torch.distributed.fsdp import FSDPModule

    return not isinstance(model, FSDPModule) and computable(model)  # one that is sharded has no weights at hand


def computable(model: Any) -> bool:
    """Whether the model is of such a kind, wherever it is."""
    from bitsandbytes.nn import Linear4bit

    config = model.config
    if config.model_type not in _SHAPES or config.hidden_act != "silu" or getattr(config, "sliding_window", None):
        return False
    if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return False  # the others change with the length
    head = _head_size(config)
    linears = [
        _linear(layer, part, name) for layer in _decoder(model).layers for part, names in _GROUPS for name in names
    ]
    return head & (head - 1) == 0 and all(
        isinstance(_base(linear), Linear4bit)
        and _base(linear).bias is None
        and _base(linear).weight.quant_state.quant_type == "nf4"
        and not (isinstance(linear, LoraLayer) and (any(linear.use_dora.values()) or any(linear.lora_bias.values())))
        for linear in linears
    )


class FusedSteps:
    """The decode step of one set of adapters for a fixed number of rows, captured when it is first taken."""

    @torch.inference_mode()
    def __init__(self, model: Any, adapters: Sequence[str], rows: int, room: int):
        """Gather the weights; `room` is how many tokens a row may have, question and answer together."""
        config, decoder = model.config, _decoder(model)
        self.rows, self.room, self.adapters = rows, room, tuple(adapters)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head, self._hidden, self._wide = _head_size(config), config.hidden_size, config.intermediate_size
        self._eps = config.rms_norm_eps
        self._embedding, self._norm = decoder.embed_tokens.weight, decoder.norm.weight
        device, dtype = model.device, self._embedding.dtype
        self._layers = [_Layer.of(layer, self.adapters, dtype) for layer in decoder.layers]
        self._output = _causal(model).lm_head.weight
        self._ranks = self._layers[0].ranks
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

        `scales` maps each adapter to what its output is multiplied by in every row (strength times alpha / rank).
        """
        length = mask.shape[1]
        for number, layer in enumerate(cache.layers):
            self._keys[number, :, :, :length].copy_(layer.keys)
            self._values[number, :, :, :length].copy_(layer.values)
        self._length.fill_(length)
        self._start.copy_(length - mask.sum(1))
        column = 0
        for name in self.adapters:
            rank = self._layers[0].rank_of[name]
            self._scale[:, column : column + rank] = torch.tensor(scales[name], device=self._scale.device)[:, None]
            column += rank

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits (rows, vocabulary) after one more token in each row; overwritten by the next call."""
        self._tokens.copy_(torch.tensor(tokens))
        if self._logits.device.type != "cuda":
            self._step()
            return self._logits
        if self._graph is None:
            self._capture()
        self._graph.replay()
        return self._logits

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
        self._graph = graph  # only now: these steps are kept even if that fails
        self._length.copy_(length)

    def _step(self) -> None:
        from bizassist_nb.assistant.cuda import kernels

        block = _power_of_2(self._hidden)
        h = torch.nn.functional.embedding(self._tokens, self._embedding)
        x = torch.empty_like(h)
        for number, layer in enumerate(self._layers):
            kernels.rms_norm[(self.rows,)](h, layer.input_norm, x, self._eps, H=self._hidden, BLOCK=block)
            self._add(h, self._attention(number, layer, x), layer.output)
            kernels.rms_norm[(self.rows,)](h, layer.mlp_norm, x, self._eps, H=self._hidden, BLOCK=block)
            self._add(h, self._mlp(layer, x), layer.down)
        kernels.rms_norm[(self.rows,)](h, self._norm, x, self._eps, H=self._hidden, BLOCK=block)
        torch.mm(x, self._output.t(), out=self._logits)
        self._length += 1

    def _attention(self, number: int, layer: "_Layer", x: torch.Tensor) -> torch.Tensor:
        from bizassist_nb.assistant.cuda import kernels

        q, k, v = nf4.products(x, layer.qkv.matrices)
        keys, values = self._keys[number], self._values[number]
        rotated = x.new_empty(self.rows, self._heads, self._head)
        kernels.rotate_and_cache[(self._heads + 2 * self._kv_heads,)](
            q, k, v, self._down(x, layer.qkv), layer.qkv.b, self._cos, self._sin, self._length, self._start,
            rotated, keys, values, self.room,
            HEADS=self._heads, KV_HEADS=self._kv_heads, D=self._head, HALF=self._head // 2,
            R=self._ranks, PARTS=layer.qkv.parts, ROWS=self.rows,
        )  # fmt: skip
        splits = max(_SPLITS, _power_of_2(self.room // 64))
        slots = (self.rows, self._heads, splits)
        partial = torch.empty(*slots, self._head, dtype=torch.float32, device=x.device)
        peaks, sums = (torch.empty(slots, dtype=torch.float32, device=x.device) for _ in range(2))
        group = self._heads // self._kv_heads
        kernels.attend[(self.rows, self._kv_heads, splits)](
            rotated, keys, values, self._length, self._start, partial, peaks, sums, self.room, self._head**-0.5,
            KV_HEADS=self._kv_heads, GROUP=group, GROUP_UP=_power_of_2(group), D=self._head, BLOCK=16, SPLITS=splits,
        )  # fmt: skip
        out = torch.empty_like(rotated)
        kernels.combine[(self.rows * self._heads,)](partial, peaks, sums, out, D=self._head, SPLITS=splits)
        return out.view(self.rows, -1)

    def _mlp(self, layer: "_Layer", x: torch.Tensor) -> torch.Tensor:
        from bizassist_nb.assistant.cuda import kernels

        gate, up = nf4.products(x, layer.gate_up.matrices)
        out = torch.empty_like(gate)
        kernels.gated[(_cdiv(self._wide, 64),)](
            gate, up, self._down(x, layer.gate_up), layer.gate_up.b, out,
            N=self._wide, R=self._ranks, PARTS=layer.gate_up.parts, ROWS=self.rows, BLOCK=64,
        )  # fmt: skip
        return out

    def _add(self, h: torch.Tensor, x: torch.Tensor, group: "_Group") -> None:
        """h += the group's one matrix, adapter included, of x."""
        from bizassist_nb.assistant.cuda import kernels

        (y,) = nf4.products(x, group.matrices)
        kernels.add_output[(_cdiv(self._hidden, 32),)](
            h, y, self._down(x, group), group.b,
            N=self._hidden, R=self._ranks, PARTS=group.parts, ROWS=self.rows, BLOCK=32,
        )  # fmt: skip

    def _down(self, x: torch.Tensor, group: "_Group") -> torch.Tensor:
        """x through the A matrices of all adapters, scaled: (rows, matrices * R)."""
        from bizassist_nb.assistant.cuda import kernels

        if not self._ranks:
            return self._scale
        width, inner = group.a.shape
        out = torch.empty(self.rows, width, group.parts, dtype=torch.float32, device=x.device)
        kernels.lora_down[(width, group.parts)](
            x, group.a, self._scale, out,
            K=inner, J=width, R=self._ranks, ROWS=self.rows, ROWS_UP=_power_of_2(self.rows), BLOCK=_PART,
        )  # fmt: skip
        return out


@dataclasses.dataclass(frozen=True)
class _Group:
    """Matrices that read the same vector, with their adapters side by side: a (matrices * R, K), b (outputs, R)."""

    matrices: list[nf4.Matrix]
    a: torch.Tensor
    b: torch.Tensor

    @property
    def parts(self) -> int:
        """How many parts `lora_down` cuts K into: a power of 2, so some of the last may be empty."""
        return _power_of_2(_cdiv(self.a.shape[-1], _PART))

    @classmethod
    def of(cls, linears: list[Any], adapters: tuple[str, ...], ranks: int, dtype: torch.dtype) -> "_Group":
        matrices = [nf4.Matrix.of(_base(linear).weight, dtype) for linear in linears]
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


@dataclasses.dataclass(frozen=True)
class _Layer:
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    qkv: _Group
    output: _Group
    gate_up: _Group
    down: _Group
    rank_of: dict[str, int]

    @property
    def ranks(self) -> int:
        """Ranks of all adapters together, rounded up to a power of 2 (at least 16); 0 without adapters."""
        return max(16, _power_of_2(sum(self.rank_of.values()))) if self.rank_of else 0

    @classmethod
    def of(cls, layer: Any, adapters: tuple[str, ...], dtype: torch.dtype) -> "_Layer":
        rank_of = {name: _linear(layer, "self_attn", "q_proj").r[name] for name in adapters}
        ranks = max(16, _power_of_2(sum(rank_of.values()))) if rank_of else 0
        qkv, output, gate_up, down = (
            _Group.of([_linear(layer, part, name) for name in names], adapters, ranks, dtype) for part, names in _GROUPS
        )
        norm, mlp_norm = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        return cls(norm, mlp_norm, qkv, output, gate_up, down, rank_of)


_kept: "weakref.WeakKeyDictionary[Any, FusedSteps]" = weakref.WeakKeyDictionary()


def take(model: Any, adapters: Sequence[str], rows: int, tokens: int) -> FusedSteps:
    """Steps with room for so many tokens a row: those of the last question where they will do, else new ones.

    They are the taker's alone until `give_back`.
    """
    kept = _kept.pop(model, None)
    if kept and kept.rows == rows and kept.adapters == tuple(adapters) and kept.room >= tokens:
        return kept
    del kept  # its memory first
    return FusedSteps(model, adapters, rows, _cdiv(tokens, _ROOM) * _ROOM)


def give_back(model: Any, steps: FusedSteps) -> None:
    """Keep the steps for the next question."""
    _kept[model] = steps


def forget(model: Any) -> None:
    """Let go of the steps kept for a model, and of the memory of their cache."""
    _kept.pop(model, None)


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _decoder(model: Any) -> Any:
    return _causal(model).model


def _linear(layer: Any, part: str, name: str) -> Any:
    return getattr(getattr(layer, part), name)


def _base(linear: Any) -> Any:
    return linear.base_layer if isinstance(linear, LoraLayer) else linear


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _cdiv(number: int, by: int) -> int:
    return -(-number // by)
