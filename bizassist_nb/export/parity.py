"""Does the merged model answer as the tuned assistant does? What was written is loaded again and compared.

The tuned assistant answers held-out prompts greedily. Then both read every prompt with that answer, and their logits
are compared wherever the next token of the answer is to be chosen. If the likeliest token is the same at each of these
places, the merged model's own greedy answer is the same, token by token; so one pass through its weights is enough,
and weights that have no room in memory can be read from the disk layer by layer.

A fault in a few weights may hide in what so few answers show, so each weight is compared with the tuned model's, too.
"""

import dataclasses
import gc
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from bizassist_nb.assistant.loaded import LoadedBase, loaded_base
from bizassist_nb.core.errors import BizassistError, brief
from bizassist_nb.data.chat import Message, row_messages
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.export.weights import Weights, original
from bizassist_nb.models import base as models
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import RunDirectory

Base = Literal["trained", "original"]
"""What is merged into: the NF4 weights that training saw, or the 16-bit weights they were made from."""

TOLERANCES: Final[Mapping[str, float]] = {"trained": 0.1, "original": 0.75}
"""How far logits may be off on average, as a share of their spread (their standard deviation at one position).

On the embedded model, rounding the weights to bfloat16 comes to 0.7 % where the rest is done in float32, as on a CPU,
and to 3.7 % where all of it is done in bfloat16, as on a GPU. One zeroed matrix comes to 30 %, a merge that leaves the
adapter out to 80 %. The 16-bit originals differ from the NF4 weights by what the adapter has learned to live with: 37 %
on the embedded model, and 135 M parameters take 4 bits worse than 7 B do. Faults below these are the weights' to show.
"""
WEIGHT_TOLERANCE: Final = 1.5
"""How far a weight may be off, in units of 2**-8 of itself: the most that rounding to bfloat16 moves it.

Where a weight is all but zero, 2**-12 of its matrix's root mean square is the unit: sums taken in another order, or in
TF32, end so far apart.
"""

_PROMPTS: Final = 16
_ANSWER: Final = 32
"""Tokens of each answer that are compared."""
_SHORT: Final = 256
"""Prompts of at most so many tokens are preferred, to go easy on time and memory."""
_ROOM: Final = 2**30
"""Bytes of main memory that a merged model may take; what has no room there or on the GPU is read from the disk."""
_GPU_SPARE: Final = 2 * 2**30
"""Bytes of GPU memory that it leaves free, for what it computes."""


@dataclasses.dataclass(frozen=True)
class _Answered:
    """Prompts with the tuned assistant's answers, and its logits where each token of them was chosen."""

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Any]
    """For each prompt a tensor of shape (tokens of the answer + 1, vocabulary), in float32 on the CPU."""


def conversations(run: RunDirectory) -> list[list[Message]]:
    """The run's held-out rows, each up to and with the question that is to be answered.

    Raises:
        DataError: if the rows cannot be read any more.
        RunError: if they are not those it began with.
    """
    _, _, rows = rows_of(run)
    return [row_messages(row, run.settings.system_prompt)[:-1] for row in rows]


