"""Does the merged model answer as the tuned assistant does? What was written is loaded again and compared.

The tuned assistant answers held-out prompts greedily. Then both read every prompt with that answer, and their logits
are compared at each position that predicts a token of the answer. If the likeliest token is the same at all of them,
the merged model's own greedy answer is the same; so one pass through its weights is enough, and weights that do not
fit in memory can be read from the disk layer by layer.

So few answers may not show a fault in a few weights, so each weight is compared with the tuned model's, too.
"""

import gc
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from bizassist_nb.assistant.loaded import LoadedBase
from bizassist_nb.core.errors import BizassistError, brief
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.chat import Message, row_messages
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.export.weights import Base, TunedWeights, Weights
from bizassist_nb.models import base as models
from bizassist_nb.runs import records
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import RunDirectory

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
_FEWEST: Final = 4
_SHORT: Final = 256
"""Tokens of a prompt: longer ones are left out if as many as `_FEWEST` others remain, to go easy on time and memory."""
_ROOM: Final = 2**30
"""Bytes of main memory that a merged model may take; what has no room there or on the GPU is read from the disk."""
_CONTEXT: Final = 3 * 2**29
"""This process takes at most so many bytes of GPU memory besides tensors; the rest is other processes'."""
_ROOM_BESIDE: Final = 2 * 2**30
"""Bytes that a merged model may take of a GPU beside another process, such as a worker that may need more soon."""
_GPU_SPARE: Final = 2 * 2**30
"""Bytes of GPU memory that it leaves free, for what it computes."""


# accelerate warns of weights that stay on the disk, which is meant here.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)


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
) -> records.Parity:
    """Compare the model in `folder` with the run's tuned assistant, on at most 16 short conversations."""
    tuned = TunedWeights(run, base)
    ours = tuned.loaded
    ours.use([tuned.adapter])
    chosen = sorted(conversations, key=lambda messages: max(len(ours.chat.prompt(messages)), _SHORT))[:_PROMPTS]
    prompts = [ours.chat.prompt(messages) for messages in chosen]
    short = max(_FEWEST, sum(len(prompt) <= _SHORT for prompt in prompts))
    chosen, prompts = chosen[:short], prompts[:short]
    answers = _answers(ours, tuned.adapter, prompts)
    tuned_logits = _logits(ours.model, prompts, answers, ours.chat.pad_id)
    limits: dict[str, Any] = {"tolerance": TOLERANCES[base], "weight_tolerance": WEIGHT_TOLERANCE}
    try:
        chat = models.load_tokenizer(folder)
        weight_error = largest_weight_error(Weights(str(folder)), tuned)
        with models.quietly():
            model = _load(folder)
        found = records.Parity(
            passed=True,
            failures=[],
            **limits,
            **_differences(tuned_logits, _logits(model, prompts, answers, ours.chat.pad_id)),
            largest_weight_error=weight_error,
            equal_template=chat.tokenizer.chat_template == ours.chat.tokenizer.chat_template
            and [chat.prompt(messages) for messages in chosen] == prompts,
            equal_special_tokens=_special_tokens(chat) == _special_tokens(ours.chat)
            and all(
                (_ids(config.eos_token_id), config.pad_token_id) == (ours.chat.stop_ids, ours.chat.pad_id)
                for config in (model.config, model.generation_config)
            ),
        )
    except (BizassistError, OSError, ValueError, RuntimeError) as error:
        return records.Parity(passed=False, failures=[f"it cannot be loaded ({brief(error)})"], **limits)
    finally:
        model = None
        gc.collect()  # what was loaded here gives its memory back
    failures = _failures(found)
    return msgspec.structs.replace(found, passed=not failures, failures=failures)


def _failures(found: records.Parity) -> list[str]:
    failures = []
    off, weight_off = found.difference, found.largest_weight_error
    if off is None or off > found.tolerance:
        how = "are not all finite" if off is None else f"are off by {off:.1%} of their spread on average"
        failures.append(
            f"its logits {how} where {found.tolerance:.0%} is allowed; {found.equal_next_tokens:.0%} of the next "
            f"tokens and {found.equal_answers} of {found.prompts} answers are the same"
        )
    if weight_off is None or weight_off > found.weight_tolerance:
        how = "not a finite number" if weight_off is None else f"off by {weight_off:,.1f} roundings"
        failures.append(f"a weight is {how} where {found.weight_tolerance:g} are allowed")
    if not found.equal_template:
        failures.append("its tokenizer or chat template writes prompts differently")
    if not found.equal_special_tokens:
        failures.append("its end, begin or pad tokens are others")
    return failures


