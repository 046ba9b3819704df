"""A micro-batch's forward and backward pass as one CUDA graph, for plain transformers on a fast GPU.

Such a GPU waits for its host, which takes longer to launch a pass's thousands of kernels than they take to run.
Captured once for each length of rows and replayed, they cost no launches. So that there are fewer kernels to begin
with, a linear layer with its adapter, a norm and the loss are each computed in one go while a pass is captured.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from peft.tuners.lora import LoraLayer

from bizassist_nb.core.errors import brief
from bizassist_nb.data.tokens import IGNORED
from bizassist_nb.training.preflight import padded

_CHUNK: Final = 1024
"""Tokens whose logits exist at once."""
_NORMS: Final = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Norms that torch's `rms_norm` computes; other models' multiply by something else."""


class CaptureError(Exception):
    """What this model does in a pass cannot be captured."""


@dataclasses.dataclass
class _Pass:
    """The pass of rows of one length: what it reads, and how it is done."""

    ids: torch.Tensor
    labels: torch.Tensor
    run: Callable[[], None]


class Graphs:
    """The passes of a model with one adapter, through which gradients add up until the trainer lets go of them.

    On a CPU, which has no graphs, the same is computed outright.
    """

    def __init__(self, model: Any, rows: int, longest: int, *, unpacked: bool):
        """For micro-batches of so many rows, or fewer, the longest of which has so many tokens a row.

        With `unpacked`, the base's matrices are held in 16 bits besides, so that no pass has to unpack them.
        """
        self._model, self._rows, self._longest, self._unpacked = model, rows, padded(longest), unpacked
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        sizes, device = [parameter.numel() for parameter in self._parameters], model.device
        self._flat = torch.zeros(sum(sizes), device=device)
        parts = zip(torch.split(self._flat, sizes), self._parameters, strict=True)
        self._gradients = [part.view_as(parameter) for part, parameter in parts]
        self._rounded: list[torch.Tensor] = []
        self._linears: dict[Any, _Linear] = {}
        self._count = torch.ones((), device=device)
        self._loss = torch.zeros((), device=device)
        self._passes: dict[int, _Pass] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None

    def __call__(self, ids: torch.Tensor, labels: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        """The loss over `count` learned tokens of all of a step, to which these rows (rows, tokens) add theirs.

        Their gradients are added to the adapter's, which begin at zero where the trainer has none.

        Raises:
            CaptureError: if the pass cannot be captured.
            torch.OutOfMemoryError: if there is no room for it.
        """
        if not self._passes:
            self._prepare()
        if self._parameters[0].grad is None:
            self._flat.zero_()
            with torch.no_grad():
                torch._foreach_copy_(self._rounded, self._parameters)
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
        one = self._pass(padded(ids.shape[1]))
        one.ids.zero_()
        one.labels.fill_(IGNORED)
        one.ids[: ids.shape[0], : ids.shape[1]] = ids
        one.labels[: ids.shape[0], : ids.shape[1]] = labels
        self._count.copy_(torch.as_tensor(count))
        one.run()
        return self._loss.clone()

    @property
    def _on_gpu(self) -> bool:
        return bool(self._model.device.type == "cuda")

    def _prepare(self) -> None:
        """Gather what passes read, and capture the longest first: the others find room in its memory, and if there is
        none for it, that shows at once.
        """
        if not _computable(self._model):
            raise CaptureError("it has dropout, or an output layer of another kind")
        dtype = self._model.get_output_embeddings().weight.dtype
        self._rounded = [torch.zeros_like(parameter, dtype=dtype) for parameter in self._parameters]
        place = {parameter: i for i, parameter in enumerate(self._parameters)}
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                self._linears[module] = self._linear(module, place)
        if self._on_gpu:
            self._warm_up()
            self._passes[self._longest] = self._captured(self._longest)

    def _linear(self, layer: Any, place: Mapping[Any, int]) -> "_Linear":
        (name,) = layer.active_adapters
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        weight = layer.base_layer.weight
        return _Linear(
            weight=_matrix(weight) if self._unpacked else weight,
            bias=layer.base_layer.bias,
            a=a,
            b=b,
            rounded=(self._rounded[place[a]], self._rounded[place[b]]),
            gradients=(self._gradients[place[a]], self._gradients[place[b]]),
            scaling=layer.scaling[name],
        )

    def _pass(self, length: int) -> _Pass:
        if length not in self._passes:
            self._passes[length] = self._captured(length) if self._on_gpu else self._outright(length)
        return self._passes[length]

    def _outright(self, length: int) -> _Pass:
        ids, labels = self._rows_of(length)

        def run() -> None:
            with _lean(self._model, self._linears):
                self._compute(ids, labels)

        return _Pass(ids, labels, run)

    def _captured(self, length: int) -> _Pass:
        ids, labels = self._rows_of(length)
        graph = torch.cuda.CUDAGraph()
        try:
            with _lean(self._model, self._linears), torch.cuda.graph(graph, pool=self._pool):
                self._compute(ids, labels)
        except RuntimeError as error:
            first = error.__context__  # ending a capture that has failed fails, too
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise CaptureError(brief(first or error)) from error
        return _Pass(ids, labels, graph.replay)

    def _warm_up(self) -> None:
        """Compute once what is to be captured: libraries set up in it what they cannot while capturing."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch has no annotation there
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            try:
                self._outright(padded(1)).run()
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                raise CaptureError(brief(error)) from error
        torch.cuda.current_stream().wait_stream(side)

    def _rows_of(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros(self._rows, length, dtype=torch.int64, device=self._model.device)
        return ids, torch.full_like(ids, IGNORED)

    def _compute(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Forward and back. Rows are padded at their end, which no token before it sees, so there is no mask."""
        causal = self._model.get_base_model()
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        loss = _Loss.apply(  # type: ignore[no-untyped-call]
            hidden, causal.get_output_embeddings().weight, labels[:, 1:].reshape(-1), self._count
        )
        loss.backward()
        self._loss.copy_(loss.detach())


def _computable(model: Any) -> bool:
    """Whether the loss and the adapters of such a model are what is computed here."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    scales = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "output_multiplier"))
    if getattr(config, "final_logit_softcapping", None) or any(scale not in (None, 1) for scale in scales):
        return False
    if type(head) is not torch.nn.Linear or getattr(head, "bias", None) is not None:
        return False
    return not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@contextlib.contextmanager
def _lean(model: Any, linears: "Mapping[Any, _Linear]") -> Iterator[None]:
    """Have linear layers with adapters, and norms, compute by fewer kernels."""
    changed = []
    for module in model.modules():
        if module in linears:
            module.forward = linears[module]
        elif type(module).__name__ in _NORMS:
            module.forward = _norm(module)
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    shape, weight, eps = module.weight.shape, module.weight, module.variance_epsilon
    return lambda x: torch.nn.functional.rms_norm(x, shape, weight, eps)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """x W^T + bias + scaling (x A^T) B^T: a linear layer of the base with its adapter. W (N, K), A (R, K), B (N, R)."""

    weight: torch.Tensor
    """W, in 4 bits or not."""
    bias: torch.Tensor | None
    """Added to the outputs, as Qwen2's queries, keys and values have it."""
    a: torch.Tensor
    b: torch.Tensor
    rounded: tuple[torch.Tensor, torch.Tensor]
    """A and B in the dtype of arithmetic."""
    gradients: tuple[torch.Tensor, torch.Tensor]
    """To which theirs are added."""
    scaling: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) to (..., N)."""
        # torch has no annotation of `apply`.
        out: torch.Tensor = _Adapted.apply(x, self.a, self.b, self)  # type: ignore[no-untyped-call]
        return out


class _Adapted(torch.autograd.Function):
    """What a `_Linear` computes; cuBLAS adds the adapter's share while it multiplies."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, layer: _Linear) -> torch.Tensor:
        """`a` and `b` are only there so that torch sees that something is learned."""
        a, b = layer.rounded
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.T
        bias = None if layer.bias is None else layer.bias.to(flat.dtype)
        out = torch.nn.functional.linear(flat, _matrix(layer.weight), bias)
        out.addmm_(inner, b.T, alpha=layer.scaling)
        ctx.save_for_backward(flat, inner)
        ctx.layer = layer
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Of x; those of A and B are added where they belong."""
        layer, (flat, inner) = ctx.layer, ctx.saved_tensors
        a, b = layer.rounded
        out = gradient.reshape(-1, gradient.shape[-1])
        inward = (out @ b) * layer.scaling
        layer.gradients[0].add_(inward.T @ flat)
        layer.gradients[1].add_(out.T @ inner, alpha=layer.scaling)
        x = out @ _matrix(layer.weight)
        x.addmm_(inward, a)
        return x.view(*gradient.shape[:-1], -1), None, None, None


def _matrix(weight: Any) -> torch.Tensor:
    """A weight (N, K), unpacked if it is in 4 bits."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(weight, "quant_state", None)
    matrix: torch.Tensor = dequantize_4bit(weight.data, state) if state else weight
    return matrix


class _Loss(torch.autograd.Function):
    """Cross-entropy of an output layer that is not trained: its gradient comes with it, so no logits are kept."""

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
        """Of hidden alone."""
        (of_hidden,) = ctx.saved_tensors
        return of_hidden * gradient.to(of_hidden.dtype), None, None, None
