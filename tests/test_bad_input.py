"""A corpus of bad inputs: each ends in one clear error that names the place and the remedy, and leaves no trace.

What is wrong with single settings, rows, messages and names stands in core/test_settings.py, data/test_rows.py and
runs/test_runs.py.
"""

import json
import os
import pickle
import re
import shutil
import struct
import tracemalloc

import msgspec
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from random_run import environment, random_run, save
from safetensors.torch import load_file
from traitlets.config import Config

from bizassist_nb import open_run
from bizassist_nb.__main__ import main
from bizassist_nb.api import Run, compare
from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import BizassistError, DataError, ModelError, RunError, SettingsError
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import read_table
from bizassist_nb.export.weights import TunedWeights
from bizassist_nb.models.adapters import adapter_config
from bizassist_nb.notebook.magics import ask_options, finetune_options
from bizassist_nb.notebook.panel import Panel
from bizassist_nb.results.ballot import append, read_votes, tally
from bizassist_nb.results.run_comparison import runs_section
from bizassist_nb.results.summary import run_html, run_text
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs.records import Vote
from bizassist_nb.runs.run import check_name, list_runs

DEEP = 100_000


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """The working directory, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    """Everything in a folder, with what would show that it was written to."""
    return {path: (path.lstat().st_mtime_ns, path.lstat().st_size) for path in folder.rglob("*")}


@pytest.fixture
def refused(place):
    """Check that this is refused in one message that has these words in it, and that nothing is written."""

    def refused(kind, act, *words):
        before = tree(place)
        with pytest.raises(kind) as caught:
            act()
        check_message(str(caught.value), *words)
        assert caught.value._render_traceback_() == [f"{type(caught.value).__name__}: {caught.value}"]
        assert tree(place) == before

    return refused


def check_message(text, *words):
    for word in words:
        assert word in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    text.encode()  # it can be printed
    assert "Traceback" not in text
    assert len(text) < 3000


# Settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a = " + "[" * DEEP, ["this is not TOML: brackets are nested too deeply"]),
        ("a = " + "{b=" * DEEP, ["nested too deeply"]),
        (f"rank = {'9' * 5000}", ["a number has thousands of digits"]),
        (f"rank = 0x{'f' * 5000}", ["rank = a number of 20,000 bits: has to be a whole number from 1 to 512"]),
        ("rank = 1\nrank = 2\n", ["this is not TOML", "line 2"]),
        ("rank = 16 32", ["this is not TOML", "line 1"]),
        ("rank = 1\n\0", ["this is not TOML", "line 2"]),
        ("\r\r\r", ["this is not TOML"]),
        ("rank = 2020-01-01", ["rank = 2020-01-01: has to be a whole number"]),
        ("rank = nan", ["rank = nan"]),
        ("learning_rate = inf", ["learning_rate = inf: has to be a number from"]),
        ("learning_rate = nan", ["learning_rate = nan"]),
        ("rank = -0.0", ["rank = -0"]),
        ("[rank]\nvalue = 3", ["rank = { value = 3 }"]),
        ("[[columns]]\ninstruction = 'q'", ["columns = "]),
        ("columns = {instruction = 3}", ["columns = { instruction = 3 }"]),
        ("columns.question = 'q'", ["columns = ", "its keys among instruction, context, response, category"]),
        ('"\\u001b[31mrank" = 3', ["\\x1b[31mrank: there is no such setting; did you mean rank?"]),
        ("a" * 100_000 + " = 3", ["there is no such setting"]),
        (f'data = "{"x" * 100_000}"\nrank = 0', ["rank = 0"]),
        (f"model = [{'1,' * 100_000}]", ["model = [1, 1,", "…: has to be a text"]),
        ('model = "   "', ["model = ", "a text that is not empty"]),
        ('data = "rows\\u0000.csv"', ["data = "]),
        ("gpus = 99999", ["gpus = 99999"]),
        ('system_prompt = ["be brief"]', ["system_prompt = "]),
        ('data = "https://me:secret-word@host/rows.jsonl"', ["data = ", "(the password)@host", "holds a password"]),
        ('model = "hf_abcdefghijklmnopqrstuvwxyz"', ["model = ", "(the token)", "HF_TOKEN or hf auth login"]),
        ('system_prompt = "use hf_abcdefghijklmnopqrstuvwxyz"', ["system_prompt = ", "leave it out"]),
        ('columns = { context = "hf_abcdefghijklmnopqrstuvwxyz" }', ["columns = ", "(the token)"]),
        ('runs_dir = "ftp://a:b@c/runs"', ["runs_dir = ", "holds a password"]),
    ],
    ids=range(30),
)
def test_settings_in_toml(text, words, refused):
    refused(SettingsError, lambda: Settings.from_toml(text), *words)
    with pytest.raises(SettingsError) as caught:
        Settings.from_toml(text)
    assert "secret-word" not in str(caught.value)
    assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 10**5000}, ["rank = a number of 16,610 bits"]),
        ({"rank": float("nan")}, ["rank = nan"]),
        ({"rank": "16"}, ['rank = "16"']),
        ({"data": b"rows.csv"}, ["data = b'rows.csv'"]),
        ({"data": None}, ["data = None: has to be a text"]),
        ({"data": "a\ud800.csv"}, ["data = ", "\\ud800"]),
        ({"columns": [("instruction", "q")]}, ["columns = "]),
        ({"columns": {1: "q"}}, ["columns = { 1 = "]),
        ({"model": [[[[]]]] * 9999}, ["model = "]),
        ({"keep": {"last": 1}}, ["keep = "]),
    ],
    ids=range(10),
)
def test_settings_as_keywords(values, words, refused):
    refused(SettingsError, lambda: Settings(**values), *words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rank", ["'rank': an override is KEY=VALUE, for example rank=32"]),
        ("=3", ["an override is KEY=VALUE"]),
        ("rank=3\nsubset=5", ['rank = "3\\nsubset=5": has to be']),
        ("rank=1\n[columns]\ninstruction='q'", ["rank = "]),
        ("rank=" + "[" * DEEP, ["rank = "]),
        (f"rank={'9' * 5000}", ["rank = "]),
        ("rank.size=3", ["rank = { size = 3 }"]),
        ("columns.=q", ["columns = "]),
        ("data=\udcff.csv", ["data = ", "\\udcff"]),
        ("data=https://me:secret-word@host/rows.jsonl", ["data = ", "(the password)"]),
    ],
    ids=range(10),
)
def test_overrides(override, words, refused):
    refused(SettingsError, lambda: Settings.from_toml("", [override]), *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.toml", ["missing.toml cannot be read", "give the path of a TOML file"]),
        (".", ["cannot be read", "IsADirectoryError"]),
        ("latin.toml", ["latin.toml is not UTF-8 (line 2)", "save it as UTF-8"]),
        ("utf16.toml", ["utf16.toml is not UTF-8", "save it as UTF-8"]),
        ("/dev/zero", ["/dev/zero is no file of settings: it has more than 1,024 KiB"]),
        ("x" * 300, ["cannot be read"]),
        ("nul.toml", ["this is not TOML"]),
        ("\x1b[31m.toml", ["\\x1b[31m.toml cannot be read"]),
    ],
)
def test_files_of_settings(name, words, place, capsys):
    (place / "latin.toml").write_bytes("rank = 3\ndata = 'é.csv'".encode("latin-1"))
    (place / "utf16.toml").write_bytes("rank = 3".encode("utf-16"))
    (place / "nul.toml").write_bytes(b"\0" * 100)
    refuse_command(["finetune", name], words, place, capsys)


def test_a_byte_order_mark_is_no_part_of_settings():
    assert Settings.from_toml("\ufeffrank = 3").rank == 3


# Data


def parquet(columns, **options):
    """The bytes of a Parquet file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, **options)
    return sink.getvalue().to_pybytes()