def _answers(loaded: LoadedBase, adapter: str, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The tuned assistant's greedy answers."""
    from bizassist_nb.assistant.decoding import Batch, decode

    batch = Batch(prompts, {adapter: [1.0] * len(prompts)}, loaded.chat.stop_ids, loaded.chat.pad_id)
    answers: list[list[int]] = [[] for _ in prompts]
    for row, token in decode(loaded.model, batch, Generation(max_new_tokens=_ANSWER)):
        answers[row].append(token)
    loaded.forget_cache()  # the merged model needs its memory
    return answers


def _logits(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int) -> list[Any]:
    """For each prompt the logits where its answer's tokens are chosen, and the one after them."""
    import torch

    from bizassist_nb.assistant.decoding import left_padded, positions

    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ids, mask = left_padded(rows, pad_id, models.device())  # weights that stay on the disk are elsewhere
    last = max(map(len, answers)) + 1
    with torch.inference_mode():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), logits_to_keep=last, use_cache=False
        ).logits
    return [logits[i, -len(answer) - 1 :].float().cpu() for i, answer in enumerate(answers)]


def _load(folder: Path) -> Any:
    """The model as anyone loads it, in the dtype that models are computed with here; what has no room stays on disk."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=models.compute_dtype(), device_map="auto", max_memory=room()
    ).eval()


def room() -> dict[str | int, int]:
    """Bytes that a merged model may take of main memory and of the GPU; of a GPU that others use it takes little."""
    import torch

    found: dict[str | int, int] = {"cpu": _ROOM}
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info(0)
        others = whole - free - torch.cuda.memory_reserved(0)
        found[0] = max(min(free - _GPU_SPARE, _ROOM_BESIDE if others > _CONTEXT else free), 0)
    return found


def _differences(tuned: Sequence[Any], merged: Sequence[Any]) -> dict[str, Any]:
    """The figures of two sets of logits, each a tensor of shape (positions, vocabulary) a prompt."""
    import torch

    ours, theirs = torch.cat(list(merged)), torch.cat(list(tuned))
    off, spread = (ours - theirs).abs(), float(theirs.std(dim=-1).mean())
    finite = bool(torch.isfinite(ours).all())  # JSON has no NaN
    equal = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
    return {
        "difference": float(off.mean(dtype=torch.float64)) / spread if finite else None,
        "spread": spread,
        "largest_logit_difference": float(off.max()) if finite else None,
        "equal_next_tokens": float(equal.double().mean()),
        "positions": len(equal),
        "equal_answers": sum(bool(each.all()) for each in torch.split(equal, [len(each) for each in tuned])),
        "prompts": len(tuned),
    }


def _special_tokens(chat: ChatTokenizer) -> tuple[int | None, ...]:
    tokenizer = chat.tokenizer
    return tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, chat.end_id


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset({value} if isinstance(value, int) else value)


def largest_weight_error(written: Weights, tuned: TunedWeights) -> float | None:
    """The largest error of a written weight, in units of WEIGHT_TOLERANCE; None if one is not finite."""
    import torch

    largest = torch.zeros((), device=models.device())
    for name in tuned.shapes().keys() & written.names:  # one that is missing shows in the logits
        should = tuned.read(name)
        least = (torch.linalg.vector_norm(should) / should.numel() ** 0.5 * 2**-12).clamp(min=1e-30)  # all may be 0
        for ours, theirs in zip(written.read(name).split(4096), should.split(4096), strict=True):  # for memory's sake
            errors = (ours.float() - theirs).abs() / (theirs.abs() * 2**-8 + least)
            largest = torch.maximum(largest, errors.max())  # NaN goes on
    return float(largest) if torch.isfinite(largest) else None
