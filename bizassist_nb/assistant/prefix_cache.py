"""Keys and values of the last question and its answers, so that the next one is read only from where the two part.

System prompt and template begin every question, and in a conversation all earlier turns do; the keys and values of
tokens do not depend on what comes after them.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

Strengths = Mapping[str, Sequence[float]]
"""Of each adapter, by name, its strength in every row."""


class PrefixCache:
    """The tokens of every row of the last question and its answers, with their keys and values.

    For float32 only: with the rounding of 16 bits an answer would depend on what was asked before it.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Free it all."""
        self.cached: tuple[Strengths, list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]] = ({}, [], [])
        """Strengths and tokens of the rows, and keys and values of each layer."""

    def store(self, rows: Sequence[list[int]], strengths: Strengths, cache: DynamicCache) -> None:
        """Store what was read of these rows, padded on the left, under these strengths of adapters."""
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return  # a sliding window has dropped the beginning
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        columns = min(tensor.shape[2] for layer in layers for tensor in layer)
        unread = max(map(len, rows)) - columns  # an interrupted step has come through some of the layers only
        self.cached = (
            strengths,
            [row[: len(row) - unread] for row in rows],
            [(keys[:, :, :columns], values[:, :, :columns]) for keys, values in layers],
        )

    def take(self, prompts: Sequence[Sequence[int]], strengths: Strengths, cache: DynamicCache) -> int:
        """Move what is cached of these prompts' beginnings into an empty cache, padded on the left.

        Gives the number of columns that need not be read any more; the last one always has to be, for its logits.
        """
        strengths_before, rows, layers = self.cached
        self.forget()
        if len(rows) != len(prompts) or strengths_before != strengths:
            return 0
        width, width_before = max(map(len, prompts)), max(map(len, rows))
        pairs = list(zip(prompts, rows, strict=True))
        known = width - max(len(new) - _shared(new[:-1], old) for new, old in pairs)
        if not known:
            return 0
        # A row's first token stands in another column than before; what this makes of padding is masked.
        shifts = torch.tensor([(width_before - len(old)) - (width - len(new)) for new, old in pairs])
        places = (torch.arange(known) + shifts[:, None]).clamp(min=0)[:, None, :, None]
        for number in range(len(layers)):
            keys, values = layers.pop(0)  # one by one, so that no two copies of all are in memory
            cache.update(keys.take_along_dim(places, 2), values.take_along_dim(places, 2), number)
        return known


Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer."""


def read(model: Any, ids: Sequence[int]) -> Layers:
    """Keys and values of tokens that several rows begin with; none where these cannot be gone on from.

    A layer with a sliding window forgets them, and on a GPU Unsloth's models read on by single tokens only.
    """
    if not ids or ("unsloth" in sys.modules and model.device.type == "cuda"):
        return []
    cache, row = DynamicCache(config=model.config), torch.tensor([ids], device=model.device)
    with torch.no_grad():
        model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
    whole = all(type(layer) is DynamicLayer for layer in cache.layers)
    return [(layer.keys, layer.values) for layer in cache.layers] if whole else []


def begun(model: Any, layers: Layers, rows: int) -> DynamicCache:
    """A cache for so many rows that begin with what `read` has read."""
    cache = DynamicCache(config=model.config)
    for number, layer in enumerate(layers):
        cache.update(*(part.expand(rows, -1, -1, -1) for part in layer), number)
    return cache


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    parted = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parted, min(len(one), len(other)))
