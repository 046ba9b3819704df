"""Rows: every format and naming of columns, what is wrong with bad ones, and the split."""

import csv
import json
import random
import re
from pathlib import Path

import huggingface_hub.constants
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizassist_nb.core.errors import DataError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import DOLLY_SHA256, SUFFIXES, Row, Table, read_table, split

PLAIN = [
    {"instruction": "What is 1 + 1?", "context": "", "response": "2", "category": "sums"},
    {"instruction": 'Say "hi",\nin two lines', "context": "a, b\r\nc", "response": "hi\n\nhi", "category": ""},
    {"instruction": "Übersetze: 漢字 🦜", "context": "  spaced  ", "response": "kanji\u2028", "category": "x"},
]
SAID = {"instruction": "q", "response": "a"}


def test_there_are_rows_enough_for_the_cells_of_the_readme():
    cells = re.findall(
        r"^%%finetune \w+\n(.+?)^```$", (Path(__file__).parents[1] / "README.md").read_text(), re.M | re.S
    )
    assert cells
    for cell in cells:
        asked = Settings.from_toml(cell)
        split(read_table(asked.data).rows, subset=asked.subset, held_out=asked.held_out, seed=asked.seed)


def write(path, rows):
    """The rows in the format that the file's name asks for."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        case ".json":
            path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
        case ".csv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def read_one(path, record, columns=None) -> Row:
    table = read_table(write(path / "one.jsonl", [record]), columns)
    assert not table.rejected
    return table.rows[0]


def reason(path, record, columns=None) -> str:
    """Why the record cannot be used, in a table whose other row can."""
    table = read_table(write(path / "two.jsonl", [record, {**SAID, "q": "q"}]), columns)
    assert [bad.number for bad in table.rejected] == [1]
    assert [row.number for row in table.rows] == [2]
    return table.rejected[0].reason


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_equal_rows(tmp_path, suffix):
    table = read_table(write(tmp_path / f"rows{suffix}", PLAIN))
    assert table.rejected == ()
    assert table.rows == (
        Row(1, "What is 1 + 1?", "2", "", "sums"),
        Row(2, 'Say "hi",\nin two lines', "hi\n\nhi", "a, b\r\nc", ""),
        Row(3, "Übersetze: 漢字 🦜", "kanji", "spaced", "x"),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_texts_are_read_whole(tmp_path, suffix):
    long = "word " * 60_000 + "end"
    assert read_table(write(tmp_path / f"rows{suffix}", [{**SAID, "context": long}])).rows[0].context == long


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_messages_are_read_from_every_format_that_can_hold_them(tmp_path, suffix):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read_table(write(tmp_path / f"rows{suffix}", [{"messages": messages}])).rows == (Row(1, "q", "a"),)


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"instruction": "q", "context": "c", "response": "a", "category": "k"}, Row(1, "q", "a", "c", "k")),
        ({"prompt": "q", "completion": "a"}, Row(1, "q", "a")),
        ({"question": " q ", "answer": "\ta\n"}, Row(1, "q", "a")),
        ({"instruction": "q", "input": "c", "output": "a"}, Row(1, "q", "a", "c")),
        ({"instruction": "q", "input": "", "output": "a"}, Row(1, "q", "a")),
        ({"input": "q", "output": "a"}, Row(1, "q", "a")),
        ({"instruction": "q", "context": None, "response": "a", "topic": "t", "other": [1]}, Row(1, "q", "a", "", "t")),
    ],
)
def test_usual_column_names_are_recognised(tmp_path, record, row):
    assert read_one(tmp_path, record) == row


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"instruction": "Frage", "response": "Antwort"}, Row(1, "q", "a", "c")),
        ({"instruction": "Frage", "response": "Antwort", "context": "Text", "category": "Art"},
         Row(1, "q", "a", "t", "k")),
        ({"instruction": "Text", "response": "context"}, Row(1, "t", "c", "c")),
    ],
)  # fmt: skip
def test_columns_that_are_named_are_taken(tmp_path, columns, row):
    record = {"Frage": "q", "Antwort": "a", "Text": "t", "Art": "k", "context": "c"}
    assert read_one(tmp_path, record, columns) == row


def turns(*said: str) -> list[dict[str, str]]:
    """Messages from "role: content" texts."""
    return [dict(zip(("role", "content"), text.split(": ", 1), strict=True)) for text in said]


@pytest.mark.parametrize(
    ("messages", "row"),
    [
        (turns("user: q", "assistant: a"), Row(1, "q", "a")),
        (turns("system: s", "user: q", "assistant: a"), Row(1, "q", "a", system="s")),
        (turns("system: ", "user: q", "assistant: a"), Row(1, "q", "a", system="")),
        (
            turns("user: q1", "assistant: a1", "user: q2", "assistant: a2", "user: q", "assistant: a"),
            Row(1, "q", "a", history=(("q1", "a1"), ("q2", "a2"))),
        ),
    ],
)
def test_messages_with_system_and_history_are_recognised(tmp_path, messages, row):
    assert read_one(tmp_path, {"messages": messages}) == row


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "q",
        [],
        ["q", "a"],
        [{"role": "user"}],
        turns("user: q"),
        turns("system: s"),
        turns("assistant: a", "user: q"),
        turns("user: q", "system: s", "assistant: a"),
        turns("user: q", "assistant: a", "user: q"),
        turns("user: q", "user: q", "assistant: a", "assistant: a"),
        turns("user: q", "assistant: "),
        turns("user:   ", "assistant: a"),
        [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "a"}],
        [{"role": ["user"], "content": "q"}, {"role": "assistant", "content": "a"}],
    ],
)
def test_messages_out_of_order_or_empty_are_rejected(tmp_path, messages):
    assert "message" in reason(tmp_path, {"messages": messages}) or "content is not text" in reason(
        tmp_path, {"messages": messages}
    )


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("text", "is a str, not an object"),
        ([1], "is a list, not an object"),
        (None, "is a NoneType, not an object"),
        ({}, "has no instruction column; its columns are none"),
        (
            {"Frage": "q", "Antwort": "a"},
            "has no instruction column; its columns are Frage, Antwort (recognised: ",
        ),
        ({"prompt": "q"}, "has no response column; its columns are prompt"),
        ({"prompt": "q", "completion": None}, "completion is empty"),
        ({"question": " \n", "answer": "a"}, "question is empty"),
        ({"instruction": 3, "response": "a"}, "instruction is not text but a int"),
        ({"instruction": "q", "response": ["a"]}, "response is not text but a list"),
        ({**SAID, "context": {}}, "context is not text but a dict"),
        ({**SAID, "response": "\ud83e"}, "response holds half of a character"),
    ],
)
def test_reason_says_what_is_wrong_with_a_row(tmp_path, record, said):
    assert said in reason(tmp_path, record)


def test_reason_names_a_given_column_that_is_not_there(tmp_path):
    assert "'q'" in reason(tmp_path, {"Q": "q", "response": "a"}, {"instruction": "q"})


def test_a_reason_can_be_written_down_whatever_the_row_holds(tmp_path):
    said = reason(tmp_path, {"\ud800": "q", "\0": "a"})
    write_json(tmp_path / "reasons.json", said)
    assert json.loads((tmp_path / "reasons.json").read_bytes()) == said


def test_three_bad_rows_of_a_hundred_are_listed_and_the_others_used(tmp_path):
    lines = [json.dumps({"instruction": f"q{i}", "response": f"a{i}"}).encode() for i in range(1, 101)]
    lines[6] = b'{"instruction": "q7", "respo'
    lines[49] = b'{"instruction": "q50", "response": ""}'
    lines[99] = b'{"instruction": "q100", "response": "\xff"}'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    table = read_table(str(tmp_path / "rows.jsonl"))
    assert [row.number for row in table.rows] == [i for i in range(1, 101) if i not in (7, 50, 100)]
    assert all(row.instruction == f"q{row.number}" for row in table.rows)
    assert [bad.number for bad in table.rejected] == [7, 50, 100]
    assert [re.split(r" \(|;", bad.reason)[0] for bad in table.rejected] == [
        "is not JSON",
        "response is empty",
        "is not UTF-8",
    ]
    assert "byte 38 of the line" in table.rejected[2].reason


def test_byte_order_mark_line_ends_and_blank_lines_are_no_part_of_rows(tmp_path):
    line = json.dumps(SAID).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n   \n" + line)
    assert read_table(str(tmp_path / "rows.jsonl")).rows == (Row(1, "q", "a"), Row(4, "q", "a"))
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf[" + line + b"\r\n]")
    assert read_table(str(tmp_path / "rows.json")).rows == (Row(1, "q", "a"),)
    (tmp_path / "rows.csv").write_bytes(b"\xef\xbb\xbfinstruction,response\r\n\r\nq,a\r\n")
    assert [row.instruction for row in read_table(str(tmp_path / "rows.csv")).rows] == ["q"]


def test_csv_row_with_more_cells_than_columns_is_rejected_not_cut(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,response\nq,a\nq,first, and the rest\n")
    table = read_table(str(tmp_path / "rows.csv"))
    assert table.rows == (Row(1, "q", "a"),)
    assert [bad.number for bad in table.rejected] == [2]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        *((f"empty{suffix}", b"", "empty") for suffix in SUFFIXES),
        ("blank.jsonl", b"\n\n", "holds no rows"),
        ("list.json", b"[]", "holds no rows"),
        ("head.csv", b"instruction,response\n", "holds no rows"),
        ("object.json", b'{"instruction": "q"}', "has to hold a JSON list of rows; it holds a dict"),
        ("cut.json", b'[{"instruction": ', "is not JSON"),
        ("deep.json", b"[" * 100_000, "is not JSON"),
        ("latin.json", '["é"]'.encode("latin-1"), "is not JSON in UTF-8 (line 1, byte 3)"),
        ("latin.csv", "instruction,response\né,a".encode("latin-1"), "is not CSV in UTF-8"),
        ("quote.csv", b'instruction,response\n"q,a\n', "is not CSV"),
        ("text.parquet", b"PAR1 not really PAR1", "is not a Parquet file"),
        ("deep.jsonl", b"[" * 100_000, "no usable row among 1: row 1: is not JSON"),
        (
            "bad.jsonl",
            b"1\n2\n3\n4\n",
            "holds no usable row among 4: row 1: is a int, not an object with",
        ),
    ],
)
def test_files_without_a_usable_row_are_refused_by_name(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name) as caught:
        read_table(str(tmp_path / name))
    assert said in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"folder{suffix}").mkdir()
    for name in (f"none{suffix}", f"folder{suffix}"):
        with pytest.raises(DataError) as caught:
            read_table(name)
        if name.startswith("none"):
            assert str(caught.value) == f"there is no file {name} (looked in {tmp_path})"
        else:
            assert str(caught.value).startswith(f"{name} is a folder")


@pytest.mark.parametrize("data", ["rows.txt", "rows", "/tmp", "a/b/c", "", "dolly ", "DOLLY", "https://a.b/c"])
def test_unknown_kind_lists_what_is_accepted(data):
    with pytest.raises(DataError, match=r'is neither "dolly" nor "sample".*\.jsonl, \.json, \.csv, \.parquet.*"owner/'):
        read_table(data)


@pytest.mark.parametrize("data", ["~nobody-of-that-name/rows.jsonl", "x" * 300 + ".jsonl"])
def test_paths_that_the_system_refuses_are_data_errors(data):
    with pytest.raises(DataError):
        read_table(data)


def test_a_file_in_a_folder_without_suffix_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").write_text("{}")
    with pytest.raises(DataError, match="is neither"):
        read_table("owner/name")


def test_dolly_without_hub_or_file_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv("BIZASSIST_DOLLY", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r'cannot be reached.*set BIZASSIST_DOLLY to its path, or use data = "sample"'):
        read_table("dolly")


def test_hub_data_set_without_hub_says_what_to_check():
    with pytest.raises(DataError, match=r'"no-such/data-set" cannot be loaded.*split named train, and the network'):
        read_table("no-such/data-set")


@pytest.mark.parametrize(("make", "said"), [(False, "which is not a file"), (True, "is not databricks-dolly-15k")])
def test_bizassist_dolly_that_names_another_file_is_refused(tmp_path, monkeypatch, make, said):
    path = tmp_path / "dolly.jsonl"
    if make:
        write(path, [SAID])
    monkeypatch.setenv("BIZASSIST_DOLLY", str(path))
    with pytest.raises(DataError, match=said):
        read_table("dolly")


def test_sample_rows_are_120_and_all_usable():
    table = read_table("sample")
    assert [row.number for row in table.rows] == list(range(1, 121))
    assert table.rejected == ()
    assert len({row.instruction.casefold() for row in table.rows}) == 120
    assert all(row.category for row in table.rows)


@pytest.fixture(scope="module")
def dolly_table(dolly) -> Table:
    table = read_table("dolly")
    assert dolly in table.source
    return table


def test_dolly_is_read_whole_and_known_by_its_fingerprint(dolly, dolly_table):
    assert (len(dolly_table.rows), dolly_table.rejected) == (15_011, ())
    assert dolly_table.fingerprint == DOLLY_SHA256
    # The same file by its path: read as any other, with the fingerprint taken from its bytes.
    by_path = read_table(dolly)
    assert (by_path.rows, by_path.fingerprint) == (dolly_table.rows, DOLLY_SHA256)
    assert dolly_table.rows[1] == Row(2, "Which is a species of fish? Tope or Rope", "Tope", category="classification")


def test_fingerprint_changes_with_the_bytes(tmp_path):
    one = read_table(write(tmp_path / "one.jsonl", [SAID]))
    other = read_table(write(tmp_path / "other.jsonl", [SAID, SAID]))
    assert len(one.fingerprint) == 64
    assert one.fingerprint != other.fingerprint


def folded(row: Row) -> str:
    return " ".join(row.instruction.split()).casefold()


def some_rows(count: int) -> list[Row]:
    return [Row(i, f"q{i}", "a") for i in range(1, count + 1)]


def test_split_is_decided_by_the_seed_alone():
    state = random.getstate()
    first = split(some_rows(50), subset=20, held_out=10, seed=1)
    assert random.getstate() == state
    random.random()
    assert split(some_rows(50), subset=20, held_out=10, seed=1) == first
    assert split(some_rows(50), subset=20, held_out=10, seed=2) != first


@pytest.mark.parametrize("sizes", [(1000, 64), (10_000, 200)])
def test_split_of_dolly_shares_no_row_and_no_instruction(dolly_table, sizes):
    training, held = split(dolly_table.rows, subset=sizes[0], held_out=sizes[1], seed=42)
    assert (len(set(training)), len(set(held))) == sizes
    assert not set(training) & set(held)
    assert not {folded(row) for row in training} & {folded(row) for row in held}


def test_instructions_that_differ_only_in_case_and_white_space_are_one():
    rows = [Row(1, "Why  is\nthat?", "a"), Row(2, "WHY IS THAT?", "b"), Row(3, "Straße", "c"), Row(4, "strasse", "d")]
    for seed in range(20):
        training, held = split(rows, subset=1, held_out=2, seed=seed)
        assert {row.number for row in held} == ({3, 4} if training[0].number < 3 else {1, 2})


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("aAbBcdefgh"), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(2, 10),
    st.integers(),
)
def test_split_gives_what_was_asked_unless_rows_are_too_few_or_alike(letters, subset, held_out, seed):
    rows = [Row(i, letter, "x") for i, letter in enumerate(letters)]
    try:
        training, held = split(rows, subset=subset, held_out=held_out, seed=seed)
    except DataError:
        assert subset + held_out > len(rows) or len({folded(row) for row in rows}) < len(rows)
        return
    assert (len(training), len(held)) == (subset, held_out)
    assert not {folded(row) for row in training} & {folded(row) for row in held}


def test_split_of_too_few_rows_says_what_to_set():
    with pytest.raises(DataError, match=r"has 100 usable rows.*set subset to at most 36,"):
        split(some_rows(100), subset=90, held_out=64, seed=0)
    with pytest.raises(DataError, match="set held_out below 50"):
        split(some_rows(50), subset=10, held_out=64, seed=0)


def test_the_subset_that_split_advises_can_be_had(dolly_table):
    with pytest.raises(DataError) as caught:
        split(dolly_table.rows, subset=15_000, held_out=64, seed=42)
    advised = int(str(caught.value).split("set subset to at most ")[1].split(", or")[0].replace(",", ""))
    training, held = split(dolly_table.rows, subset=advised, held_out=64, seed=42)
    assert (len(training), len(held)) == (advised, 64)
    with pytest.raises(DataError):
        split(dolly_table.rows, subset=advised + 1, held_out=64, seed=42)


# Lines as they come: any bytes, JSON of any kind, and rows that are nearly right.
objects = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = st.sampled_from(["instruction", "response", "context", "messages", "role", "content", "category", "\ud800"])
records = st.dictionaries(keys, objects | st.lists(st.dictionaries(keys, objects), max_size=3), max_size=4)
any_line = st.binary(max_size=40) | (objects | records).map(lambda value: json.dumps(value).encode())


@settings(deadline=None)
@given(st.lists(any_line, max_size=5), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_bytes_are_rows_or_a_data_error(tmp_path_factory, lines, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        table = read_table(str(path))
    except DataError:
        return
    assert all(row.instruction and row.response for row in table.rows)
    assert all(bad.reason.encode() for bad in table.rejected)  # and no half characters in it
    numbers = [row.number for row in table.rows] + [bad.number for bad in table.rejected]
    assert len(set(numbers)) == len(numbers)