GOOD = {"instruction": ["q"], "response": ["a"]}
TWICE = pyarrow.table([["q"], ["a"], ["b"]], names=["instruction", "response", "response"])
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(struct.pack("ii", 0, 1)), pyarrow.py_buffer(b"\xff")]
)
LINE = b'{"instruction": "q", "response": "a"}\n'

FILES = [
    # encodings
    ("u16.jsonl", LINE.decode().encode("utf-16"), ["is UTF-16 or UTF-32", "save it as UTF-8"]),
    ("u16be.jsonl", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), ["is UTF-16 or UTF-32"]),
    ("u16bare.jsonl", LINE.decode().encode("utf-16-le"), ["is UTF-16 or UTF-32"]),
    ("u32.jsonl", LINE.decode().encode("utf-32"), ["is UTF-16 or UTF-32"]),
    ("u16.json", b"[]".decode().encode("utf-16"), ["is UTF-16 or UTF-32"]),
    ("u16.csv", "instruction,response\nq,a\n".encode("utf-16"), ["is UTF-16 or UTF-32", "save it as UTF-8"]),
    ("u32be.csv", "instruction,response\nq,a\n".encode("utf-32-be"), ["is UTF-16 or UTF-32"]),
    ("latin.jsonl", LINE.replace(b"q", b"\xe9"), ["row 1: is not UTF-8 (byte 18 of the line)", "save the file"]),
    ("latin.json", b'[\n{"instruction": "\xe9"}]', ["is not JSON in UTF-8 (line 2, byte 18)", "save it as UTF-8"]),
    ("latin.csv", b"instruction,response\nq,a\nq,\xe9\n", ["is not CSV in UTF-8 (line 3, byte 3)", "save it as UTF-8"]),
    ("surrogate.jsonl", LINE.replace(b"q", b"\xed\xa0\x80"), ["row 1: is not UTF-8"]),
    ("half.jsonl", LINE.replace(b"q", b"\\ud800"), ["row 1: instruction holds half of a character"]),
    ("overlong.csv", b"instruction,response\n\xc0\x80,a\n", ["is not CSV in UTF-8 (line 2, byte 1)"]),
    ("nul.jsonl", b"\0" * 1000, ["or no text at all"]),
    ("nul.csv", b"\0" * 1000, ["or no text at all"]),
    ("image.csv", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ["is not CSV in UTF-8 (line 1, byte 1)"]),
    ("zip.json", b"PK\x03\x04" + bytes(range(256)), ["is not JSON"]),
    ("gzip.jsonl", b"\x1f\x8b\x08\x08\x01\xff\xff", ["row 1: is not UTF-8"]),
    # nothing
    *((f"empty{suffix}", b"", [f"empty{suffix}"]) for suffix in (".jsonl", ".json", ".csv", ".parquet")),
    ("mark.jsonl", b"\xef\xbb\xbf", ["holds no"]),
    ("mark.json", b"\xef\xbb\xbf", ["is not JSON", "has to hold a list of rows"]),
    ("mark.csv", b"\xef\xbb\xbf", ["holds no rows"]),
    # JSON
    ("deep.json", b"[" * DEEP, ["is not JSON that can be read: its brackets are nested too deeply"]),
    ("deep.jsonl", b'{"a":' * DEEP, ["row 1: is not JSON that can be read: its brackets are nested too deeply"]),
    ("twice.jsonl", b'{"instruction": "q", "response": "a", "response": "b"}', ["row 1: has 'response' twice"]),
    ("twice.json", b'[{"instruction": "q", "instruction": "p", "response": "b"}]', ["row 1: has 'instruction' twice"]),
    ("inner.jsonl", b'{"messages": [{"role": "user", "role": "assistant", "content": ""}]}', ["has 'role' twice"]),
    ("object.json", b'{"rows": [], "rows": []}', ["has to hold a JSON list of rows; it holds a dict"]),
    ("number.json", b"3", ["has to hold a JSON list of rows"]),
    ("nan.jsonl", LINE.replace(b'"q"', b"NaN"), ["row 1: instruction is not text but a float", "in quotes"]),
    ("infinity.json", b"[" + LINE.replace(b'"a"', b"-Infinity") + b"]", ["row 1: response is not text but a float"]),
    ("digits.jsonl", b'{"instruction": ' + b"9" * 5000 + b"}", ["row 1: is not JSON"]),
    ("digits.json", b"[" + b"9" * 5000 + b"]", ["is not JSON"]),
    ("cut.json", b'[{"instruction": "q", "resp', ["is not JSON", "line 1 column"]),
    ("lines.json", LINE * 2, ["is not JSON: Extra data: line 2"]),
    ("comma.jsonl", b'{"instruction": "q", "response": "a",}', ["row 1: is not JSON", '{"instruction": "…"']),
    ("single.jsonl", b"{'instruction': 'q'}", ["row 1: is not JSON"]),
    ("control.jsonl", b'{"instruction": "\x1b[31m"}', ["row 1: is not JSON (Invalid control character"]),
    ("list.jsonl", b'["q", "a"]', ["row 1: is a list, not an object with named columns"]),
    ("mixed.jsonl", b'{"instruction": ["q"], "response": {"text": "a"}}', ["instruction is not text but a list"]),
    ("key.jsonl", b'{"\\u001b[2J": "q"}', ["row 1: has no instruction column; its columns are \\x1b[2J"]),
    ("many.jsonl", b"1\n" * 1000, ["no usable row among 1,000: row 1:"]),
    # CSV
    ("head.csv", b"instruction,response\n", ["holds no rows"]),
    ("twice.csv", b"instruction,response,response\nq,a,b\n", ["two columns named 'response'; rename or delete one"]),
    ("quote.csv", b'instruction,response\nq,a\n"q,a\n', ["in the row that begins after line 2", "in quotes"]),
    ("inside.csv", b'instruction,response\n"q" or not,a\n', ["after line 1", "in quotes"]),
    ("semicolon.csv", b"instruction;response\nq;a\n", ["its columns are instruction;response"]),
    ("short.csv", b"instruction,response\nq\n", ["row 1: response is empty"]),
    ("long.csv", b"instruction,response\nq,a,b,c\n", ["row 1: has 2 cells more than there are columns", "quote texts"]),
    ("nohead.csv", b"q,a\nq,a\n", ["row 1: has no instruction column; its columns are q, a (recognised: "]),
    # Parquet
    ("cut.parquet", parquet(GOOD)[:-20], ["cut.parquet is not a Parquet file that can be read", "write it anew"]),
    ("head.parquet", parquet(GOOD)[:30], ["is not a Parquet file"]),
    ("text.parquet", LINE, ["is not a Parquet file"]),
    ("twice.parquet", None, ["two columns named 'response'"]),
    ("latin.parquet", parquet({"instruction": NOT_UTF8, "response": ["a"]}), ["is not a Parquet file that can"]),
    ("number.parquet", parquet({"instruction": [1], "response": ["a"]}), ["row 1: instruction is not text but a int"]),
    ("bytes.parquet", parquet({"instruction": [b"q"], "response": ["a"]}), ["instruction is not text but a bytes"]),
    ("nulls.parquet", parquet({"instruction": ["q"], "response": pyarrow.nulls(1)}), ["row 1: response is empty"]),
    ("none.parquet", parquet({"instruction": [], "response": []}), ["holds no rows"]),
    ("middle.parquet", bytes(len(parquet(GOOD)) // 2).join([b"PAR1", b"PAR1"]), ["is not a Parquet file"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), FILES, ids=[name for name, _, _ in FILES])
def test_files_of_rows(name, content, words, place, refused):
    if content is None:
        pyarrow.parquet.write_table(TWICE, place / name)
    else:
        (place / name).write_bytes(content)
    refused(DataError, lambda: read_table(name), name, *words)


def test_empty_names_of_columns_that_nothing_is_read_from_are_no_matter(place):
    (place / "sheet.csv").write_text("instruction,response,,\nq,a,,\n")
    assert len(read_table("sheet.csv").rows) == 1


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_a_line_of_a_gigabyte_is_refused_without_being_in_memory(suffix, place):
    path = place / f"huge{suffix}"
    with path.open("wb") as file:
        file.write({".csv": b'instruction,response\nq,"'}.get(suffix, b'{"instruction": "'))
        file.truncate(2**30 + 1)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"16 Mi|384 MiB") as caught:
            read_table(str(path))
        assert tracemalloc.get_traced_memory()[1] < 150 * 2**20
    finally:
        tracemalloc.stop()
    check_message(str(caught.value), path.name)


def test_a_line_that_is_too_long_costs_that_row_alone(place):
    path = place / "rows.jsonl"
    path.write_bytes(LINE + LINE.replace(b"q", b"q" * (17 * 2**20)) + LINE)
    table = read_table(str(path))
    assert [row.number for row in table.rows] == [1, 3]
    assert [(bad.number, bad.reason.partition(";")[0]) for bad in table.rejected] == [
        (2, "has more than 16 MiB in one line")
    ]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("pipe.jsonl", ["pipe.jsonl is a pipe or a device"]),
        ("folder.csv", ["the folder folder.csv holds no file of rows"]),
        ("zero.jsonl", ["zero.jsonl is a pipe or a device"]),
        ("loop.jsonl", ["loop.jsonl cannot be read (Too many levels of symbolic links)"]),
        ("nowhere.jsonl", ["there is no file nowhere.jsonl (looked in "]),
        ("file.txt/rows.jsonl", ["there is no file"]),
        ("memory.jsonl", ["memory.jsonl cannot be read (Input/output error)", "check that"]),
        ("x" * 300 + ".jsonl", ["cannot be read (File name too long)"]),
        ("\x1b[2J.jsonl", ["there is no file \\x1b[2J.jsonl"]),
        ("https://me:secret-word@host/rows.jsonl", ["(the password)@host"]),
        ("../../etc/passwd", ['neither "dolly" nor "sample"']),
        ("file.txt", ["nor a path ending in .jsonl, .json, .csv, .parquet, .xlsx", 'nor a hub id like "owner/name"']),
        ("~nobody-at-all/rows.csv", ["there is no file"]),
    ],
)
def test_sources_of_rows(data, words, place, refused):
    os.mkfifo(place / "pipe.jsonl")
    (place / "folder.csv").mkdir()
    (place / "zero.jsonl").symlink_to("/dev/zero")
    (place / "loop.jsonl").symlink_to("loop.jsonl")
    (place / "memory.jsonl").symlink_to("/proc/self/mem")  # begins with nothing that could be read
    (place / "file.txt").touch()
    refused((DataError, SettingsError), lambda: read_table(data), *words)  # settings refuse what they would write down


