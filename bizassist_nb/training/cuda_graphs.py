"""A micro-batch's forward and backward pass as one CUDA graph, for plain transformers on a fast GPU.

Such a GPU waits for its host, which takes longer to launch a pass's thousands of kernels than they take to run.
A pass is captured once for each size, and its replay costs no launches. Rows lie end to end in it, so that little of it
is padding. To have fewer kernels to begin with, a captured pass computes a linear layer with its adapter, queries, keys
and values together, a norm and the loss each in one function, and attention without a mask.
"""

import contextlib
import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Self

import torch
from peft.tuners.lora import LoraLayer
from transformers import AttentionInterface

from bizassist_nb.core.errors import brief
from bizassist_nb.data.tokens import IGNORED
from bizassist_nb.training.preflight import padded

_CHUNK: Final = 1024
"""Tokens whose logits exist at once."""
_NORMS: Final = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Norms that torch's `rms_norm` computes; other models' multiply by something else."""


_ATTENTIONS: Final = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
"""Blocks whose queries, keys and values are one product."""

_CAPTURE: Final = 6000
"""Tokens that an H100 trains a 7B model on in the time in which it captures a pass."""
_ATTENTION: Final = "bizassist_end_to_end"
_LAYERS: Final = {"full_attention", "sliding_attention"}
"""Kinds of attention layers that `_attention` computes."""


class CaptureError(Exception):
    """A pass of this model cannot be captured."""


def sizes(tokens: Sequence[int]) -> list[int]:
    """The sizes of passes to capture for micro-batches of so many tokens, the largest last.

    Capturing them and computing their padding take the least time together: dynamic programming over the sizes that
    occur, of which each is captured, or padded to the next that is.
    """
    occurring = sorted(Counter(map(padded, tokens)).items())
    batches = [0, *itertools.accumulate(count for _, count in occurring)]
    filled = [0, *itertools.accumulate(size * count for size, count in occurring)]
    best: list[tuple[int, list[int]]] = [(0, [])]  # (tokens of padding and captures, sizes), by how many are covered
    for end, (size, _) in enumerate(occurring, 1):
        ways = (
            (best[start][0] + _CAPTURE + size * (batches[end] - batches[start]) - (filled[end] - filled[start]), start)
            for start in range(end)
        )
        cost, start = min(ways)
        best.append((cost, [*best[start][1], size]))
    return best[-1][1]


class _Pass:
    """The tensors that a pass of one size reads, and what computes it.

    Rows lie end to end, and what is left of the pass counts as one row more, of which nothing is learned.
    """

    def __init__(self, rows: int, size: int, device: Any):
        self.ids = torch.zeros(1, size, dtype=torch.int64, device=device)
        self.labels = torch.full_like(self.ids, IGNORED)
        self.positions = torch.zeros_like(self.ids)
        self.starts = torch.zeros(rows + 2, dtype=torch.int32, device=device)
        """Where each row begins, and where the last ends; there may be empty ones."""
        self.starts[-1] = size
        self.run: Callable[[], None] = lambda: None
        self._counted = torch.arange(size, device=device)

    def fill(self, ids: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int]) -> None:
        """Lay the first `lengths` tokens of these rows (rows, tokens) end to end."""
        self.ids.zero_()
        self.labels.fill_(IGNORED)
        starts = [0, *itertools.accumulate(lengths)]
        for row, (start, end) in enumerate(itertools.pairwise(starts)):
            self.ids[0, start:end] = ids[row, : end - start]
            self.labels[0, start + 1 : end] = labels[row, 1 : end - start]  # nothing before it predicts its first token
            self.positions[0, start:end] = self._counted[: end - start]
        empty = [starts[-1]] * (len(self.starts) - 1 - len(starts))
        ends = torch.tensor([*starts, *empty, self.ids.shape[1]], dtype=torch.int32)
        self.starts.copy_(ends, non_blocking=True)


class Graphs:
    """The passes of a model with one adapter; gradients add up until the trainer sets them to None.

    On a CPU, which has no graphs, the same functions are called directly.
    """

    def __init__(self, model: Any, rows: int, tokens: Sequence[int], *, unpacked: bool):
        """For micro-batches of at most so many rows; `tokens` is how many each of a run's has.

        With `unpacked`, the base's matrices are stored in 16 bits besides, so that no pass has to unpack them.
        """
        self._model, self._rows, self._sizes, self._unpacked = model, rows, sizes(tokens), unpacked
        device = model.device
        self._linears: dict[Any, _Linear] = {}
        self._parameters: list[torch.Tensor] = []
        self._rounded: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        self._count = torch.ones((), device=device)
        self._loss = torch.zeros((), device=device)
        self._passes: dict[int, _Pass] = {}
        self.capturing = 0.0
        """Seconds that captures took, and what is prepared for them."""
        self._pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def __call__(
        self, ids: torch.Tensor, labels: torch.Tensor, lengths: Sequence[int], count: torch.Tensor | int
    ) -> torch.Tensor:
        """The share of these rows (rows, tokens) in the mean loss over the `count` learned tokens of a step.

        Rows are padded at their ends; `lengths` is how many tokens each has. Their gradients are added to the
        adapter's, which begin at zero where the trainer has none.

        Raises:
            CaptureError: if the pass cannot be captured.
            torch.OutOfMemoryError: if there is no room for it.
        """
        began = time.monotonic()
        passing = self._pass(min(size for size in self._sizes if size >= sum(lengths)))
        self.capturing += time.monotonic() - began
        if self._parameters[0].grad is None:
            torch._foreach_zero_(self._gradients)
            with torch.no_grad():
                torch._foreach_copy_(self._rounded, self._parameters)
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        passing.fill(ids, labels, lengths)
        self._count.copy_(torch.as_tensor(count))
        passing.run()
        return self._loss.clone()

    def _pass(self, size: int) -> _Pass:
        """The pass of that size. All are captured at once, by several ranks at the same time, the largest first.

        The others fit in its memory, and if memory runs out over it, it does so at once.
        """
        try:
            if not self._passes:
                self._prepare()
                for each in reversed(self._sizes):
                    self._capture(each)
        except RuntimeError as error:
            # Ending a capture that has failed fails, too: the first error is the context of the second.
            first = error if isinstance(error, torch.OutOfMemoryError) else error.__context__ or error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise CaptureError(brief(first)) from error
        return self._passes[size]

    def _capture(self, size: int) -> None:
        passing = _Pass(self._rows, size, self._model.device)
        if self._pool:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # NCCL has threads, too
                self._compute(passing)
            passing.run = graph.replay
        else:
            passing.run = lambda: self._compute(passing)
        self._passes[size] = passing

    def _prepare(self) -> None:
        """Prepare the layers, and compute a pass: libraries set themselves up, which they cannot while capturing."""
        if not _computable(self._model):
            raise CaptureError("it has dropout, or an output layer or attention of another kind")
        dtype = self._model.get_output_embeddings().weight.dtype
        self._linears = {block: _Linear.of(some, dtype, self._unpacked) for block, some in _groups(self._model).items()}
        for linear in self._linears.values():
            self._parameters += linear.parameters
            self._rounded += linear.rounded.each
            self._gradients += linear.gradients.each
        if self._pool:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no annotation there
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._compute(_Pass(self._rows, padded(1), self._model.device))
            torch.cuda.current_stream().wait_stream(side)

    def _compute(self, rows: _Pass) -> None:
        """Forward and back."""
        causal = self._model.get_base_model()
        with _lean(self._model, self._linears):
            hidden = causal.base_model(
                input_ids=rows.ids, position_ids=rows.positions, use_cache=False, cu_seq_lens_q=rows.starts
            ).last_hidden_state
            loss = _Loss.apply(  # type: ignore[no-untyped-call] # torch gives it no type
                hidden[0, :-1], causal.get_output_embeddings().weight, rows.labels[0, 1:], self._count
            )
            loss.backward()
            self._loss.copy_(loss.detach())


def _computable(model: Any) -> bool:
    """Whether `_Loss`, `_Adapted` and `_attention` compute what this model does."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if not model.get_base_model()._supports_attention_backend or not _LAYERS.issuperset(
        getattr(config, "layer_types", None) or ()
    ):
        return False  # the first is what transformers itself asks before it takes another's attention
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0):
        return False
    scales = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "output_multiplier"))
    if getattr(config, "final_logit_softcapping", None) or any(scale not in (None, 1) for scale in scales):
        return False
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        return False
    return not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


