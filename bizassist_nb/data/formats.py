"""Formats: which part of a record is the question and which the answer, by its columns, messages or a template."""

import dataclasses
import datetime
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from bizassist_nb.core.settings import COLUMN, ROLES, TURNS, Settings

_HALVES: Final = re.compile("[\ud800-\udfff]")
"""Halves of characters."""

# Column names recognised without being told, by role, in order of preference.
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "instruction": ("instruction", "prompt", "question", "input", "query"),
    "context": ("context", "input"),
    "response": ("response", "completion", "answer", "output"),
    "category": ("category", "topic"),
}
_SPEAKERS: Final = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row: a question with its answer."""

    number: int
    """Its place in the source, counted from 1."""
    instruction: str
    response: str
    context: str = ""
    category: str = ""
    system: str | None = None
    """The row's own system message, which goes before `Settings.system_prompt`."""
    history: tuple[tuple[str, str], ...] = ()
    """Earlier turns, as (question, answer)."""


class BadRowError(Exception):
    """Why a row cannot be used."""


class Placed(NamedTuple):
    """A record of one of several files."""

    place: str
    """The file, and the record's number in it."""
    record: Any


def row_of(number: int, record: Any, settings: Settings) -> Row:
    """The row in a record: by `settings.template`, by `settings.columns`, or by the names it has.

    Raises:
        BadRowError: if there is none, with the reason.
    """
    if isinstance(record, Placed):
        try:
            return row_of(number, record.record, settings)
        except BadRowError as problem:
            raise BadRowError(f"({record.place}) {problem}") from None
    if isinstance(record, BadRowError):
        raise record
    if isinstance(record, dict) and None in record:  # csv.DictReader's key for what is left over
        raise BadRowError(
            f"has {len(record[None])} cells more than there are columns; name these columns, or quote texts with commas"
        )
    if not isinstance(record, dict):
        raise BadRowError(
            f'is a {type(record).__name__}, not an object with named columns: {{"instruction": "…", "response": "…"}}'
        )
    columns = settings.columns
    if settings.template:
        user, assistant = (_filled(settings.template[turn], record) for turn in TURNS)
        return Row(number, user, assistant, *_beside(record, columns))
    if not {"instruction", "response"} & columns.keys() and (messages := _messages(record)):
        return _conversation(number, messages, _beside(record, columns))
    return _named(number, record, columns)


def _named(number: int, record: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """A row whose question and answer have columns of their own."""
    names = {role: _column(role, record, columns) for role in ROLES}
    if names["context"] == names["instruction"]:  # "input" is a context only beside an instruction
        names["context"] = None
    for role in ("instruction", "response"):
        if names[role] is None:
            raise BadRowError(
                f"has no {role} column; its columns are {', '.join(map(str, record)) or 'none'} "
                f"(recognised: {', '.join(_ALIASES[role])}, or messages; name another: "
                f'columns = {{ {role} = "its name" }})'
            )
    texts = {role: _READERS[role](name, record[name]) for role, name in names.items() if name is not None}
    for role in ("instruction", "response"):
        if not texts[role]:
            raise BadRowError(f"{names[role]} is empty; write one, or leave the row out")
    return Row(number, texts["instruction"], texts["response"], texts.get("context", ""), texts.get("category", ""))


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name most like this one, if any is."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def _column(role: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    if role in columns:
        _check_column(columns[role], record, "columns", f'columns = {{ {role} = "%s" }}')
        return columns[role]
    return next((name for name in _ALIASES[role] if name in record), None)


def _check_column(name: str, record: Mapping[str, Any], setting: str, written: str) -> None:
    """Refuse a record without the column that a setting names; `written` is how it would name another (%s)."""
    if name not in record:
        near = nearest(name, list(map(str, record)))
        hint = f"; did you mean {written % near}?" if near else ""
        raise BadRowError(f"has no column {name!r} (named in {setting}); it has {', '.join(map(str, record))}{hint}")


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRowError(f"{name} is not text but a {type(value).__name__}; write it as a text, in quotes")
    if _HALVES.search(value):
        raise BadRowError(f"{name} holds half of a character (a lone surrogate); write the character whole")
    return value.strip()


def _label(name: str, value: Any) -> str:
    """A text, or a number or truth value as it is written in JSON; a whole number, which pandas may have made a float,
    without a fraction.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float) and math.isfinite(value):
        return str(int(value) if value == int(value) else value)
    return _text(name, value)


_READERS: Final = {"instruction": _text, "context": _text, "response": _label, "category": _label}


def _filled(template: str, record: Mapping[str, Any]) -> str:
    """The template with the record's columns in place of their names."""
    values = {}
    for name in filter(None, COLUMN.findall(template)):
        _check_column(name, record, "template", "{%s}")
        value = record[name]  # a spreadsheet's cells may be dates
        values[name] = str(value) if isinstance(value, datetime.date | datetime.time) else _label(name, value)
    if not any(values.values()):
        raise BadRowError(f"{' and '.join(values)}: empty; write something, or leave the row out")
    return COLUMN.sub(lambda found: values[found[1]] if found[1] else found[0][0], template).strip()


def _messages(record: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(what they are called, the messages) of a conversation; None for a record that is none."""
    if name := next((name for name in ("messages", "conversations") if name in record), None):
        return name, record[name]
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return "the messages of prompt and completion", prompt + completion
    return None


def _conversation(number: int, messages: tuple[str, Any], beside: tuple[str, str]) -> Row:
    """A row of messages: an optional system message, then user and assistant in turn."""
    name, said = messages
    turns = [_turn(name, message) for message in said] if isinstance(said, list) else [_turn(name, said)]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise BadRowError(
            f"{name} are not user and assistant in turn, ending with the assistant; put them so, or leave the row out"
        )
    if not all(content for _, content in turns):
        raise BadRowError(f"one of {name} is empty; write it, or leave the row out")
    pairs = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
    return Row(number, *pairs[-1], *beside, system=system, history=tuple(pairs[:-1]))


def _turn(name: str, message: Any) -> tuple[str, str]:
    """(role, content) of a message, also of one in ShareGPT's words."""
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and {role, content} <= message.keys():
            who = message[role]
            return _SPEAKERS.get(str(who), str(who)), _text(content, message[content])
    raise BadRowError(
        f'{name} is not a list of objects with role and content: [{{"role": "user", "content": "…"}}, …], '
        "or with from and value"
    )


def _beside(record: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    """(context, category) of a record whose question and answer are not in columns of their own."""
    context = _column("context", record, columns) if "context" in columns else None
    category = _column("category", record, columns)
    return _text("context", record[context] if context else ""), _label(
        "category", record[category] if category else ""
    )
