"""Decoding several answers as one batch, from one copy of the weights, each row with its own strength of each adapter.

A LoRA layer adds `B(A(x)) * scaling` to the base's output. `scaling` is a number; here it is a tensor of shape
(rows, 1, 1), which broadcasts over the batch: 0 for a row that is to be the base's, the trained value for the tuned.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from tokenizers.decoders import DecodeStream
from transformers import DynamicCache, LogitsProcessorList
from transformers.generation import logits_process

from bizassist_nb.assistant.cuda import decode_graph
from bizassist_nb.assistant.prefix_cache import PrefixCache, Strengths
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.tokens import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that are answered together."""

    prompts: Sequence[Sequence[int]]
    """Input ids of each row, question included."""
    strengths: Strengths
    """Of each adapter, by name, its strength in every row; 1 is as trained."""
    stop_ids: frozenset[int]
    """Tokens that end an answer."""
    pad_id: int
    penalties: Sequence[float] = ()
    """Repetition penalty of each row; without any, the `Generation`'s."""
    over: set[int] = dataclasses.field(default_factory=set)
    """Rows, by index, that get no further token; who reads the answers may add to it meanwhile."""


def decode(
    model: Any, batch: Batch, generation: Generation, prefix: PrefixCache | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as answers grow: every living row's next token, step by step, end tokens left out.

    The model is only altered while a step is computed: between yields, and however the generator ends, it is as it was.
    What `prefix` has cached of the prompts is not read again; what is read now is stored there. Strengths come from the
    batch, which has one for each row, not from `generation`.
    """
    choose = _Chooser(generation, batch)
    rows = list(range(len(batch.prompts)))  # those still growing, as indices into prompts
    with read_prompts(model, batch, generation.max_new_tokens, prefix) as (logits, steps):
        for count in range(1, generation.max_new_tokens + 1):
            chosen = choose(rows, logits)
            living = [i for i, token in enumerate(chosen) if token not in batch.stop_ids]
            for i in living:
                yield rows[i], chosen[i]
            living = [i for i in living if rows[i] not in batch.over]
            if not living or count == generation.max_new_tokens:
                return
            if len(living) < len(rows):
                steps.select(living)
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
def read_prompts(
    model: Any, batch: Batch, max_new_tokens: int, prefix: PrefixCache | None
) -> Iterator[tuple[torch.Tensor, "ModuleSteps | decode_graph.FusedSteps"]]:
    """The logits (rows, vocabulary) after the prompts, and what computes those after each further token."""
    asked, places = (batch, []) if prefix else _distinct(batch)
    ids, mask = left_padded(asked.prompts, batch.pad_id, model.device)
    cache = DynamicCache(config=model.config)
    known = prefix.take(batch.prompts, batch.strengths, cache) if prefix else 0
    steps = ModuleSteps(model, asked, cache, mask)
    logits = steps.forward(ids[:, known:])
    if len(places) > len(asked.prompts):
        steps.select(places)
        logits, mask = logits[places], mask[places]
    tokens = ids.shape[1] + max_new_tokens
    if len(batch.prompts) > decode_graph.most_rows(model, tokens):
        steps.prefix = prefix
        try:
            yield logits, steps
        finally:
            steps.store_prefix()
        return
    graph = decode_graph.take(model, list(batch.strengths), len(batch.prompts), tokens)
    try:
        graph.begin(cache, mask, scales(model, batch.strengths))
        del cache, steps  # copied: their memory is free for the answer
        yield logits, graph
    finally:
        decode_graph.put_back(model, graph)


def _distinct(batch: Batch) -> tuple[Batch, list[int]]:
    """The rows that differ in prompt or strengths, each once; and for every row of the batch its place among them."""
    rows = list(zip(map(tuple, batch.prompts), *batch.strengths.values(), strict=True))
    firsts = sorted({rows.index(row) for row in rows})
    strengths = {name: [values[i] for i in firsts] for name, values in batch.strengths.items()}
    once = dataclasses.replace(batch, prompts=[batch.prompts[i] for i in firsts], strengths=strengths)
    return once, [firsts.index(rows.index(row)) for row in rows]


class ModuleSteps:
    """Steps through the model's own modules: any model, any device. An answer that is over costs nothing more."""

    def __init__(self, model: Any, batch: Batch, cache: DynamicCache, mask: torch.Tensor):
        self._model, self._cache, self._mask = model, cache, mask
        self._strengths = batch.strengths
        self._read = [list(prompt) for prompt in batch.prompts]
        self.prefix: PrefixCache | None = None
        """Where `store_prefix` stores what was read, once."""

    def store_prefix(self) -> None:
        """Store what was read, for the next question."""
        if self.prefix:
            self.prefix.store(self._read, self._strengths, self._cache)
        self.prefix = None

    def select(self, living: list[int]) -> None:
        """Go on with these rows, which may be named twice; the others are over."""
        self.store_prefix()  # while all rows are there
        rows = torch.tensor(living, device=self._mask.device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        self._strengths = {name: [values[i] for i in living] for name, values in self._strengths.items()}

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """The logits (rows that are left, vocabulary) in float32 after one more token in each of them."""
        if self.prefix:
            for read, token in zip(self._read, tokens, strict=True):
                read.append(token)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        return self.forward(torch.tensor(tokens, device=self._mask.device)[:, None])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after these further input ids (rows, columns)."""
        activate(self._model, list(self._strengths))  # another question may have come in between
        with torch.inference_mode(), scaled(self._model, self._strengths):
            output = self._model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions(self._mask)[:, -ids.shape[1] :],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: torch.Tensor = output.logits[:, -1]
            return logits.float()


def activate(model: Any, adapters: Sequence[str]) -> None:
    """Have these adapters, and where there are any no others, take part in the forward pass.

    Raises:
        KeyError: if one has been removed.
    """
    if not adapters:
        return
    if gone := set(adapters) - set(getattr(model, "peft_config", ())):
        raise KeyError(f"the adapters {sorted(gone)} are not there any more")
    if set(model.active_adapters) != set(adapters):
        model.base_model.set_adapter(list(adapters), inference_mode=True)


def scales(model: Any, strengths: Strengths) -> dict[str, list[float]]:
    """Strengths times each adapter's own scaling: alpha / rank, or alpha / sqrt(rank) with rslora."""
    configs = getattr(model, "peft_config", {}).items()
    own = {name: config.lora_alpha / config.r ** (0.5 if config.use_rslora else 1) for name, config in configs}
    return {name: [value * own[name] for value in values] for name, values in strengths.items()}


@contextmanager
def scaled(model: Any, strengths: Strengths) -> Iterator[None]:
    """Give every LoRA layer one strength a row, 0 for adapters not named, and its own scaling back afterwards."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    rows = {name: torch.tensor(values, device=model.device).view(-1, 1, 1) for name, values in strengths.items()}
    scale = functools.cache(lambda name, own: rows[name] * own if name in rows else 0.0)  # one tensor for all layers
    try:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling.update({name: scale(name, float(value)) for name, value in own.items()})
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling.update(own)


class _Chooser:
    """Takes each row's next token; each draws from a random stream of its own, so none disturbs another."""

    def __init__(self, generation: Generation, batch: Batch) -> None:
        self._greedy = generation.temperature == 0
        self._prompts = batch.prompts
        rows = range(len(batch.prompts))
        self._generators = [torch.Generator().manual_seed(generation.seed + row) for row in rows]
        self._penalties = batch.penalties or [generation.repetition_penalty for _ in rows]
        self._read: torch.Tensor | None = None
        self._processors = LogitsProcessorList()
        if not self._greedy:
            self._processors.append(logits_process.TemperatureLogitsWarper(generation.temperature))
            if generation.top_k:
                self._processors.append(logits_process.TopKLogitsWarper(generation.top_k))
            if generation.top_p < 1:
                self._processors.append(logits_process.TopPLogitsWarper(generation.top_p))

    def __call__(self, rows: list[int], logits: torch.Tensor) -> list[int]:
        """The next token of each of these rows, from logits (rows, vocabulary)."""
        if any(penalty != 1 for penalty in self._penalties):
            logits = self._penalised(rows, logits)
        if self._greedy:
            chosen: list[int] = logits.argmax(-1).tolist()
        else:
            likely = self._processors(None, logits).softmax(-1).cpu()
            chosen = [
                int(torch.multinomial(likely[i], 1, generator=self._generators[row])) for i, row in enumerate(rows)
            ]
        if self._read is not None:
            self._read[rows, chosen] = True
        return chosen

    def _penalised(self, rows: list[int], logits: torch.Tensor) -> torch.Tensor:
        """As RepetitionPenaltyLogitsProcessor of transformers, which has one penalty for all rows."""
        if self._read is None:  # whether a token (column) occurred in a row
            self._read = torch.zeros(len(self._prompts), logits.shape[1], dtype=torch.bool, device=logits.device)
            for row, prompt in enumerate(self._prompts):
                self._read[row, list(prompt)] = True
        penalty = torch.tensor([self._penalties[row] for row in rows], device=logits.device)[:, None]
        return torch.where(self._read[rows], torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, attention mask), both (rows, longest prompt), padded on the left: all answers begin together."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of each token in its row, padding left out."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
