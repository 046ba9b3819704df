"""Sources: files, folders and data sets of the hub, read one record at a time and known by a fingerprint."""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import stat
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, cast

from bizassist_nb.core.errors import DataError, brief
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.core.versions import replaced
from bizassist_nb.data.formats import BadRowError, Placed, nearest

DOLLY: Final = "databricks/databricks-dolly-15k"
DOLLY_FILE: Final = "databricks-dolly-15k.jsonl"
DOLLY_SHA256: Final = "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"
"""Of the file as published on the hub."""

SUFFIXES: Final = (".jsonl", ".json", ".csv", ".parquet", ".xlsx", ".jsonl.gz", ".jsonl.zst")

_LONGEST: Final = 16 * 2**20
"""The longest line or CSV field that is read, in bytes or characters; a longer one is never whole in memory."""
_BATCH: Final = 1024
"""Rows of a Parquet file in memory at once."""
_LARGEST_JSON: Final = 384 * 2**20
"""The largest .json file that is read, in bytes: it has to be in memory whole, which takes three times as much."""
_AT_ONCE: Final = {".json": 16 * 2**20, ".xlsx": 2**20}
"""Bytes up to which the first rows of a file that has to be read from end to end come within a second."""
_HF: Final = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)")
"""The address of a file on the hub: repository, revision, path."""
VARIABLE: Final = re.compile(r"\{(\w+)\}")
"""`Settings.data` of a table in a notebook: the name of its variable, as the group."""
KEPT: Final = "data.parquet"
"""The file of a run directory that has the rows of such a table."""
_HUB_ONLY: Final = ("config", "split", "revision")
"""Settings of data sets of the hub."""

Records = Iterator[tuple[int, Any]]
"""(number, counted from 1; the record, or the BadRowError that stands for it)."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where rows come from; they are read anew each time."""

    words: str
    fingerprint: str
    records: Callable[[Container[int] | None], Records]
    """All records; those whose numbers are not among the ones given may be missing."""


def source_of(settings: Settings) -> Source:
    """The source that `settings.data` names, with its fingerprint.

    Raises:
        DataError: if it is missing, unreachable, or of an unknown kind.
        OSError: if the system will not read it.
    """
    data, path = settings.data, path_of(settings)
    if data == "dolly":
        path = _dolly_file()
        return Source(f"Databricks Dolly 15k ({path})", DOLLY_SHA256, functools.partial(_jsonl, path))
    if path is None:
        return _open_hub(settings)
    records = reader(path)
    if path.is_dir():
        files = _folder(path)
        digests = "".join(f"{_sha256(file)} {file.name}\n" for file in files)
        words = f"{path} ({len(files)} {kind(files[0])} files)"
        return Source(words, hashlib.sha256(digests.encode("utf-8", "surrogateescape")).hexdigest(), records)
    words = "the sample rows of this package" if data == "sample" else data if _HF.fullmatch(data) else str(path)
    return Source(words, _sha256(path), records)


def kind(path: Path) -> str | None:
    """The suffix that says how a file of rows is read; None for another file."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def path_of(settings: Settings) -> Path | None:
    """The file or folder that `settings.data` names, fetched if it is on the hub; None for "dolly" and a hub data set.

    Raises:
        DataError: for a text that names nothing of these, or settings that are for others.
    """
    data = settings.data
    path = Path(__file__).parent / "samples" / "business.jsonl" if data == "sample" else user_path(data)
    if data != "dolly" and not _HF.fullmatch(data) and not kind(path) and not path.is_dir():
        if re.fullmatch(r"[\w.-]+/[\w.-]+", data) and not path.exists():
            return None
        raise DataError(
            f'data = "{data}" is neither "dolly" nor "sample", nor a path ending in {", ".join(SUFFIXES)}, '
            'nor a folder of such files, nor a hub id like "owner/name" or "hf://datasets/owner/name/file.jsonl", '
            'nor, in a %%finetune cell, a table in a variable: "{df}" (in Python finetune(settings, data=df))'
        )
    if beside := settings.changed().keys() & set(_HUB_ONLY):
        raise DataError(f'{" and ".join(sorted(beside))}: only for a hub id like "owner/name", not for data = "{data}"')
    if data == "dolly":
        return None
    return _fetched(*found.groups()) if (found := _HF.fullmatch(data)) else path


def _fetched(repository: str, revision: str | None, name: str) -> Path:
    """A file of a data set of the hub."""
    from huggingface_hub import hf_hub_download

    revision = urllib.parse.unquote(revision) if revision else None
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name} of the hub data set {repository} cannot be fetched ({brief(error)}); check its path and revision, "
            "and the network"
        ) from None  # a server's words may repeat the token


def _dolly_file() -> Path:
    """The published file: the one BIZASSIST_DOLLY names, else the hub's, checked by its fingerprint."""
    from huggingface_hub import hf_hub_download

    if local := os.environ.get("BIZASSIST_DOLLY"):
        path = Path(local)
        if not path.is_file():
            raise DataError(f"BIZASSIST_DOLLY names {local}, which is not a file; correct it or unset it")
    else:
        try:
            path = Path(hf_hub_download(DOLLY, DOLLY_FILE, repo_type="dataset"))
        except OSError as error:
            raise DataError(
                f'the hub, where "dolly" comes from, cannot be reached ({type(error).__name__}). Check the network, '
                f'or fetch {DOLLY_FILE} elsewhere and set BIZASSIST_DOLLY to its path, or use data = "sample"'
            ) from None  # a server's words may repeat the token
    if _sha256(path) != DOLLY_SHA256:
        raise DataError(f"{path} is not {DOLLY_FILE} as published (its SHA-256 is another); fetch it again")
    return path


