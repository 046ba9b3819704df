"""Decoding several answers as one batch, from one copy of the weights, each row with its own strength of each adapter.

A LoRA layer adds `B(A(x)) * scaling` to the base's output. `scaling` is a number; here it is a tensor of shape
(rows, 1, 1), which broadcasts over the batch: 0 for a row that is to be the base's, the trained value for the tuned.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tokenizers.decoders import DecodeStream
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bizassist_nb.assistant.cuda import decode_graph
from bizassist_nb.assistant.prefix_cache import PrefixCache
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.tokens import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are answered together."""

    prompts: Sequence[Sequence[int]]
    """Input ids of each row, question included."""
    strengths: Mapping[str, Sequence[float]]
    """Of each adapter, by name, its strength in every row; 1 is as trained."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    pad_id: int


def decode(
    model: Any, batch: Batch, generation: Generation, prefix: PrefixCache | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as answers grow: every living row's next token, step by step, end tokens left out.

    The model is only altered while a step is computed: between yields, and however the generator ends, it is as it was.
    What `prefix` has of the prompts is not read again; it is given what is read now. The strength of `generation` is
    not looked at: the batch has one for each row.
    """
    choose = _Chooser(generation, batch.prompts)
    rows = list(range(len(batch.prompts)))  # those still growing, as indices into prompts
    max_new_tokens = generation.max_new_tokens
    with _steps(model, batch, max_new_tokens, prefix) as (logits, steps):
        for count in range(1, max_new_tokens + 1):
            chosen = choose(rows, logits)
            living = [i for i, token in enumerate(chosen) if token not in batch.stop_ids]
            for i in living:
                yield rows[i], chosen[i]
            if not living or count == max_new_tokens:
                return
            if len(living) < len(rows):
                steps.keep(living)
                rows = [rows[i] for i in living]
            logits = steps([chosen[i] for i in living])


def texts(
    model: Any, chat: ChatTokenizer, batch: Batch, generation: Generation, prefix: PrefixCache | None = None
) -> Iterator[tuple[int, str]]:
    """`decode` as (row, text), one for every token: "" while a character is not yet whole."""
    streams = [DecodeStream(skip_special_tokens=True) for _ in batch.prompts]
    backend = chat.tokenizer.backend_tokenizer
    for row, token in decode(model, batch, generation, prefix):
        yield row, streams[row].step(backend, token) or ""


@contextmanager
def _steps(
    model: Any, batch: Batch, max_new_tokens: int, prefix: PrefixCache | None
) -> Iterator[tuple[torch.Tensor, "_ModuleSteps | _GraphSteps"]]:
    """The logits (rows, vocabulary) after the prompts, and what computes those after each further token."""
    prompts, strengths = batch.prompts, batch.strengths
    ids, mask = _left_padded(prompts, batch.pad_id, model.device)
    cache = DynamicCache(config=model.config)
    known = prefix.begin(prompts, strengths, cache) if prefix else 0
    steps = _ModuleSteps(model, strengths, cache, mask)
    logits = steps.forward(ids[:, known:])
    if not decode_graph.fits(model, len(prompts)):
        if prefix:
            steps.remember_in(prefix, prompts)
        try:
            yield logits, steps
        finally:
            steps.remember()
        return
    graph = decode_graph.take(model, list(strengths), len(prompts), ids.shape[1] + max_new_tokens)
    try:
        graph.begin(cache, mask, _scales(model, strengths))
        del cache, steps  # copied: their memory is free for the answer
        yield logits, _GraphSteps(graph)
    finally:
        decode_graph.give_back(model, graph)