def _groups(model: Any) -> dict[Any, list[Any]]:
    """The layers with adapters: queries, keys and values by the block that has them, others by themselves."""
    groups: dict[Any, list[Any]] = {}
    for module in model.modules():
        if type(module).__name__ in _ATTENTIONS:
            layers = [module.q_proj, module.k_proj, module.v_proj]
            if all(isinstance(layer, LoraLayer) for layer in layers):
                groups[module] = layers
        elif isinstance(module, LoraLayer) and not any(module in layers for layers in groups.values()):
            groups[module] = [module]
    return groups


@contextlib.contextmanager
def _lean(model: Any, linears: "Mapping[Any, _Linear]") -> Iterator[None]:
    """Replace attention, and the `forward` of what has adapters and of norms, by ones with fewer kernels."""
    changed, config = [], model.config.get_text_config()
    attention, config._attn_implementation = config._attn_implementation, _ATTENTION
    for module in model.modules():
        if module in linears:
            whole = not isinstance(module, LoraLayer)
            module.forward = functools.partial(_attend, module, linears[module]) if whole else linears[module]
        elif type(module).__name__ in _NORMS:
            known = {"weight": module.weight, "eps": module.variance_epsilon}
            norm = torch.nn.functional.rms_norm
            module.forward = functools.partial(norm, normalized_shape=module.weight.shape, **known)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        config._attn_implementation = attention
        for module in changed:
            del module.forward