@pytest.fixture
def as_nobody():
    """Without root's right to read everything, if these are root's tests."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_that_may_not_be_read(suffix, place, as_nobody):
    path = place / f"secret{suffix}"
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check that .* you may read it"):
        read_table(str(path) if os.geteuid() == 65534 else unreadable(path))


def unreadable(path):
    path.touch(mode=0)
    return str(path)


# Runs


@pytest.mark.parametrize(
    "name",
    [
        "../../etc", "..", "/tmp/x", "a/../../b", "..\\..\\b", "~root", "$HOME", "`id`", "$(id)", "a;b", "a|b", "a&b",
        "a\nb", "a\rb", "a\0b", "a\x1b[31mb", "a\x7fb", "a\u200bb", "a\u202egnp.exe", "\u2066a", "e\u0301",
        "a\u2028b", "．．／a", "a／b", "a∕b", "a\ufeffb", "a\ud800b", "--help", "-rf", ".hidden", "a b", "a%2fb",
        "%s", "{name}", "{0.__class__}", "<script>", "a'b", 'a"b', "x" * 65, "漢" * 90, "", " ", "a.", "a-", "*", "?",
    ],
)  # fmt: skip
def test_names_of_runs(name, refused):
    words = ["cannot be the name of a run: take up to 64 letters, digits, '.', '-' and '_'"]
    refused(RunError, lambda: check_name(name), *words)
    refused(RunError, lambda: open_run(name), *words)
    refused(RunError, lambda: compare(name), *words)


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("file", ["the folder of runs file cannot be read", "NotADirectoryError", "name another"]),
        ("x" * 300, ["cannot be read", "File name too long"]),
        ("loop", ["cannot be read"]),
    ],
)
def test_folders_of_runs(folder, words, place, refused):
    (place / "file").touch()
    (place / "loop").symlink_to("loop")
    refused(RunError, lambda: list_runs(folder), *words)
    refused(RunError, lambda: open_run("one", folder), *words)


def score(number):
    return [Score(i, number + i, 3, "category") for i in range(4)]


ENVIRONMENT = msgspec.to_builtins(environment("smollm2-135m", "f"))
JUDGED = judge(score(9), score(6), seed=0)
EVALUATION = msgspec.to_builtins(assess(JUDGED, JUDGED, None))
ANSWER = {"text": "Yes.", "stopped": True, "signs": []}
ANSWERS = [{"prompt": "Why?", "base": ANSWER, "tuned": ANSWER}]
FILES_OF_A_RUN = {
    "settings.toml": 'data = "sample"\n',
    "environment.json": json.dumps(ENVIRONMENT),
    "evaluation.json": json.dumps(EVALUATION),
    "answers.json": json.dumps(ANSWERS),
    "events.jsonl": json.dumps({"time": 1.0, "event": "state", "state": "finished"}) + "\n",
}


@pytest.fixture
def make(place):
    """Make a run of files alone, which can be damaged afterwards."""

    def make(name, **changes):
        folder = place / "runs" / name
        folder.mkdir(parents=True)
        for file, text in FILES_OF_A_RUN.items():
            (folder / file).write_text(text)
        return Run(folder)

    return make


def changed(value, key, new):
    """JSON of a value in which one thing is another; the key is a path with dots."""
    copy = json.loads(json.dumps(value))
    *way, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    at = copy
    for part in way:
        at = at[part]
    if new is None:
        del at[last]
    else:
        at[last] = new
    return json.dumps(copy)


DAMAGED = [
    ("settings.toml", "rank = ", ["this is not TOML"]),
    ("settings.toml", "rank = 0", ["rank = 0: has to be a whole number"]),
    ("settings.toml", "rnak = 3", ["did you mean rank?"]),
    ("settings.toml", b"\xff\xfe\0", ["'utf-8' codec can't decode", "put it back from a copy"]),
    ("settings.toml", "\0" * 4096, ["this is not TOML"]),
    ("environment.json", "", ["Input data was truncated", "put it back from a copy of the run, or delete"]),
    ("environment.json", "[]", ["Expected `object`, got `array`"]),
    ("environment.json", "{}", ["Object missing required field `model`"]),
    ("environment.json", changed(ENVIRONMENT, "model", 3), ["Expected `str`, got `int` - at `$.model`"]),
    (
        "environment.json",
        changed(ENVIRONMENT, "versions", {"torch": None}),
        ["Expected `str`, got `null` - at `$.versions"],
    ),
    ("environment.json", b"\xff", ["JSON is malformed: invalid character"]),
    ("environment.json", "[" * DEEP, ["Expected `object`, got `array`"]),
    ("evaluation.json", '{"verdict"', ["make it anew with: bizassist evaluate "]),
    ("evaluation.json", "null", ["Expected `object`, got `null`"]),
    (
        "evaluation.json",
        changed(EVALUATION, "rows.2.base", "<b>"),
        ["Expected `float`, got `str` - at `$.rows[2].base`"],
    ),
    ("evaluation.json", changed(EVALUATION, "rows", {}), ["Expected `array`, got `object` - at `$.rows`"]),
    ("evaluation.json", changed(EVALUATION, "verdict", "splendid"), ["Invalid enum value 'splendid' - at `$.verdict`"]),
    ("evaluation.json", changed(EVALUATION, "general", None), ["Object missing required field `general`"]),
    (
        "evaluation.json",
        changed(EVALUATION, "interval", [1, "2"]),
        ["got `str` - at `$.interval[1]`"],
    ),
    ("evaluation.json", changed(EVALUATION, "base.loss", float("nan")), ["JSON is malformed: invalid character"]),
    ("evaluation.json", changed(EVALUATION, "difference", 10**400), ["Number out of range - at `$.difference`"]),
    ("answers.json", "{}", ["Expected `array`, got `object`", "bizassist evaluate "]),
    (
        "answers.json",
        changed(ANSWERS, "0.tuned.text", ["<script>"]),
        ["got `array` - at `$[0].tuned.text`"],
    ),
    ("answers.json", changed(ANSWERS, "0.base", None), ["Object missing required field `base` - at `$[0]`"]),
    ("answers.json", "\0", ["JSON is malformed: invalid character"]),
]


@pytest.mark.parametrize(("file", "content", "words"), DAMAGED, ids=[f"{i}-{f}" for i, (f, _, _) in enumerate(DAMAGED)])
def test_files_of_a_run(file, content, words, place, make, refused, capsys):
    run, sound = make("bad"), make("good")
    path = run.path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["'bad'", str(path), *words]
    field = {"settings.toml": "settings"}.get(file, file.removesuffix(".json"))
    refused(RunError, lambda: getattr(Run(run.path), field), *words)
    refused(RunError, lambda: compare(run, sound), *words)
    check_message(run.damage, *words)
    # It is named wherever runs are listed, and the others are there beside it.
    for shown in (repr(runs_section(list_runs())), runs_section(list_runs()).page(), run_text(run), run_html(run)):
        assert "bad" in shown
        assert words[-1].replace("'", "&#x27;") in shown or words[-1] in shown
    assert main(["runs"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^good +finished", table, re.MULTILINE)
    assert re.search(r"^bad +damaged", table, re.MULTILINE)
    panel = Panel()
    panel.update_loop.turn()
    assert not any(panel.update_loop.problems)
    assert list(panel.state.runs) == ["good"]
    assert f"runs/bad/{file}" in panel.tabs[3].table.value


def test_a_folder_that_cannot_be_a_runs_is_named_in_the_table(make, place):
    make("good")
    (place / "runs" / "good").rename(place / "runs" / "<b>my run (2)")
    table = runs_section(list_runs()).page()
    assert "cannot be the name of a run" in table
    assert "<b>my" not in table


EVENT = {"time": 1.0, "event": "step", "step": 1, "loss": 1.0, "learning_rate": 1.0, "gradient_norm": 1.0, "tokens": 3,
         "seconds": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b'{"time": 1, "event": "state", "sta',
        b"\xff\xfe",
        b"\0" * 512,
        b"[" * DEEP,
        b"3",
        b'{"event": "state", "state": "failed"}',
        b'{"time": "now", "event": "state", "state": "failed"}',
        b'{"time": 1e400, "event": "state", "state": "failed"}',
        b'{"time": 1, "event": ["state"], "state": "failed"}',
        b'{"time": 1, "event": "state", "state": 3}',
        changed(EVENT, "loss", None).encode(),
        changed(EVENT, "loss", "low").encode(),
        changed(EVENT, "step", 1.5).encode(),
        changed(EVENT, "seconds", float("inf")).encode(),
        b'{"time": 1, "event": "data", "source": "x"}',
        b'{"time": 1, "event": "plan", "steps": "many"}',
        b'{"time": 1, "event": "error", "message": null, "expected": true}',
    ],
    ids=range(17),
)
def test_lines_of_events_that_cannot_be_read_are_passed_over_and_counted(line, make):
    run = make("one")
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(line + b"\n" + json.dumps(EVENT).encode() + b"\n")
    assert (run.status, len(run.steps), run.unread, run.damage) == ("finished", 1, 1, None)
    for shown in (run_html(run), run_text(run)):
        assert "1 damaged lines are left out" in shown


VOTE = {"time": 1.0, "question": "q", "base": "a", "tuned": "b", "winner": "tuned", "left": "base"}


@pytest.mark.parametrize(
    "line",
    [
        b"\xff", b"{}", b"[]", b"null", b"[" * DEEP, json.dumps(VOTE).encode()[:-9],
        *(changed(VOTE, key, new).encode() for key, new in (
            ("winner", "me"), ("winner", ["tuned"]), ("left", None), ("question", 3), ("time", "now"), ("base", None),
        )),
    ],
    ids=range(12),
)  # fmt: skip
def test_lines_of_votes_that_cannot_be_read_cost_that_vote_alone_and_are_named(line, make):
    run = make("one")
    vote = Vote(**VOTE)
    append(run, vote)
    with (run.path / "votes.jsonl").open("ab") as file:
        file.write(line + b"\n")
    append(run, vote)
    assert read_votes(run) == ([vote, vote], 1)
    assert "1 lines of votes.jsonl cannot be read and are not counted" in tally(run).sentence
    assert "1 lines of votes.jsonl cannot be read" in run_html(run)


# Adapters and bases


@pytest.fixture(scope="module")
def sound(tiny, tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("adapters") / "sound", tiny)


def edit(**changes):
    """Change adapter_config.json."""

    def act(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))

    return act


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def tensors(change):
    """Change the weights."""

    def act(folder):
        path = folder / "adapter_model.safetensors"
        found = load_file(path)
        change(found)
        save(found, path)

    return act


class Evil:
    """What leaves a trace where it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("ran",))