class _ModuleSteps:
    """Steps through the model's own modules: any model, any device. An answer that is over costs nothing more."""

    def __init__(self, model: Any, strengths: Mapping[str, Sequence[float]], cache: DynamicCache, mask: torch.Tensor):
        self._model, self._cache, self._mask = model, cache, mask
        self._strengths = {name: list(values) for name, values in strengths.items()}
        self._prefix: PrefixCache | None = None

    def remember_in(self, prefix: PrefixCache, prompts: Sequence[Sequence[int]]) -> None:
        """Record the tokens after these prompts; `remember` stores them in the prefix cache, once."""
        self._prefix, self._read = prefix, [list(prompt) for prompt in prompts]

    def remember(self) -> None:
        if self._prefix:
            self._prefix.keep(self._read, self._strengths, self._cache)
        self._prefix = None

    def keep(self, living: list[int]) -> None:
        self.remember()  # while all rows are there
        kept = torch.tensor(living, device=self._mask.device)
        self._cache.batch_select_indices(kept)
        self._mask = self._mask[kept]
        self._strengths = {name: [values[i] for i in living] for name, values in self._strengths.items()}

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        if self._prefix:
            for read, token in zip(self._read, tokens, strict=True):
                read.append(token)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self.forward(torch.tensor(tokens, device=self._mask.device)[:, None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        activate(self._model, list(self._strengths))  # another question may have come in between
        with torch.inference_mode(), scaled(self._model, self._strengths):
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=(self._mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits.float()


class _FewRows(torch.nn.Linear):
    """An output layer on a CPU: for two rows MKL takes three times as long over `linear` as over this product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.numel() > 8 * self.in_features:
            return super().forward(input)
        product = self.weight @ input.reshape(-1, self.in_features).T
        return product.T.reshape(*input.shape[:-1], self.out_features)


def quicken(model: Any) -> None:
    """Have the output layer, a small model's largest matrix, not waste time on a CPU; for inference only."""
    head: Any = model.get_output_embeddings()
    if model.device.type == "cpu" and head.bias is None and type(head) is torch.nn.Linear:
        head.__class__ = _FewRows


class _GraphSteps:
    """Steps by replaying a CUDA graph; its rows stay, those that are over are computed and not looked at."""

    def __init__(self, graph: decode_graph.FusedSteps):
        self._graph = graph
        self._living = list(range(graph.rows))

    def keep(self, living: list[int]) -> None:
        self._living = [self._living[i] for i in living]

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        whole = [0] * self._graph.rows
        for row, token in zip(self._living, tokens, strict=True):
            whole[row] = token
        logits = self._graph(whole)
        # Which rows to take would have to be told the GPU first.
        return (logits if len(self._living) == len(whole) else logits[self._living]).float()


def activate(model: Any, adapters: Sequence[str]) -> None:
    """Have these adapters, and where there are any no others, take part in the forward pass.

    Raises:
        KeyError: if one has been removed.
    """
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    if gone := set(adapters) - set(layer.scaling if layer else ()):
        raise KeyError(f"the adapters {sorted(gone)} are not there any more")
    if layer and adapters and set(layer.active_adapters) != set(adapters):
        model.base_model.set_adapter(list(adapters), inference_mode=True)


def _scales(model: Any, strengths: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Strengths times each adapter's own scaling (alpha / rank)."""
    layer = next((module for module in model.modules() if isinstance(module, LoraLayer)), None)
    return {name: [value * layer.scaling[name] for value in values] for name, values in strengths.items() if layer}


@contextmanager
def scaled(model: Any, strengths: Mapping[str, Sequence[float]]) -> Iterator[None]:
    """Give every LoRA layer one strength a row, of adapters not named none, and its own scaling back afterwards."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    tensors: dict[tuple[str, float], torch.Tensor] = {}
    try:
        for layer in layers:
            for name in layer.scaling:
                if name not in strengths:
                    layer.scaling[name] = 0.0
                    continue
                own = float(layer.scaling[name])
                if (name, own) not in tensors:
                    values = torch.tensor(strengths[name], device=model.device) * own
                    tensors[name, own] = values.view(-1, 1, 1)
                layer.scaling[name] = tensors[name, own]
        yield
    finally:
        for layer, own_scaling in zip(layers, before, strict=True):
            layer.scaling.update(own_scaling)


class _Chooser:
    """Takes each row's next token; each draws from a random stream of its own, so none disturbs another."""

    def __init__(self, generation: Generation, prompts: Sequence[Sequence[int]]) -> None:
        self._greedy = generation.temperature == 0
        self._histories = [list(prompt) for prompt in prompts]
        self._generators = [torch.Generator().manual_seed(generation.seed + row) for row in range(len(prompts))]
        self._processors = LogitsProcessorList()
        if generation.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(generation.temperature))
            if generation.top_k:
                self._processors.append(TopKLogitsWarper(generation.top_k))
            if generation.top_p < 1:
                self._processors.append(TopPLogitsWarper(generation.top_p))

    def __call__(self, rows: list[int], logits: torch.Tensor) -> list[int]:
        """The next token of each of these rows, from logits (rows, vocabulary)."""
        if self._processors:
            processed = [self._process(row, logits[i]) for i, row in enumerate(rows)]
            logits = torch.stack(processed)
        if self._greedy:
            chosen = logits.argmax(-1).tolist()
        else:
            likely = logits.softmax(-1).cpu()
            chosen = [
                int(torch.multinomial(likely[i], 1, generator=self._generators[row])) for i, row in enumerate(rows)
            ]
        for row, token in zip(rows, chosen, strict=True):
            self._histories[row].append(token)
        return chosen

    def _process(self, row: int, logits: torch.Tensor) -> torch.Tensor:
        history = torch.tensor([self._histories[row]], device=logits.device)
        processed: torch.Tensor = self._processors(history, logits[None])
        return processed[0]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, attention mask), both (rows, longest prompt), padded on the left: all answers begin together."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