def _attend(
    block: Any, qkv: "_Linear", hidden_states: torch.Tensor, position_embeddings: Any, **known: Any
) -> tuple[torch.Tensor, None]:
    """The `forward` of an attention block."""
    heads = [width // block.head_dim for width in qkv.widths]
    found = qkv(hidden_states).view(1, -1, sum(heads), block.head_dim)
    turn = functools.partial(_Turned.apply, found)
    turned = turn(*position_embeddings, heads[0] + heads[1])
    query, key, value = (part.transpose(1, 2) for part in turned.split(heads, dim=2))
    window = getattr(block, "sliding_window", getattr(block.config, "sliding_window", None))
    out, _ = _attention(block, query, key, value, None, **known, scaling=block.scaling, sliding_window=window)
    return block.o_proj(out.flatten(2)), None


class _Turned(torch.autograd.Function):
    """Queries and keys turned by their positions (arXiv:2104.09864), in transformers' order of numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
        """x (1, tokens, heads of all three, width), of which the first `heads` are turned; cos, sin (1, tokens, width),
        of whose halves both are the same.
        """
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _turned(x, cos, sin, heads)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Turned back."""
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin, ctx.heads), None, None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    out, half = torch.empty_like(x), x.shape[-1] // 2
    before, after, sin = x[:, :, :heads], out[:, :, :heads], sin[..., None, :half]
    torch.mul(before, cos[..., None, :], out=after)
    after[..., :half].addcmul_(before[..., half:], sin, value=-1)
    after[..., half:].addcmul_(before[..., :half], sin)
    out[:, :, heads:].copy_(x[:, :, heads:])
    return out