def _open_hub(settings: Settings) -> Source:
    check_pyarrow()
    import datasets

    name = settings.data
    try:
        dataset = datasets.load_dataset(
            name, settings.config or None, split=settings.split, revision=settings.revision or None
        )
    except (OSError, ValueError) as error:
        raise DataError(
            f'the hub data set "{name}" cannot be loaded ({brief(error)}). Check its name, that it has a split named '
            f"{settings.split} (split), its config and revision, and the network"
        ) from None
    names = {
        key: feature.names for key, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)
    }

    def records(_: Container[int] | None) -> Records:
        for number, record in enumerate(dataset, 1):  # a class is stored as its place among the names; -1 is none
            classes = {key: names[key][record[key]] if (record[key] or 0) >= 0 else None for key in names}
            yield number, {**record, **classes}

    digest = hashlib.sha256(b"[")  # of the rows as one list of JSON
    for number, record in records(None):
        digest.update((", " if number > 1 else "").encode())
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    digest.update(b"]")
    return Source(f"{name} on the hub", digest.hexdigest(), records)


def comes_at_once(path: Path) -> bool:
    """Whether the first 1,000 rows can be had within a second."""
    files = _folder(path) if path.is_dir() else [path] if path.exists() else []
    most = _AT_ONCE.get(kind(files[0]) or "") if files else None
    return most is None or sum(file.stat().st_size for file in files) <= most


def reader(path: Path) -> Callable[[Container[int] | None], Records]:
    """Reads the records of a file, by its kind, or of a folder of files."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        files = [file.name for file in path.parent.glob("*") if kind(file) and file.is_file()]
        near = nearest(path.name, files)
        hint = f'; did you mean data = "{path.with_name(near)}"?' if near else ""
        raise DataError(f"there is no file {path} (looked in {path.absolute().parent}){hint}") from None
    if stat.S_ISDIR(mode):
        return functools.partial(_all_of, _folder(path))
    if not stat.S_ISREG(mode):  # a pipe or a device has no end
        raise DataError(f"{path} is a pipe or a device; rows are read from a file")
    return functools.partial(_READERS[kind(path) or ""], path)


def _folder(path: Path) -> list[Path]:
    """The files of rows in a folder, all of one kind."""
    files = sorted(file for file in path.iterdir() if kind(file) and file.is_file() and not file.name.startswith("."))
    kinds = sorted({str(kind(file)) for file in files})
    if len(kinds) != 1:
        holds = f"files of several kinds ({', '.join(kinds)})" if kinds else "no file of rows"
        raise DataError(f"the folder {path} holds {holds}; put files of one kind into it: {', '.join(SUFFIXES)}")
    return files


def _all_of(files: Sequence[Path], _: Container[int] | None) -> Records:
    """The records of several files, numbered through."""
    before = 0
    for path in files:
        number = 0
        for number, record in reader(path)(None):
            yield before + number, Placed(f"{path.name}, row {number:,}", record)
        before += number


def _jsonl(path: Path, wanted: Container[int] | None) -> Records:
    try:
        _check_encoding(path)
        with _bytes(path) as file:
            for number, line in enumerate(_lines(file), 1):
                if (wanted is None or number in wanted) and (line is None or line.strip()):
                    yield number, _record(line)
    except OSError as error:
        if kind(path) == ".jsonl":
            raise
        raise DataError(f"{path} cannot be decompressed ({brief(error)}); compress it anew") from error


def _bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed as its name says."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    if compression is None:
        return path.open("rb", buffering=2**20)
    check_pyarrow()
    import pyarrow

    return cast(IO[bytes], io.BufferedReader(pyarrow.input_stream(path, compression=compression), 2**20))


def _record(line: bytes | None) -> Any:
    """A line of JSON as a record, or the error that stands for it."""
    if line is None:
        return BadRowError(f"has more than {_LONGEST // 2**20} MiB in one line; write each row on one of its own")
    try:
        return json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return BadRowError(f"is not UTF-8 (byte {error.start + 1} of the line); save the file as UTF-8")
    except RecursionError:
        return BadRowError("is not JSON that can be read: its brackets are nested too deeply")
    except ValueError as error:
        return BadRowError(f'is not JSON ({error}); a row is {{"instruction": "…", "response": "…"}}')


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The file's lines; None for one that is too long, of which only a part at a time is in memory."""
    while part := file.readline(_LONGEST):
        line = part if len(part) < _LONGEST or part.endswith(b"\n") else None
        while line is None and part and not part.endswith(b"\n"):
            part = file.readline(2**20)
        yield line


