"""How an answer is made: who answers, what the model is told, how its tokens are sampled, and where it ends.

The text and range of each option are written here only; `%%ask`, the command line and the chat tab read them.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Final

from bizassist_nb.core.errors import QuestionError
from bizassist_nb.core.settings import allowed, setting, wrong_fields

BASE: Final = "base"
TUNED: Final = "tuned"
PROMPTED: Final = "prompted"
"""The base with training rows as examples in its prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are made; greedily by default, with the system prompt of training.

    Raises:
        QuestionError: naming every option out of range with its value and what is allowed.
    """

    max_new_tokens: int = setting(256, "maximum length of an answer, in tokens", (1, 8192))
    temperature: float = setting(0.0, "0 takes the likeliest token each time; higher is more varied", (0.0, 2.0))
    top_p: float = setting(
        1.0, "sample from the likeliest tokens whose probabilities add up to this; 1 leaves none out", (0.01, 1.0)
    )
    top_k: int = setting(0, "sample from this many of the likeliest tokens; 0 leaves none out", (0, 1000))
    repetition_penalty: float = setting(1.0, "makes tokens that occurred before less likely; 1 is none", (1.0, 2.0))
    seed: int = setting(0, "seed of the sampling, for a temperature above 0", (0, 2**31 - 1))
    strength: float = setting(1.0, "scale of the tuned model's adapter: 0 is the base, 1 as it was trained", (0.0, 1.5))
    stop: tuple[str, ...] = setting((), "a text that ends an answer, and is left out of it; there may be several")
    system: str | None = setting(None, "system prompt in place of the one of training")

    def __post_init__(self) -> None:
        """Check every field."""
        if wrong := wrong_fields(self):
            raise QuestionError("\n".join(wrong))


def add_options(parser: argparse.ArgumentParser, text: Callable[[str], str] = str) -> None:
    """Options of what asks: a field of `Generation` each, --anyway and --prompted; `text` reads what was typed."""
    anyway = "load the base although a run in training may need its GPU memory"
    parser.add_argument("--anyway", action="store_true", help=anyway)
    prompted = "ask base with three training rows as examples in its prompt, too: would a prompt have done?"
    parser.add_argument("--prompted", action="store_true", help=prompted)
    for field in dataclasses.fields(Generation):
        number, several = isinstance(field.default, int | float), isinstance(field.default, tuple)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            action="append" if several else "store",
            type=type(field.default) if number else text,
            default=[] if several else field.default,
            metavar="N" if isinstance(field.default, int) else "X" if number else "TEXT",
            help=field.metadata["text"] + (f" [{allowed(field)}; {field.default}]" if number else ""),
        )


def chosen(options: argparse.Namespace) -> Generation:
    """The `Generation` that the options made by `add_options` ask for.

    Raises:
        QuestionError: if one is out of range.
    """
    typed = {field.name: getattr(options, field.name) for field in dataclasses.fields(Generation)}
    return Generation(**typed | {"stop": tuple(typed["stop"])})