def as_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
HEADER = struct.pack("<Q", 2**40) + b"{}"
ADAPTERS = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["safetensors is missing", "train"]),
    "a pickle in place": (as_pickle, ["adapter_model.safetensors is missing"]),
    "a pickle by that name": (write("adapter_model.safetensors", pickle.dumps(Evil())), ["is damaged"]),
    "empty weights": (write("adapter_model.safetensors", b""), ["is damaged", "put it back from a copy"]),
    "a header too long": (write("adapter_model.safetensors", HEADER), ["is damaged"]),
    "weights cut": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 1000), ["is damaged"]),
    "no tensors": (tensors(dict.clear), ["is damaged, or does not fit", "lora_A.weight is missing where"]),
    "one tensor less": (tensors(lambda t: t.pop(Q.format("B"))), ["B.weight is missing where", "has (64, 4)"]),
    "a vector": (tensors(lambda t: t.update({Q.format("A"): torch.zeros(4)})), ["is (4,) where", "has (4, 64)"]),
    "a number": (tensors(lambda t: t.update({Q.format("A"): torch.zeros(())})), ["is () where"]),
    "another rank": (tensors(lambda t: t.update({Q.format("B"): torch.zeros(64, 8)})), ["is (64, 8) where"]),
    "another width": (tensors(lambda t: t.update({Q.format("A"): torch.zeros(4, 65)})), ["has (4, 64)"]),
    "strange names": (tensors(lambda t: t.update({"../../x": torch.zeros(4, 4)})), ["../../x is (4, 4) where"]),
    "broken config": (write("adapter_config.json", b'{"r": 4'), ["adapter_config.json cannot be used"]),
    "empty config": (write("adapter_config.json", b"{}"), ["Object missing required field `peft_type`"]),
    "config in UTF-16": (write("adapter_config.json", "{}".encode("utf-16")), ["JSON is malformed: invalid character"]),
    "deep config": (write("adapter_config.json", b"[" * DEEP), ["adapter_config.json cannot be used"]),
    "a list": (write("adapter_config.json", b"[]"), ["Expected `object`, got `array`"]),
    "another base": (edit(base_model_name_or_path="owner/other-7b"), ["another base", "for owner/other-7b"]),
    "no base": (edit(base_model_name_or_path=None), ["got `null` - at `$.base_model_name_or_path`"]),
    "another kind": (edit(peft_type="PROMPT_TUNING"), ["Invalid enum value 'PROMPT_TUNING' - at `$.peft_type`"]),
    "a rank in words": (edit(r="sixteen"), ["Expected `int`, got `str` - at `$.r`"]),
    "a rank too high": (edit(r=10**9), ["at rank 1000000000 has (1000000000, 64)"]),
    "a pattern of targets": (edit(target_modules="(a+)+$"), ["Expected `array`, got `str` - at `$.target_modules`"]),
    "other targets": (edit(target_modules=["q_proj", "lm_head"]), ["lm_head.lora_A.weight is missing where"]),
    "a module of its own": (edit(megatron_config={}, megatron_core="evil"), ["sets megatron_core", "not loaded"]),
    "layers copied": (edit(layer_replication=[[0, 2]] * 1000), ["sets layer_replication", "not loaded"]),
    "whole layers": (edit(modules_to_save=["lm_head"]), ["sets modules_to_save"]),
    "another start": (edit(init_lora_weights="pissa"), ["sets init_lora_weights"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), ADAPTERS.values(), ids=ADAPTERS)
