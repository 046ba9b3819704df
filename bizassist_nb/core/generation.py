"""How an answer is made: who answers, and how its tokens are drawn.

The text and range of each option are written once, here; `%%ask`, the command line and the chat tab are made from them.
"""

import argparse
import dataclasses
from typing import Any, Final

from bizassist_nb.core.errors import QuestionError

BASE: Final = "base"
TUNED: Final = "tuned"


def _number(default: float, text: str, least: float, most: float) -> Any:
    """A field with its help text and its range, inclusive."""
    return dataclasses.field(default=default, metadata={"text": text, "least": least, "most": most})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """How answers are drawn, greedily by default.

    Raises:
        QuestionError: naming every option out of range with its value and what is allowed.
    """

    max_new_tokens: int = _number(256, "length of an answer at most, in tokens", 1, 8192)
    temperature: float = _number(0.0, "0 takes the likeliest token each time; higher is more varied", 0, 2)
    top_p: float = _number(
        1.0, "draw from the likeliest tokens that have this probability together; 1 leaves none out", 0.01, 1
    )
    top_k: int = _number(0, "draw from this many of the likeliest tokens; 0 leaves none out", 0, 1000)
    repetition_penalty: float = _number(1.0, "makes what was said already less likely; 1 is none", 1, 2)
    seed: int = _number(0, "seed of the drawing, with a temperature above 0", 0, 2**31 - 1)
    strength: float = _number(1.0, "of the tuned model's adapter: 0 is the base, 1 as it was trained", 0, 1.5)

    def __post_init__(self) -> None:
        """Check every field."""
        wrong = [
            f"{field.name} = {value}: has to be from {_range(field)} ({field.metadata['text']})"
            for field, value in self._values()
            if not field.metadata["least"] <= value <= field.metadata["most"]
        ]
        if wrong:
            raise QuestionError("\n".join(wrong))

    def _values(self) -> "list[tuple[dataclasses.Field[Any], Any]]":
        return [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option of a command or a magic for each field of `Generation`."""
    for field in dataclasses.fields(Generation):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            metavar="N" if isinstance(field.default, int) else "X",
            help=f"{field.metadata['text']} [{_range(field)}; {field.default}]",
        )


def chosen(options: argparse.Namespace) -> Generation:
    """What the options that `add_options` made say.

    Raises:
        QuestionError: if one is out of range.
    """
    return Generation(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Generation)})


def _range(field: "dataclasses.Field[Any]") -> str:
    return f"{field.metadata['least']:g} to {field.metadata['most']:,g}"