def compare(
    run: RunDirectory, folder: Path, conversations: Sequence[list[Message]], base: Base = "trained"
) -> dict[str, Any]:
    """Compare the model in `folder` with the run's tuned assistant, on 16 of the conversations.

    "passed", and "failures" in words. "difference" (the logits' mean difference as a share of their "spread") with its
    "tolerance", "largest_logit_difference"; "equal_next_tokens" (a share) of "positions", "equal_answers" of "prompts";
    "largest_weight_error" with its "weight_tolerance"; "equal_template", "equal_special_tokens".
    """
    loaded = loaded_base(run.environment["model"])
    adapter = loaded.adapter(run)
    loaded.use([adapter])
    prompts = [loaded.chat.prompt(messages) for messages in conversations]
    chosen = sorted(range(len(prompts)), key=lambda i: max(len(prompts[i]), _SHORT))[:_PROMPTS]
    tuned = _answered(loaded.model, [prompts[i] for i in chosen], loaded.chat)
    limits = {"tolerance": TOLERANCES[base], "weight_tolerance": WEIGHT_TOLERANCE}
    try:
        chat = models.load_tokenizer(folder)
        equal_prompts = [chat.prompt(conversations[i]) == prompts[i] for i in chosen]
        found = {
            "equal_template": chat.tokenizer.chat_template == loaded.chat.tokenizer.chat_template
            and all(equal_prompts),
            "largest_weight_error": _largest_weight_error(folder, loaded, adapter, base),
        }
        with _quietly():
            found |= _tokens_and_logits(_load(folder), chat, loaded.chat, tuned)
    except (BizassistError, OSError, ValueError, RuntimeError) as error:
        return {"passed": False, "failures": [f"it cannot be loaded ({brief(error)})"], **limits}
    finally:
        gc.collect()  # what was loaded here gives its memory back
    failures = _failures(found | limits)
    return {"passed": not failures, "failures": failures, **found, **limits}


def _failures(found: Mapping[str, Any]) -> list[str]:
    failures = []
    off, weight_off = found["difference"], found["largest_weight_error"]
    if off is None or off > found["tolerance"]:
        how = "are not all finite" if off is None else f"are off by {off:.1%} of their spread on average"
        failures.append(
            f"its logits {how} where {found['tolerance']:.0%} is allowed; {found['equal_next_tokens']:.0%} of the next "
            f"tokens and {found['equal_answers']} of {found['prompts']} answers are the same"
        )
    if weight_off is None or weight_off > found["weight_tolerance"]:
        how = "not a finite number" if weight_off is None else f"off by {weight_off:,.1f} roundings"
        failures.append(f"a weight is {how} where {found['weight_tolerance']:g} are allowed")
    if not found["equal_template"]:
        failures.append("its tokenizer or chat template writes prompts differently")
    if not found["equal_special_tokens"]:
        failures.append("its end, begin or pad tokens are others")
    return failures


def _answered(model: Any, prompts: list[list[int]], chat: ChatTokenizer) -> _Answered:
    """Through the model's own modules: on a GPU, a graph for so many rows takes longer to capture than it saves."""
    import torch

    ids, mask = _left_padded(prompts, chat.pad_id)
    with torch.inference_mode():
        grown = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=_ANSWER, do_sample=False, repetition_penalty=1.0,
            eos_token_id=sorted(chat.stop_ids), pad_token_id=chat.pad_id,
        )  # fmt: skip
    told = grown[:, ids.shape[1] :].tolist()
    answers = [list(itertools.takewhile(lambda token: token not in chat.stop_ids, row)) for row in told]
    return _Answered(prompts, answers, _logits(model, prompts, answers, chat.pad_id))


def _logits(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int) -> list[Any]:
    """For each prompt the logits where its answer's tokens are chosen, and the one after them."""
    import torch

    ids, mask = _left_padded([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], pad_id)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keep = max(map(len, answers)) + 1
    with torch.inference_mode():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits
    return [logits[i, -len(answer) - 1 :].float().cpu() for i, answer in enumerate(answers)]