def _attention(
    _layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _mask: None, **known: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a pass; (1, heads, tokens, width) each, to (1, tokens, heads, width).

    transformers calls it for each layer, and has no mask made for it, as it knows none of that name.
    """
    starts, scale, window = known["cu_seq_lens_q"], known["scaling"], known.get("sliding_window")
    tokens = query.shape[2]
    if query.device.type == "cuda":
        q, k, v = (each[0].transpose(0, 1) for each in (query, key, value))
        left = None if window is None else window - 1
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, starts, starts, tokens, tokens, 0.0, True, False, scale=scale, window_size_left=left
        )[0]
        return out[None], None
    place = torch.arange(tokens)
    row = torch.searchsorted(starts, place, right=True, out_int32=True)
    back = place[:, None] - place
    seen = (row[:, None] == row) & (back >= 0) & (back < (window or tokens))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register(_ATTENTION, _attention)


class _Adapters:
    """Numbers for the adapters of layers that read the same vector: the A matrices are rows of one, the B are apart."""

    def __init__(self, downs: Sequence[torch.Tensor], ups: Sequence[torch.Tensor], dtype: torch.dtype):
        self.a = torch.cat([torch.zeros_like(down, dtype=dtype) for down in downs])
        self.ups = [torch.zeros_like(up, dtype=dtype) for up in ups]
        self.ranks = [len(down) for down in downs]
        self.each = [*torch.split(self.a, self.ranks), *self.ups]


@dataclasses.dataclass(frozen=True)
class _Linear:
    """x W^T + bias + scaling (x A^T) B^T: layers of the base that read the same x, with their adapters.

    W (N, K) and A (R, K) are those of all of them, one below the other; of the B each is (its part of N, its rank).
    """

    weights: list[torch.Tensor]
    """W: each layer's in 4 bits, or all of it."""
    widths: list[int]
    """The part of N that each layer has."""
    bias: torch.Tensor | None
    """Added to the outputs, as Qwen2's queries, keys and values have it."""
    parameters: list[torch.Tensor]
    """The A, then the B."""
    rounded: _Adapters
    """In the dtype of arithmetic."""
    gradients: _Adapters
    """To which those of a pass are added."""
    scaling: float

    @classmethod
    def of(cls, layers: list[Any], dtype: torch.dtype, unpacked: bool) -> Self:
        """With adapters rounded to that dtype."""
        (name,) = layers[0].active_adapters
        weights, biases = ([getattr(layer.base_layer, part) for layer in layers] for part in ("weight", "bias"))
        downs, ups = ([getattr(layer, part)[name].weight for layer in layers] for part in ("lora_A", "lora_B"))
        return cls(
            weights=[_matrix(weights)] if unpacked else weights,
            widths=[layer.out_features for layer in layers],
            bias=None if biases[0] is None else torch.cat(biases).to(dtype),
            parameters=[*downs, *ups],
            rounded=_Adapters(downs, ups, dtype),
            gradients=_Adapters(downs, ups, downs[0].dtype),
            scaling=layers[0].scaling[name],
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N)."""
        out: torch.Tensor = _Adapted.apply(x, self, *self.parameters)  # type: ignore[no-untyped-call] # torch gives it no type
        return out


class _Adapted(torch.autograd.Function):
    """Computes a `_Linear`; cuBLAS adds the adapters' share while it multiplies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Linear, *_: torch.Tensor) -> torch.Tensor:
        """The parameters are only there so that torch sees that something is learned."""
        flat, adapters = x.reshape(-1, x.shape[-1]), layer.rounded
        inner = flat @ adapters.a.T
        out = torch.nn.functional.linear(flat, _matrix(layer.weights), layer.bias)
        parts = zip(torch.split(out, layer.widths, 1), torch.split(inner, adapters.ranks, 1), adapters.ups, strict=True)
        for part, of_inner, b in parts:
            part.addmm_(of_inner, b.T, alpha=layer.scaling)
        ctx.save_for_backward(flat, inner)
        ctx.layer = layer
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient of x; those of A and B are added to the layer's."""
        layer, (flat, inner) = ctx.layer, ctx.saved_tensors
        adapters, gradients = layer.rounded, layer.gradients
        out = gradient.reshape(-1, gradient.shape[-1])
        parts = torch.split(out, layer.widths, 1)
        inward = torch.cat([part @ b for part, b in zip(parts, adapters.ups, strict=True)], 1) * layer.scaling
        gradients.a.add_(inward.T @ flat)
        for of_b, part, of_inner in zip(gradients.ups, parts, torch.split(inner, adapters.ranks, 1), strict=True):
            of_b.add_(part.T @ of_inner, alpha=layer.scaling)
        x = out @ _matrix(layer.weights)
        x.addmm_(inward, adapters.a)
        return x.view(*gradient.shape[:-1], -1), *[None] * (1 + len(layer.parameters))


def _matrix(weights: Sequence[Any]) -> torch.Tensor:
    """The weights (N, K), one below the other, unpacked if they are in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    states: list[Any] = [getattr(weight, "quant_state", None) for weight in weights]
    if None in states:
        return torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    heights = [state.shape[0] for state in states]
    matrix = torch.empty(sum(heights), states[0].shape[1], dtype=states[0].dtype, device=weights[0].device)
    for weight, state, part in zip(weights, states, torch.split(matrix, heights), strict=True):
        found = dequantize_4bit(weight.data, state, out=part if part.is_cuda else None)  # bitsandbytes 0.50: GPUs only
        if found is not part:
            part.copy_(found)
    return matrix


class _Loss(torch.autograd.Function):
    """Cross-entropy of a frozen output layer: the forward pass computes the gradient too, and stores no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        """hidden (tokens, K), weight (vocabulary, K), labels (tokens); the sum over learned tokens, over `count`."""
        total = torch.zeros((), device=hidden.device)
        gradient = torch.empty_like(hidden)
        for start in range(0, len(hidden), _CHUNK):
            part = slice(start, start + _CHUNK)
            learned = labels[part] != IGNORED
            target = labels[part].clamp(min=0)[:, None]
            likely = (hidden[part] @ weight.T).float().log_softmax(-1)
            total -= (likely.gather(1, target)[:, 0] * learned).sum()
            likely.exp_().scatter_add_(1, target, likely.new_full(target.shape, -1.0))
            likely *= (learned / count)[:, None]
            gradient[part] = likely.to(hidden.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total / count

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """The gradient of hidden."""
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None
