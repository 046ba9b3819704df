"""Does the merged model answer as the tuned assistant does? What was written is loaded again and compared.

The tuned assistant answers held-out prompts greedily. Then both read every prompt with that answer, and their logits
are compared wherever the next token of the answer is to be chosen. If the likeliest token is the same at each of these
places, the merged model's own greedy answer is the same, token by token; so one pass through its weights is enough,
and weights that have no room in memory can be read from the disk layer by layer.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bizassist_nb import models
from bizassist_nb.data.chat import Message, row_messages
from bizassist_nb.data.rows import read_table, split
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.errors import BizassistError, brief
from bizassist_nb.runs import Run

TOLERANCES: Final[Mapping[str, float]] = {"trained": 0.05, "original": 1.0}
"""How far logits may be off on average, as a share of how far a position's logits are spread (standard deviation).

Rounding to bfloat16 moves each weight by 2**-9 of itself at most (a uniform error, 0.1 % rms), ...
"""

_PROMPTS: Final = 16
_ANSWER: Final = 32
"""Tokens of each answer that are compared."""
_SHORT: Final = 512
"""Prompts of at most so many tokens are preferred, to go easy on memory."""
_ROOM: Final = 2 * 2**30
"""Bytes of memory that a merged model may take on a CPU, and has to leave free on a GPU; the rest stays on disk."""


@dataclasses.dataclass(frozen=True)
class _Answered:
    """Prompts with the tuned assistant's answers, and its logits where each token of them was chosen."""

    prompts: list[list[int]]
    answers: list[list[int]]
    logits: list[Any]
    """For each prompt a tensor of shape (tokens of the answer + 1, vocabulary), in float32 on the CPU."""


