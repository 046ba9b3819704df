"""What can go wrong and be put right by the person at the keyboard.

Every message says what is wrong, the value, and what to do about it.
"""

from collections.abc import Sequence


def brief(error: BaseException, token: str | None = None) -> str:
    """Another library's error on one line: its type and what it begins with; `token` is a secret not to be shown."""
    text = str(error).replace(token, "(the token)") if token else str(error)
    lines = text.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


class BizassistError(Exception):
    """Base of all errors whose message is the whole story: IPython shows it without a traceback."""

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
