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
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is taken from the logits."""

    temperature: float = 0.0
    """0 takes the likeliest token (greedy)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    repetition_penalty: float = 1.0
    seed: int = 0


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    strengths: Mapping[str, Sequence[float]],
    stop_ids: frozenset[int],
    pad_id: int,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[tuple[int, int]]:
    """Yield (row, token id) as answers grow: every living row's next token, step by step, end tokens left out.

    `strengths` maps each adapter's name to its strength in every row (1 is as trained). The model is only altered while
    a step is computed: between yields, and however the generator ends, it is as it was.
    """
    rows = list(range(len(prompts)))  # those still growing, as indices into prompts
    ids, mask = _left_padded(prompts, pad_id, model.device)
    histories = [list(prompt) for prompt in prompts]
    choosers = [_Chooser(sampling, row) for row in rows]
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        with (
            torch.inference_mode(),
            scaled(model, {name: [values[row] for row in rows] for name, values in strengths.items()}),
        ):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits = output.logits[:, -1].float()
        chosen = [choosers[row](histories[row], logits[i]) for i, row in enumerate(rows)]
        living = [i for i, token in enumerate(chosen) if token not in stop_ids]
        for i in living:
            histories[rows[i]].append(chosen[i])
            yield rows[i], chosen[i]
        if not living:
            return
        if len(living) < len(rows):  # an answer that is over costs nothing more
            kept = torch.tensor(living, device=mask.device)
            cache.batch_select_indices(kept)
            mask = mask[kept]
            rows = [rows[i] for i in living]
        ids = torch.tensor([[chosen[i]] for i in living], device=mask.device)
        mask = torch.cat([mask, mask.new_ones(len(living), 1)], dim=1)


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
    """Takes one row's next token; each row draws from a random stream of its own, so none disturbs another."""

    def __init__(self, sampling: Sampling, row: int) -> None:
        self._greedy = sampling.temperature == 0
        self._generator = torch.Generator().manual_seed(sampling.seed + row)
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        if not self._greedy:
            self._processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, history: list[int], logits: torch.Tensor) -> int:
        """The token after `history`, from its logits of shape (vocabulary,)."""
        if self._processors:
            logits = self._processors(torch.tensor([history], device=logits.device), logits[None])[0]
        if self._greedy:
            return int(logits.argmax())
        return int(torch.multinomial(logits.softmax(-1).cpu(), 1, generator=self._generator))


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(input ids, attention mask), both (rows, longest prompt), padded on the left: all answers begin together."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