def test_adapters(damage, words, sound, tiny, place, refused):
    run = Run(shutil.copytree(sound.path, place / "runs" / "one"))
    (place / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    damage(run.adapter)
    base = loaded_base(str(tiny))
    before = len(base.adapters)
    refused(ModelError, lambda: base.adapter(run), *words)
    assert len(base.adapters) == before
    assert not (place / "ran").exists()


def test_what_an_adapter_says_of_auto_mapping_is_not_acted_on(sound, tiny, place, monkeypatch):
    """Unsloth writes it, and PEFT's Auto classes import what it names; nothing here uses those."""
    monkeypatch.syspath_prepend(place)
    (place / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    run = Run(shutil.copytree(sound.path, place / "runs" / "one"))
    edit(auto_mapping={"base_model_class": "Evil", "parent_library": "evil"})(run.adapter)
    base = loaded_base(str(tiny))
    assert base.adapter(run)
    base.forget(run)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("damage", ["a vector", "one tensor less", "another width", "broken config", "empty weights"])
def test_adapters_that_are_merged(damage, sound, tiny, place, refused):
    run = Run(shutil.copytree(sound.path, place / "runs" / "one"))
    ADAPTERS[damage][0](run.adapter)
    refused(ModelError, lambda: TunedWeights(run, "trained"), "adapter")


def base_tensors(change):
    """Change the base's weights; None leaves one out."""

    def act(folder):
        path = folder / "model.safetensors"
        found = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save({name: tensor for name, tensor in found.items() if tensor is not None}, path)

    return act


REMOTE = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
BASES = {
    "no config": (lambda f: (f / "config.json").unlink(), ["has no config.json"]),
    "a broken config": (write("config.json", b"{"), ["cannot be loaded"]),
    "an empty config": (write("config.json", b"{}"), ["cannot be loaded"]),
    "a config that is a list": (write("config.json", b"[]"), ["cannot be loaded"]),
    "code of its own": (write("config.json", json.dumps(REMOTE).encode()), ["cannot be loaded"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no .safetensors weights", "can run code"]),
    "a pickle": (lambda f: ((f / "model.safetensors").rename(f / "x"), (f / "pytorch_model.bin").write_bytes(
        pickle.dumps(Evil()))), ["no .safetensors weights"]),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 5000), ["cannot be loaded"]),
    "weights of nothing": (write("model.safetensors", b""), ["cannot be loaded"]),
    "weights of another shape": (base_tensors(lambda _, t: t[:, :3].contiguous() if t.ndim == 2 else t),
        ["are not those of the model in its config.json", "fetch both anew"]),
    "a weight less": (base_tensors(lambda name, t: None if "0.mlp.up" in name else t), ["up_proj.weight is missing"]),
    "a tokenizer without tokens": (write("tokenizer.json", b'{"model": {"type": "None"}}'), ["cannot be loaded"]),
    "a broken tokenizer": (write("tokenizer.json", b"{"), ["tokenizer of", "cannot be loaded"]),
    "an empty tokenizer": (write("tokenizer.json", b"{}"), ["tokenizer of", "cannot be loaded"]),
    "a tokenizer of its own": (write("tokenizer_config.json", json.dumps(
        {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}).encode()),
        ["tokenizer of"]),
    "a broken template": (write("chat_template.jinja", b"{% for %}"), ["template"]),
    "a template that looks for more": (write("chat_template.jinja", b"{{ ''.__class__.__mro__ }}"), ["template"]),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), BASES.values(), ids=BASES)
def test_bases(damage, words, tiny, place, refused):
    folder = shutil.copytree(tiny, place / "base")
    (folder / "evil.py").write_text("import os\nos.mkdir('ran')\n")
    damage(folder)
    refused(ModelError, lambda: loaded_base(str(folder)), *words)
    assert not (place / "ran").exists()


# Magics and the command line


@pytest.fixture(scope="module")
def shell():
    """IPython, with the extension loaded as a person loads it."""
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config)
    shell.colors = "NoColor"
    shell.run_line_magic("load_ext", "bizassist_nb")
    return shell


