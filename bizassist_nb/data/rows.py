"""Rows to learn from: read from any of the accepted sources, checked one by one, and split.

Nothing is dropped silently: a row that cannot be used is listed with its number and the reason.
"""

import csv
import dataclasses
import hashlib
import json
import os
import random
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any, Final

from bizassist_nb.core.errors import DataError, brief, printable
from bizassist_nb.core.settings import ROLES, user_path

DOLLY: Final = "databricks/databricks-dolly-15k"
DOLLY_FILE: Final = "databricks-dolly-15k.jsonl"
DOLLY_SHA256: Final = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
"""Of the file as published on the hub."""

SUFFIXES: Final = (".jsonl", ".json", ".csv", ".parquet")

_LONGEST: Final = 16 * 2**20
"""Bytes or characters of a line or a CSV field at most: longer ones are no rows, and are never whole in memory."""
_LARGEST_JSON: Final = 2**30
"""Bytes of a .json file, which can only be read whole."""

# Column names recognised without being told, by role, in order of preference.
_ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "instruction": ("instruction", "prompt", "question", "input", "query"),
    "context": ("context", "input"),
    "response": ("response", "completion", "answer", "output"),
    "category": ("category", "topic"),
}


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


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why."""

    number: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """What a source holds."""

    source: str
    """Where the rows came from, in words."""
    fingerprint: str
    """SHA-256 of the file, or of the rows of a hub data set."""
    rows: tuple[Row, ...]
    rejected: tuple[Rejected, ...]


def read_table(data: str, columns: Mapping[str, str] | None = None) -> Table:
    """Read all rows of a source (`Settings.data`), with `Settings.columns` where names are not recognised.

    Raises:
        DataError: if the source is missing, unreachable, empty, of an unknown kind, or holds no usable row.
    """
    rows: list[Row] = []
    rejected: list[Rejected] = []
    try:
        source, fingerprint, records = _open(data)
        for number, record in records:
            try:
                rows.append(_row(number, record, columns or {}))
            except _BadRowError as problem:
                rejected.append(Rejected(number, printable(str(problem))))  # names in it may hold half characters
        if not rows and not rejected:
            raise DataError(f"{source} holds no rows")
        if not rows:
            first = "; ".join(f"row {bad.number}: {bad.reason}" for bad in rejected[:3])
            raise DataError(f"{source} holds no usable row among {len(rejected):,}: {first}")
        return Table(source, fingerprint(), tuple(rows), tuple(rejected))
    except OSError as error:
        reason = error.strerror or brief(error)
        raise DataError(f"{data} cannot be read ({reason}); check that it is there and that you may read it") from error


def split(rows: Iterable[Row], *, subset: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), drawn by a seeded shuffle; no instruction is in both.

    Raises:
        DataError: if there are too few rows.
    """
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    training = shuffled[:subset]
    trained = {_folded(row.instruction) for row in training}
    held = [row for row in shuffled[subset:] if _folded(row.instruction) not in trained][:held_out]
    if len(training) < subset or len(held) < held_out:
        first: dict[str, int] = {}
        firsts = [first.setdefault(_folded(row.instruction), place) for place, row in enumerate(shuffled)]
        # A row can be held out behind the first n if its instruction first occurs there; the largest such n:
        most = sorted(firsts, reverse=True)[held_out - 1] if held_out <= len(firsts) else 0
        advice = f"set subset to at most {most:,}" if most > 0 else f"set held_out below {len(shuffled):,}"
        raise DataError(
            f"the data has {len(shuffled):,} usable rows; subset = {subset:,} and held_out = {held_out:,} "
            f"(with instructions of their own) need more: {advice}, or a smaller held_out"
        )
    return training, held


class _BadRowError(Exception):
    """Why a row cannot be used."""


_Records = Iterator[tuple[int, Any]]
"""(number from 1, the record or the _BadRowError that stands for it)."""


