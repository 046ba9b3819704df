"""What was read for the last question, so that the next one is read only from where the two part.

System prompt and template begin every question, and in a conversation all earlier turns do; the keys and values of
tokens do not depend on what comes after them.
"""

from collections.abc import Mapping, Sequence

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_Strengths = dict[str, list[float]]


class PrefixCache:
    """The tokens of every row of the last question and its answers, with their keys and values.

    For float32 only: with the rounding of 16 bits an answer would depend on what was asked before it.
    """

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.forget()

    def forget(self) -> None:
        """Let go of it all."""
        self._kept: tuple[_Strengths, list[list[int]], list[tuple[torch.Tensor, torch.Tensor]]] = ({}, [], [])

    def keep(self, rows: Sequence[list[int]], strengths: Mapping[str, Sequence[float]], cache: DynamicCache) -> None:
        """Keep what was read of these rows, padded on the left, under these strengths of adapters."""
        if any(type(layer) is not DynamicLayer for layer in cache.layers):
            return  # a sliding window has let go of the beginning
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        columns = min(tensor.shape[2] for layer in layers for tensor in layer)
        unread = max(map(len, rows)) - columns  # an interrupted step has come through some of the layers only
        self._kept = (
            _copied(strengths),
            [row[: len(row) - unread] for row in rows],
            [(keys[:, :, :columns], values[:, :, :columns]) for keys, values in layers],
        )

    def begin(
        self, prompts: Sequence[Sequence[int]], strengths: Mapping[str, Sequence[float]], cache: DynamicCache
    ) -> int:
        """Move the beginning that these prompts share with what was kept into an empty cache, padded on the left.

        Gives the number of columns that need not be read any more; the last one always has to be, for its logits.
        """
        strengths_before, rows, layers = self._kept
        self.forget()
        if len(rows) != len(prompts) or strengths_before != _copied(strengths):
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


def _copied(strengths: Mapping[str, Sequence[float]]) -> _Strengths:
    return {name: list(values) for name, values in strengths.items()}


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    parted = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(parted, min(len(one), len(other)))