CELLS = [
    ("%%finetune a/b\n", ["RunError: 'a/b' cannot be the name of a run"]),
    ("%%finetune ../x --set rank=4\n", ["cannot be the name of a run"]),
    ("%%finetune\nrank = 0", ["SettingsError: the settings cannot be used:", "rank = 0: has to be"]),
    ("%%finetune\nrank = [" + "[" * DEEP, ["nested too deeply"]),
    ("%%finetune x --set rnak=3\n", ["did you mean rank?"]),
    ("%%finetune x --set\n", ["UsageError: argument --set: expected one argument"]),
    ("%%finetune x y\n", ["UsageError: unrecognized arguments: y"]),
    ("%%finetune --resume\n", ["UsageError: %%finetune: which run?"]),
    ("%%finetune nosuch --resume\n", ["there is no run 'nosuch' in", "to resume"]),
    ("%%finetune x --set runs_dir=file\n", ["file"]),
    ('%%finetune\ndata = "{nosuch}"', ["DataError", 'data = "{nosuch}": the notebook has no table named nosuch']),
    ('%%finetune\ndata = "{In}"', ["In is a list, not a table", "pandas.DataFrame(rows)"]),
    ('%%finetune x --resume\ndata = "{nosuch}"', ["there is no run 'x'"]),
    ("%%ask --run nosuch\nHi?", ["RunError: there is no run 'nosuch'"]),
    ("%%ask --run ../../etc\nHi?", ["cannot be the name of a run"]),
    ("%%ask --max-new-tokens many\nHi?", ["UsageError: argument --max-new-tokens: invalid int value: 'many'"]),
    ("%%ask --max-new-tokens 0\nHi?", ["max_new_tokens = 0: has to be a whole number from 1 to"]),
    ("%%ask --temperature nan\nHi?", ["temperature = nan: has to be a number from 0 to 2"]),
    ("%%ask --temperature inf\nHi?", ["temperature = inf"]),
    ("%%ask --strength -1\nHi?", ["strength = -1"]),
    (f"%%ask --seed {10**30}\nHi?", ["seed = 1000", "has to be a whole number from 0 to"]),
    ("%%ask --seed -1\nHi?", ["seed = -1"]),
    ("%%ask --base --tuned\nHi?", ["UsageError: argument --tuned: not allowed with argument --base"]),
    ("%%ask --tuned\nHi?", ["there is no tuned model in runs yet; make one with %%finetune"]),
    ("%%ask --blind --each\nHi?", ["UsageError: %%ask --blind: a vote is on one question"]),
    ("%%ask -o 1x\nHi?", ["UsageError: %%ask -o: '1x' is no name of a variable"]),
    ("%%ask -o a.b\nHi?", ["no name of a variable"]),
    ("%%ask -o class\nHi?", ["no name of a variable"]),
    ("%%ask --runs-dir file\nHi?", ["the folder of runs file cannot be read"]),
    ("%%ask -h\nHi?", ["UsageError"]),
    ("%%ask\n ", ["question is empty"]),
    ("%%ask --each\n\n \n", ["question is empty"]),
    ("%ask", ["question is empty"]),
    ("%bizassist what", ["UsageError: %bizassist shows the panel, %bizassist runs [DIR] a table"]),
    ("%bizassist runs a b", ["UsageError"]),
    ("%bizassist runs file", ["the folder of runs file cannot be read"]),
]


