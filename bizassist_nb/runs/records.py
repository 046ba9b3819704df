"""What the JSON in a run directory has to look like: a disk may have damaged it, or somebody may have edited it.

A shape is `str`, `bool`, `int` or `float` (any finite number), `None`, a set of the values there may be, a tuple of
alternatives, a list of the one shape of all items, or a dictionary of what each key has to hold ("*" stands for all
keys). Other keys are not looked at.
"""

from typing import Any, Final

_WORDS: Final = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", None: "null"}
_MISSING: Final = object()
_LARGEST: Final = 2**63

_SUMMARY: Final = {"loss": float, "perplexity": float, "tokens": int, "rows": int}
_COMPARED: Final = {
    "base": _SUMMARY, "tuned": _SUMMARY, "difference": float, "wins": int, "ties": int, "losses": int,
}  # fmt: skip
_JUDGED: Final = {
    **_COMPARED,
    "interval": [float],
    "verdict": {"helped", "no difference", "hurt"},
    "categories": [{**_COMPARED, "category": str}],
    "rows": [{"row": int, "category": str, "question": str, "tokens": int, "base": float, "tuned": float}],
}
EVALUATION: Final = {
    **_JUDGED,
    "sentence": str,
    "notes": [str],
    "general": _JUDGED,
    "answers": (None, {"prompts": int, "max_new_tokens": int, "base": {"*": int}, "tuned": {"*": int}}),
}
_ANSWER: Final = {"text": str, "stopped": bool, "signs": [str]}
ANSWERS: Final = [{"prompt": str, "base": _ANSWER, "tuned": _ANSWER}]
ENVIRONMENT: Final = {
    "model": str,
    "data": str,
    "fingerprint": str,
    "device": str,
    "python": str,
    "versions": {"*": str},
}

_NAMED: Final = {"name": str, "reason": str}
_ROWS: Final = {"rows": int, "tokens": int, "trained_tokens": int, "median": int, "longest": int, "truncated": int}
EVENTS: Final = {
    "state": {"state": str},
    "model": _NAMED,
    "engine": _NAMED,
    "data": {
        "source": str, "training": _ROWS, "held_out": _ROWS, "rejected": int,
        "rejected_rows": [{"number": int, "reason": str}],
        "shown": {"number": int, "runs": [[(str, bool)]]},
    },
    "plan": {"steps": int},
    "preflight": {"sentence": str},
    "fit": {"step": int, "micro_batch": int, "checkpointing": bool, "precision": str, "reason": str},
    "parameters": {"trainable": int, "total": int},
    "sharded": {"held": int, "whole": int},
    "step": {
        "step": int, "loss": float, "learning_rate": float, "gradient_norm": (None, float), "tokens": int,
        "seconds": float,
    },
    "evaluation": {"step": int, "loss": float},
    "resumed": {"step": int},
    "checkpoint": {"step": int},
    "kept": {"step": int},
    "unscored": {"step": int, "reason": str},
    "unanswered": {"reason": str},
    "memory": {"peak": int},
    "error": {"message": str, "expected": bool},
}  # fmt: skip
"""By kind; events of other kinds are shown nowhere, or guarded where they are."""

VOTE: Final = {
    "time": float, "question": str, "base": str, "tuned": str,
    "winner": {"base", "tuned", "tie", "bad"}, "left": {"base", "tuned"},
}  # fmt: skip


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value is not of that shape, in words ("rows[3].base is not a number"); None if it is."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{place or 'it'} is not an object"
        keys = value if "*" in shape else shape
        found = (
            misfit(value.get(key, _MISSING), shape.get(key, shape.get("*")), f"{place}.{key}" if place else key)
            for key in keys
        )
        return next(filter(None, found), None)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{place or 'it'} is not a list"
        return next(filter(None, (misfit(item, shape[0], f"{place}[{i}]") for i, item in enumerate(value))), None)
    alternatives = shape if isinstance(shape, tuple) else (shape,)
    if any(_fits(value, each) for each in alternatives):
        return None
    if value is _MISSING:
        return f"{place} is missing"
    return f"{place or 'it'} is not {' or '.join(map(_words, alternatives))}"


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, dict):
        return misfit(value, shape) is None
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if shape in (int, float):
        kinds = int if shape is int else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) < _LARGEST
    return value is None if shape is None else isinstance(value, shape)


def _words(shape: Any) -> str:
    if isinstance(shape, dict):
        return f"an object with {', '.join(shape)}"
    return f"one of {', '.join(sorted(shape))}" if isinstance(shape, set) else _WORDS[shape]