def _open(data: str) -> tuple[str, Callable[[], str], _Records]:
    """(source in words, what works out its fingerprint, records)."""
    if data == "dolly":
        path = _dolly_file()
        return f"Databricks Dolly 15k ({path})", lambda: DOLLY_SHA256, _jsonl(path)
    if data == "sample":
        with resources.as_file(resources.files("bizassist_nb.data") / "samples" / "business.jsonl") as path:
            return "the sample rows of this package", partial(str, _sha256(path)), iter(list(_jsonl(path)))
    path = user_path(data)
    if path.suffix.lower() in SUFFIXES:
        return str(path), *_open_file(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not path.exists():
        return _open_hub(data)
    raise DataError(
        f'data = "{data}" is neither "dolly" nor "sample", nor a path ending in {", ".join(SUFFIXES)}, '
        'nor a hub id like "owner/name"'
    )


def _dolly_file() -> Path:
    """The published file: the one BIZASSIST_DOLLY names, else the hub's, checked by its fingerprint."""
    if local := os.environ.get("BIZASSIST_DOLLY"):
        path = Path(local)
        if not path.is_file():
            raise DataError(f"BIZASSIST_DOLLY names {local}, which is not a file; correct it or unset it")
    else:
        path = _download_dolly()
    if _sha256(path) != DOLLY_SHA256:
        raise DataError(f"{path} is not {DOLLY_FILE} as published (its SHA-256 is another); fetch it again")
    return path


def _download_dolly() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(DOLLY, DOLLY_FILE, repo_type="dataset"))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f'the hub, where "dolly" comes from, cannot be reached ({type(error).__name__}). Check the network, '
            f'or fetch {DOLLY_FILE} elsewhere and set BIZASSIST_DOLLY to its path, or use data = "sample"'
        ) from None  # a server's words may repeat the token


def _open_hub(name: str) -> tuple[str, Callable[[], str], _Records]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        dataset = datasets.load_dataset(name, split="train")
    except (HfHubHTTPError, datasets.exceptions.DatasetNotFoundError, OSError, ValueError) as error:
        raise DataError(
            f'the hub data set "{name}" cannot be loaded ({brief(error)}). '
            "Check its name, that it has a split named train, and the network"
        ) from None
    records = [dict(record) for record in dataset]
    digest = hashlib.sha256(json.dumps(records, sort_keys=True, default=str).encode()).hexdigest()
    return f"{name} on the hub", lambda: digest, enumerate(records, 1)


def _open_file(path: Path) -> tuple[Callable[[], str], _Records]:
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there is no file {path} (looked in {path.absolute().parent})") from None
    if not stat.S_ISREG(kind):  # a folder has no rows, a pipe or a device no end
        raise DataError(f"{path} is a folder, a pipe or a device; rows are read from a file")
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    return partial(_sha256, path), readers[path.suffix.lower()](path)