def conversations(run: Run) -> list[list[Message]]:
    """The run's first 16 held-out rows, each up to and with the question that is to be answered.

    Raises:
        DataError: if the rows cannot be read any more.
    """
    settings = run.settings
    table = read_table(settings.data, settings.columns)
    _, rows = split(table.rows, subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
    return [row_messages(row, settings.system_prompt)[:-1] for row in rows]


def compare(run: Run, folder: Path, conversations: Sequence[list[Message]], tolerance: float) -> dict[str, Any]:
    """Compare the model in `folder` with the run's tuned assistant.

    "passed", and "failures" in words; "tolerance" and "difference" (mean difference of logits as a share of their
    spread), "largest_logit_difference", "spread"; "equal_next_tokens" (share), "positions"; "equal_answers" and
    "prompts" (numbers); "equal_template" and "equal_special_tokens".
    """
    from bizassist_nb.assistant.bases import loaded_base

    loaded = loaded_base(run.environment["model"])
    adapter = loaded.adapter(run)
    loaded.use([adapter])
    prompts = [loaded.chat.prompt(messages) for messages in conversations]
    chosen = sorted(range(len(prompts)), key=lambda i: max(len(prompts[i]), _SHORT))[:_PROMPTS]
    answered = _answered(loaded.model, adapter, [prompts[i] for i in chosen], loaded.chat)
    try:
        return _compared(folder, loaded.chat, [conversations[i] for i in chosen], answered, tolerance)
    except (BizassistError, OSError, ValueError, RuntimeError) as error:
        return {"passed": False, "failures": [f"it cannot be loaded ({brief(error)})"], "tolerance": tolerance}


def _answered(model: Any, adapter: str, prompts: list[list[int]], chat: ChatTokenizer) -> _Answered:
    from bizassist_nb.assistant.decoding import Sampling, decode, scaled

    strengths = {adapter: [1.0] * len(prompts)}
    answers: list[list[int]] = [[] for _ in prompts]
    tokens = decode(
        model, prompts, strengths=strengths, stop_ids=chat.stop_ids, pad_id=chat.pad_id, max_new_tokens=_ANSWER,
        sampling=Sampling(),
    )  # fmt: skip
    for row, token in tokens:
        answers[row].append(token)
    with scaled(model, strengths):
        logits = _logits(model, prompts, answers, chat.pad_id)
    return _Answered(prompts, answers, logits)


def _compared(
    folder: Path, chat: ChatTokenizer, conversations: Sequence[list[Message]], tuned: _Answered, tolerance: float
) -> dict[str, Any]:
    merged_chat = models.load_tokenizer(folder)
    model = _load(folder)
    logits = _logits(model, tuned.prompts, tuned.answers, chat.pad_id)
    equal_template = merged_chat.tokenizer.chat_template == chat.tokenizer.chat_template and all(
        merged_chat.prompt(messages) == prompt for messages, prompt in zip(conversations, tuned.prompts, strict=True)
    )
    found = _differences(tuned.logits, logits) | {
        "equal_template": equal_template,
        "equal_special_tokens": _special(merged_chat, model) == _expected(chat),
        "tolerance": tolerance,
    }
    failures = _failures(found)
    return {"passed": not failures, "failures": failures, **found}


def _failures(found: Mapping[str, Any]) -> list[str]:
    failures = []
    off, tolerance = found["difference"], found["tolerance"]
    if off is None:
        failures.append("its logits are not all finite")
    elif off > tolerance:
        failures.append(
            f"its logits are off by {off:.1%} of their spread on average, where rounding explains {tolerance:.0%} "
            f"({found['equal_next_tokens']:.0%} of next tokens and {found['equal_answers']} of {found['prompts']} "
            "answers are the same)"
        )
    if not found["equal_template"]:
        failures.append("its chat template or tokenizer writes prompts differently")
    if not found["equal_special_tokens"]:
        failures.append("its end, begin or pad tokens are others")
    return failures


def _differences(tuned: Sequence[Any], merged: Sequence[Any]) -> dict[str, Any]:
    """The figures of two sets of logits, each a tensor of shape (positions, vocabulary) a prompt."""
    import torch

    ours, theirs = torch.cat(list(merged)), torch.cat(list(tuned))
    differences = (ours - theirs).abs()
    spread = float(theirs.std(dim=-1).mean())
    finite = bool(torch.isfinite(differences).all())  # JSON has no NaN
    equal = [a.argmax(dim=-1) == b.argmax(dim=-1) for a, b in zip(merged, tuned, strict=True)]
    return {
        "difference": float(differences.mean()) / spread if finite else None,
        "largest_logit_difference": float(differences.max()) if finite else None,
        "spread": spread,
        "equal_next_tokens": float(torch.cat(equal).double().mean()),
        "positions": len(theirs),
        "equal_answers": sum(bool(each.all()) for each in equal),
        "prompts": len(equal),
    }


def _logits(model: Any, prompts: Sequence[list[int]], answers: Sequence[list[int]], pad_id: int) -> list[Any]:
    """For each prompt the logits where its answer's tokens are chosen, and the one after them."""
    import torch

    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width, keep = max(map(len, rows)), max(map(len, answers)) + 1
    device = models.device()  # where a model computes whose weights are still on the disk
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=keep, use_cache=False
        ).logits
    return [logits[i, -len(answer) - 1 :].float().cpu() for i, answer in enumerate(answers)]


def _load(folder: Path) -> Any:
    """The model as anyone loads it, in the dtype that models are computed with here; what has no room stays on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    room: dict[Any, int] = {"cpu": _ROOM}
    if torch.cuda.is_available():
        room[0] = max(torch.cuda.mem_get_info(0)[0] - _ROOM, 0)
    with models._quietly():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=models.compute_dtype(), device_map="auto", max_memory=room
        ).eval()


def _special(chat: ChatTokenizer, model: Any) -> dict[str, Any]:
    """Which tokens begin, end and pad, by the tokenizer and by both configurations of a loaded model."""
    return _tokens(chat) | {
        f"{name} {role}": _ids(getattr(config, f"{role}_token_id"))
        for name, config in (("config", model.config), ("generation", model.generation_config))
        for role in ("eos", "pad")
    }


def _expected(chat: ChatTokenizer) -> dict[str, Any]:
    return _tokens(chat) | {
        f"{name} {role}": ids
        for name in ("config", "generation")
        for role, ids in (("eos", chat.stop_ids), ("pad", frozenset({chat.pad_id})))
    }


def _tokens(chat: ChatTokenizer) -> dict[str, Any]:
    tokenizer = chat.tokenizer
    return {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "end of an answer": chat.end_id,
    }


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset({value} if isinstance(value, int) else value)