def _json(path: Path, _: Container[int] | None) -> Records:
    _check_encoding(path)
    if path.stat().st_size > _LARGEST_JSON:
        raise DataError(f"{path} has more than {_LARGEST_JSON // 2**20} MiB; as .jsonl, a row a line, it can be read")
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise DataError(f"{path} is not JSON in UTF-8 ({_first_not_utf8(path)}); save it as UTF-8") from None
    except RecursionError:
        raise DataError(f"{path} is not JSON that can be read: its brackets are nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; it has to hold a list of rows") from error
    if not isinstance(records, list):
        found = type(records).__name__ if not isinstance(records, BadRowError) else "dict"
        raise DataError(f"{path} has to hold a JSON list of rows; it holds a {found}")
    return enumerate(records, 1)


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """A JSON object, or the error that stands for it if it, or an object in it, has a name twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in record if keys.count(key) > 1)
        return BadRowError(f"has {twice!r} twice; which one counts cannot be known, so leave one out")
    inner = (item for value in record.values() for item in (value if isinstance(value, list) else [value]))
    return next((item for item in inner if isinstance(item, BadRowError)), record)


def _csv(path: Path, _: Container[int] | None) -> Records:
    _check_encoding(path)
    csv.field_size_limit(_LONGEST)  # the default refuses texts of 128 kB
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(_csv_lines(file), strict=True)
            _check_columns(path, reader.fieldnames or ())
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


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if twice := next((name for name in names if name and names.count(name) > 1), None):
        raise DataError(f"{path} has two columns named {twice!r}; rename or delete one")


def _check_encoding(path: Path) -> None:
    """Refuse a file that is plainly not UTF-8 as a whole, not line by line."""
    with _bytes(path) as file:
        start = file.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise DataError(f"{path} is UTF-16 or UTF-32, or no text at all; save it as UTF-8")


def _first_not_utf8(path: Path) -> str:
    with path.open("rb", buffering=2**20) as file:
        for number, line in enumerate(_lines(file), 1):
            try:
                (line or b"").decode()
            except UnicodeDecodeError as error:
                return f"line {number}, byte {error.start + 1}"
    return "in a line that is too long"


def check_pyarrow() -> None:
    """Refuse to read Parquet, also the hub's, with a pyarrow that was replaced under this kernel."""
    if problem := replaced("pyarrow"):
        raise DataError(f"hub data sets, Parquet and compressed files cannot be read in this kernel: {problem}")


def _parquet(path: Path, _: Container[int] | None) -> Records:
    check_pyarrow()
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            batches = (batch.to_pylist() for batch in file.iter_batches(_BATCH))
            yield from enumerate(itertools.chain.from_iterable(batches), 1)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} is not a Parquet file that can be read ({brief(error)}); write it anew") from error


def _xlsx(path: Path, _: Container[int] | None) -> Records:
    """Rows of the only sheet, below a row of column names, by openpyxl: pandas' reader would hold the whole of it."""
    import openpyxl

    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            if len(book.sheetnames) > 1:
                several = f"{len(book.sheetnames)} sheets ({', '.join(book.sheetnames)})"
                raise DataError(f"{path} has {several}; delete all but the one with the rows, or save that one as CSV")
            sheet = book.worksheets[0]
            sheet.reset_dimensions()  # as some programs write them they would cut columns
            rows = sheet.iter_rows(values_only=True)
            names = ["" if name is None else str(name).strip() for name in next(rows, ())]
            _check_columns(path, names)
            for number, cells in enumerate(rows, 1):
                beyond = [cell for cell in cells[len(names) :] if cell is not None]
                if any(cell is not None for cell in cells):
                    record = dict(itertools.zip_longest(names, cells[: len(names)]))
                    yield number, {**record, None: beyond} if beyond else record
    except (zipfile.BadZipFile, zlib.error, LookupError, ValueError, TypeError, SyntaxError, EOFError) as error:
        raise DataError(f"{path} is not an .xlsx file that can be read ({brief(error)}); save it anew") from error


_READERS: Final[Mapping[str, Callable[[Path, Container[int] | None], Records]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".xlsx": _xlsx, ".jsonl.gz": _jsonl,
    ".jsonl.zst": _jsonl,
}  # fmt: skip


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