@pytest.mark.parametrize(("code", "words"), CELLS, ids=[re.sub(r"\W+", " ", code)[:40].strip() for code, _ in CELLS])
def test_cells(code, words, shell, place, capsys):
    (place / "file").touch()
    before = tree(place)
    result = shell.run_cell(code)
    assert not result.success
    said = capsys.readouterr()
    text = said.out + said.err
    check_message(re.sub(r"\x1b\[[\d;]*[mK]|\r", "", text), *words)  # IPython's own colours
    assert "bizassist_nb/" not in text
    assert tree(place) == before


def refuse_command(arguments, words, place, capsys):
    before = tree(place)
    try:
        status = main([*arguments])
    except SystemExit as ended:  # argparse's own, for arguments that it does not know
        status = ended.code
    said = capsys.readouterr()
    assert status in (1, 2)
    assert said.out == ""
    check_message(said.err, *words)
    assert tree(place) == before


COMMANDS = [
    (["finetune", "--name", "../x"], ["'../x' cannot be the name of a run"]),
    (["finetune", "--name", ""], ["'' cannot be the name"]),
    (["finetune", "--resume", "--name", "none"], ["there is no run 'none'", "to resume"]),
    (["finetune", "--runs-dir", "r\udcff"], ["runs_dir = ", "\\udcff", "has to be a text"]),
    (["finetune", "--runs-dir", "file", "--name", "x"], ["file"]),
    (["finetune", "--set", "data=https://me:secret-word@host/x.jsonl"], ["(the password)"]),
    (["ask"], ["the following arguments are required: RUN, QUESTION"]),
    (["ask", "none", "Hi?"], ["there is no run 'none'"]),
    (["ask", "none", "Hi?", "--seed", "x"], ["argument --seed: invalid int value: 'x'"]),
    (["ask", "../x", "Hi?"], ["cannot be the name of a run"]),
    (["evaluate", "none", "--runs-dir", "file"], ["the folder of runs file cannot be read"]),
    (["export", "one", "--to", "zip"], ["argument --to: invalid choice: 'zip'"]),
    (["export", "one", "--to", "hub", "--repo", "../../x"], ["name the hub repository as OWNER/NAME"]),
    (["export", "one", "--to", "hub", "--repo", "a/b;id"], ["name the hub repository as OWNER/NAME"]),
    (["export", "one", "--to", "adapter", "--repo", "a/b"], ["a repository is for an export to the hub"]),
    (["export", "one", "--to", "merged"], ["has no adapter"]),
    (["export", "one", "--to", "adapter"], ["has no adapter"]),
    (["runs", "--runs-dir", "file"], ["cannot be read"]),
    (["trian"], ["invalid choice: 'trian'"]),
    ([], ["the following arguments are required: COMMAND"]),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS, ids=[" ".join(map(ascii, a)) for a, _ in COMMANDS])
