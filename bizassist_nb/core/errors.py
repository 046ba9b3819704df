"""What can go wrong and be put right by the person at the keyboard.

Every message says what is wrong, the value, and what to do about it.
"""

import contextlib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Final

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Control characters, except tab and new line, and lone surrogates, which cannot be encoded."""

_SECRETS: Final = re.compile(r"(?<=:/)(/?)[^/\s?#\"']+@|\bhf_[A-Za-z0-9]{20,}")
"""What stands before the @ of an address, and tokens of the hub."""


def printable(text: str) -> str:
    r"""The text with control characters spelt out (\x1b), so that it cannot move a terminal's cursor or set colours."""
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), text.replace("\r\n", "\n"))


def without_secrets(text: str) -> str:
    """The text without tokens of the hub (the one in use, and whatever looks like one) and passwords in addresses."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if len(token) >= 8:  # a shorter one is none, and would be found within words
            text = text.replace(token, "(the token)")
    return _SECRETS.sub(lambda found: "(the token)" if found[1] is None else f"{found[1]}(the password)@", text)


def cut(text: str, most: int = 80) -> str:
    """The beginning of a text, with at most that many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def brief(error: BaseException) -> str:
    """Another library's error on one line: its type and what it begins with, without secrets."""
    lines = without_secrets(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch has a type of error for that, its libraries only a message."""
    import torch

    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextlib.contextmanager
def without_locals() -> Iterator[None]:
    """Clear the local variables of the frames that an error passed before it left this block.

    IPython stores the last error. A model in one of its frames would stay in GPU memory until the next error.
    """
    try:
        yield
    except BaseException as error:  # IPython stores an interrupt's traceback, too; the error goes on
        chain = [error]
        for each in chain:
            traceback.clear_frames(each.__traceback__)
            chain += [cause for cause in (each.__cause__, each.__context__) if cause and cause not in chain]
        raise


class BizassistError(Exception):
    """Base of all errors whose message is the whole story: IPython shows it without a traceback."""

    def __str__(self) -> str:
        """The message; it may quote what others wrote."""
        return printable(without_secrets(super().__str__()))

    def _render_traceback_(self) -> list[str]:
        # IPython's hook for exceptions that draw themselves.
        return [f"{type(self).__name__}: {self}"]


class SettingsError(BizassistError):
    """Settings that cannot be used; `problems` has one line for each field at fault."""

    def __init__(self, problems: Sequence[str]):
        """Join the problems of one input into one message."""
        self.problems = tuple(problems)
        super().__init__("\n  ".join(["the settings cannot be used:", *self.problems]))


class DataError(BizassistError):
    """Rows that cannot be read, or too few of them."""


class ModelError(BizassistError):
    """A model, a tokenizer or an adapter that cannot be used."""


class EngineError(BizassistError):
    """A training engine that was asked for and is not there."""


class RunError(BizassistError):
    """A run directory that is missing, taken, busy or damaged."""


class QuestionError(BizassistError):
    """A question that cannot be answered as it is."""