def _jsonl(path: Path) -> _Records:
    _check_encoding(path)
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            if line is None:
                yield (
                    number,
                    _BadRowError(
                        f"has more than {_LONGEST // 2**20} MiB in one line; write each row on one of its own"
                    ),
                )
                continue
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
            except UnicodeDecodeError as error:
                yield number, _BadRowError(f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
            except RecursionError:
                yield number, _BadRowError("is not JSON that can be read: its brackets are nested too deeply")
            except ValueError as error:
                yield number, _BadRowError(f'is not JSON ({error}); a row is {{"instruction": "…", "response": "…"}}')


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The file's lines; None for one that is too long, of which only a part at a time is in memory."""
    while line := file.readline(_LONGEST):
        if len(line) < _LONGEST or line.endswith(b"\n"):
            yield line
            continue
        while rest := file.read(2**20):  # far quicker than readline, which looks at 8 kB at a time
            if (end := rest.find(b"\n")) >= 0:
                file.seek(end + 1 - len(rest), os.SEEK_CUR)
                break
        yield None


def _json(path: Path) -> _Records:
    _check_encoding(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise DataError(f"{path} has more than {_LARGEST_JSON // 2**30} GiB; as .jsonl, a row a line, it can be read")
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not JSON in UTF-8 ({_first_not_utf8(path)}); save it as UTF-8") from None
    except RecursionError:
        raise DataError(f"{path} is not JSON that can be read: its brackets are nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; it has to hold a list of rows") from error
    if not isinstance(records, list):
        kind = type(records).__name__ if not isinstance(records, _BadRowError) else "dict"
        raise DataError(f"{path} has to hold a JSON list of rows; it holds a {kind}")
    return enumerate(records, 1)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object; one that names something twice, or holds one that does, is the error that stands for it."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in record if keys.count(key) > 1)
        return _BadRowError(f"has {twice!r} twice; which one counts cannot be known, so leave one out")
    inner = (item for value in record.values() for item in (value if isinstance(value, list) else [value]))
    return next((item for item in inner if isinstance(item, _BadRowError)), record)


def _csv(path: Path) -> _Records:
    _check_encoding(path)
    csv.field_size_limit(_LONGEST)  # the default refuses texts of 128 kB
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(_csv_lines(file), strict=True)
            names = [name for name in reader.fieldnames or () if name]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path} has two columns named {twice!r}; rename or delete one")
            line = reader.line_num
            for number, record in enumerate(reader, 1):
                line = reader.line_num
                yield number, record
    except UnicodeDecodeError:
        raise DataError(f"{path} is not CSV in UTF-8 ({_first_not_utf8(path)}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(
            f"{path} is not CSV with a line of column names: in the row that begins after line {line}: {error}; "
            'a text with commas, quotes or several lines is written "in quotes", a quote in it twice'
        ) from error


def _csv_lines(file: IO[str]) -> Iterator[str]:
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST and not line.endswith(("\n", "\r")):
            raise csv.Error(f"a line has more than {_LONGEST // 2**20} Mi characters")
        yield line


def _check_encoding(path: Path) -> None:
    """Refuse what is plainly not UTF-8 in one word, rather than line by line."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise DataError(f"{path} is UTF-16 or UTF-32, or no text at all; save it as UTF-8")


def _first_not_utf8(path: Path) -> str:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                (line or b"").decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "in a line that is too long"


def _parquet(path: Path) -> _Records:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            records = file.read().to_pylist() if len(set(names)) == len(names) else None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({brief(error)}); write it anew") from error
    if records is None:
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has two columns named {twice!r}; rename or delete one")
    return enumerate(records, 1)


def _row(number: int, record: Any, columns: Mapping[str, str]) -> Row:
    if isinstance(record, _BadRowError):
        raise record
    if isinstance(record, dict) and None in record:  # csv.DictReader's key for what is left over
        raise _BadRowError(
            f"has {len(record[None])} cells more than there are columns; quote texts with commas in them"
        )
    if not isinstance(record, dict):
        raise _BadRowError(
            f'is a {type(record).__name__}, not an object with named columns: {{"instruction": "…", "response": "…"}}'
        )
    if "messages" in record and not columns:
        return _conversation(number, record)
    names = {role: _column(role, record, columns) for role in ROLES}
    if names["context"] == names["instruction"]:  # "input" is a context only beside an instruction
        names["context"] = None
    for role in ("instruction", "response"):
        if names[role] is None:
            raise _BadRowError(
                f"has no {role} column; its columns are {', '.join(map(str, record)) or 'none'} "
                f"(recognised: {', '.join(_ALIASES[role])}, or messages; others with columns = {{ {role} = ... }})"
            )
    texts = {role: _text(name, record[name]) for role, name in names.items() if name is not None}
    for role in ("instruction", "response"):
        if not texts[role]:
            raise _BadRowError(f"{names[role]} is empty; write one, or leave the row out")
    return Row(
        number=number,
        instruction=texts["instruction"],
        response=texts["response"],
        context=texts.get("context", ""),
        category=texts.get("category", ""),
    )


def _column(role: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    if role in columns:
        if columns[role] not in record:
            raise _BadRowError(
                f"has no column {columns[role]!r} (named in columns); it has {', '.join(map(str, record))}"
            )
        return columns[role]
    return next((name for name in _ALIASES[role] if name in record), None)


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _BadRowError(f"{name} is not text but a {type(value).__name__}; write it as a text, in quotes")
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise _BadRowError(f"{name} holds half of a character (a lone surrogate); write the character whole")
    return value.strip()


def _conversation(number: int, record: Mapping[str, Any]) -> Row:
    """A row of `messages`: an optional system message, then user and assistant in turn; the last answer is learned."""
    messages = record["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise _BadRowError(
            'messages is not a list of objects with role and content: [{"role": "user", "content": "…"}, …]'
        )
    turns = [(message["role"], _text("content", message["content"])) for message in messages]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) or not turns:
        raise _BadRowError("messages are not user and assistant in turn, ending with the assistant")
    if not all(content for _, content in turns):
        raise _BadRowError("a message is empty; write it, or leave the row out")
    pairs = [(turns[i][1], turns[i + 1][1]) for i in range(0, len(turns), 2)]
    category = _text("category", record.get("category"))
    return Row(number, *pairs[-1], category=category, system=system, history=tuple(pairs[:-1]))


def _folded(instruction: str) -> str:
    return " ".join(instruction.split()).casefold()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