def _left_padded(rows: Sequence[list[int]], pad_id: int) -> tuple[Any, Any]:
    """(input ids, attention mask) where models compute, which is not where weights are that stay on the disk."""
    import torch

    width = max(map(len, rows))
    ids = [[pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=models.device()), torch.tensor(mask, device=models.device())


def _load(folder: Path) -> Any:
    """The model as anyone loads it, in the dtype that models are computed with here; what has no room stays on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    room: dict[Any, int] = {"cpu": _ROOM}
    if torch.cuda.is_available():
        room[0] = max(torch.cuda.mem_get_info(0)[0] - _GPU_SPARE, 0)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=models.compute_dtype(), device_map="auto", max_memory=room
    ).eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without a progress bar, and without accelerate's word on weights that stay on the disk."""
    logger = logging.getLogger("accelerate.big_modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with models.quietly():
            yield
    finally:
        logger.setLevel(level)


def _tokens_and_logits(model: Any, chat: ChatTokenizer, tuned_chat: ChatTokenizer, tuned: _Answered) -> dict[str, Any]:
    logits = _logits(model, tuned.prompts, tuned.answers, tuned_chat.pad_id)
    return _differences(tuned.logits, logits) | {
        "equal_special_tokens": _special_tokens(chat) == _special_tokens(tuned_chat)
        and all(
            (_ids(config.eos_token_id), config.pad_token_id) == (tuned_chat.stop_ids, tuned_chat.pad_id)
            for config in (model.config, model.generation_config)
        )
    }


def _differences(tuned: Sequence[Any], merged: Sequence[Any]) -> dict[str, Any]:
    """The figures of two sets of logits, each a tensor of shape (positions, vocabulary) a prompt."""
    import torch

    sums = [float((ours - theirs).abs().sum()) for ours, theirs in zip(merged, tuned, strict=True)]
    largest = max(float((ours - theirs).abs().max()) for ours, theirs in zip(merged, tuned, strict=True))
    finite = all(bool(torch.isfinite(ours).all()) for ours in merged)  # JSON has no NaN
    spread = float(torch.cat([theirs.std(dim=-1) for theirs in tuned]).mean())
    equal = [ours.argmax(dim=-1) == theirs.argmax(dim=-1) for ours, theirs in zip(merged, tuned, strict=True)]
    return {
        "difference": sum(sums) / sum(theirs.numel() for theirs in tuned) / spread if finite else None,
        "spread": spread,
        "largest_logit_difference": largest if finite else None,
        "equal_next_tokens": float(torch.cat(equal).double().mean()),
        "positions": sum(len(each) for each in equal),
        "equal_answers": sum(bool(each.all()) for each in equal),
        "prompts": len(equal),
    }


def _special_tokens(chat: ChatTokenizer) -> tuple[int | None, ...]:
    tokenizer = chat.tokenizer
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, chat.end_id


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset({value} if isinstance(value, int) else value)


def _largest_weight_error(folder: Path, loaded: LoadedBase, adapter: str, base: Base) -> float | None:
    """The largest error of a written weight, in units of WEIGHT_TOLERANCE; None if one is not finite.

    What it should be is taken from the tuned model in memory, with the adapter's part as PEFT computes it; the weights
    merged into are read again if they are not the tuned model's own.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import LoraLayer

    written = Weights(str(folder), nf4=False)
    originals = original(loaded.base.source) if base == "original" else None
    layers = {name: module for name, module in loaded.model.named_modules() if isinstance(module, LoraLayer)}
    largest = torch.zeros((), device=models.device())
    for parameter_name, parameter in loaded.model.named_parameters():
        layer, is_base, _ = parameter_name.rpartition(".base_layer.")
        name = parameter_name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if name not in written.names:  # LoRA's own
            continue
        state = getattr(parameter, "quant_state", None)
        if originals:
            should = originals.read(name).float()
        else:
            should = (parameter.data if state is None else dequantize_4bit(parameter.data, state)).float()
        if is_base and parameter_name.endswith(".weight"):
            should = should + layers[layer].get_delta_weight(adapter).float()
        least = torch.linalg.vector_norm(should) / should.numel() ** 0.5 * 2**-12
        for ours, theirs in zip(written.read(name).split(4096), should.split(4096), strict=True):  # for memory's sake
            errors = (ours.float() - theirs).abs() / (theirs.abs() * 2**-8 + least)
            largest = torch.maximum(largest, errors.max())  # NaN goes on
    return float(largest) if torch.isfinite(largest) else None