def test_commands(arguments, words, place, make, capsys):
    make("one")
    (place / "file").touch()
    refuse_command(arguments, words, place, capsys)


# Whatever comes

anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def altered(value):
    """JSON in which anything stands at some place."""
    places = [[]]
    walk = [([], value)]
    while walk:
        way, at = walk.pop()
        inner = at.items() if isinstance(at, dict) else enumerate(at) if isinstance(at, list) else ()
        for key, item in inner:
            places.append([*way, key])
            walk.append(([*way, key], item))

    def put(place, new):
        copy = json.loads(json.dumps(value))
        if not place:
            return new
        at = copy
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = new
        return copy

    return st.builds(put, st.sampled_from(places), anything)


def any_bytes(value):
    return st.binary(max_size=60) | altered(value).map(lambda found: json.dumps(found).encode())


@settings(deadline=None)
@given(any_bytes(ENVIRONMENT), any_bytes(EVALUATION), any_bytes(ANSWERS), any_bytes(EVENT), any_bytes(VOTE))
def test_any_bytes_in_a_run_directory_are_a_run_or_named_as_damaged(
    tmp_path_factory, environment, evaluation, answers, event, vote
):
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / "settings.toml").write_text('data = "sample"\n')
    for name, content in (("environment", environment), ("evaluation", evaluation), ("answers", answers)):
        (folder / f"{name}.json").write_bytes(content)
    (folder / "events.jsonl").write_bytes(FILES_OF_A_RUN["events.jsonl"].encode() + event + b"\n")
    (folder / "votes.jsonl").write_bytes(vote + b"\n")
    run = Run(folder)
    for shown in (run_html(run), run_text(run), repr(runs_section([run])), runs_section([run]).page()):
        assert "any" in shown
    assert tally(run).sentence


@settings(deadline=None)
@given(st.lists(st.text(max_size=20) | st.sampled_from(["rank", "=", "columns.", "[", '"', "\n", "3"]), max_size=5))
def test_any_override_is_settings_or_a_settings_error(parts):
    try:
        Settings.from_toml("", ["".join(parts)])
    except SettingsError as error:
        str(error).encode()


options = st.sampled_from(
    ["--run", "--base", "--continue", "--stop", "--seed", "--set", "--each", "-o", "--strength", "--", "-1", "x"]
)


@settings(deadline=None)
@given(st.lists(options | st.text(max_size=6), max_size=6))
def test_any_line_of_a_magic_is_options_or_a_usage_error(words):
    for parse in (ask_options, finetune_options):
        try:
            parse(" ".join(words))
        except UsageError:
            continue


@pytest.mark.parametrize(
    ("typed", "settings"),
    [
        ('--set system_prompt="two words"', {"system_prompt": "two words"}),
        ("--set 'system_prompt=two words'", {"system_prompt": "two words"}),
        ('--set=system_prompt="a \\"b c\\" d"', {"system_prompt": 'a "b c" d'}),
        ("--set data='my rows/a b.csv' --set rank=8", {"data": "my rows/a b.csv", "rank": 8}),
        ('--set "data=my rows/a b.csv"', {"data": "my rows/a b.csv"}),
        ('--set columns={ instruction="the question" }', None),
        ("--set \"columns={ instruction = 'q' }\"", {"columns": {"instruction": "q"}}),
        ('--set columns.instruction="the question"', {"columns": {"instruction": "the question"}}),
        ("--set system_prompt=What's", {"system_prompt": "What's"}),
    ],
)
def test_quotes_keep_the_words_of_a_setting_together(typed, settings):
    if settings is None:  # white space outside of quotes cuts
        with pytest.raises(UsageError):
            finetune_options(typed)
        return
    options = finetune_options(f"name {typed} --background")
    assert (options.name, options.background) == ("name", True)
    assert Settings.from_toml("", options.set).changed() == settings


def test_quotes_keep_the_words_of_a_path_together_and_stay_in_a_question():
    options = ask_options('--runs-dir "my runs" --run \'one\' What\'s "next"  then?')
    assert (options.runs_dir, options.run) == ("my runs", ["one"])
    assert " ".join(options.question) == 'What\'s "next" then?'


@settings(deadline=None)
@given(st.text(max_size=70))
def test_any_name_is_a_folder_in_the_folder_of_runs_or_refused(name):
    try:
        found = Settings(runs_dir="runs").run_path(check_name(name))
    except BizassistError:
        return
    assert os.path.normpath(found) == f"runs/{name}"


@settings(deadline=None)
@given(any_bytes({"peft_type": "LORA", "base_model_name_or_path": "b", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0,
                  "target_modules": ["q_proj"], "use_dora": False, "bias": "none", "rank_pattern": {}}))  # fmt: skip
def test_any_adapter_config_is_plain_lora_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp()
    (folder / "adapter_config.json").write_bytes(content)
    try:
        found = adapter_config(folder)
    except ModelError:
        return
    assert found["peft_type"] == "LORA"
    assert not found.get("use_dora")


def test_the_corpus_is_as_large_as_it_is_said_to_be():
    tables = (FILES, DAMAGED, ADAPTERS, BASES, CELLS, COMMANDS)
    assert sum(map(len, tables)) >= 120
