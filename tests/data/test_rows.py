"""Rows: every format and naming of columns, what is wrong with bad ones, and the split."""

import csv
import datetime
import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub.constants
import openpyxl
import pandas
import polars
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bizassist_nb.core.errors import DataError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import Row, Table, check_beginning, draw, open_source, read_table, split
from bizassist_nb.data.sources import DOLLY_SHA256, SUFFIXES
from bizassist_nb.data.tables import write_parquet

PLAIN = [
    {"instruction": "What is 1 + 1?", "context": "", "response": "2", "category": "sums"},
    {"instruction": 'Say "hi",\nin two lines', "context": "a, b\r\nc", "response": "hi\n\nhi", "category": ""},
    {"instruction": "Übersetze: 漢字 🦜", "context": "  spaced  ", "response": "kanji\u2028", "category": "x"},
]
SAID = {"instruction": "q", "response": "a"}


def test_there_are_rows_enough_for_the_cells_of_the_readme():
    cells = re.findall(
        r"^%%finetune \w+\n(.+?)^```$", (Path(__file__).parents[2] / "README.md").read_text("utf-8"), re.M | re.S
    )
    assert cells
    for cell in cells:
        asked = Settings.from_toml(cell)
        split(read_table(asked.data).rows, subset=asked.subset, held_out=asked.held_out, seed=asked.seed)


def write(path, rows):
    """The rows in the format that the file's name asks for."""
    lines = "".join(json.dumps(row, default=str) + "\n" for row in rows)
    match path.suffix:
        case ".jsonl":
            path.write_text(lines, "utf-8")
        case ".gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case ".zst":
            path.write_bytes(pyarrow.compress(lines.encode(), codec="zstd", asbytes=True))
        case ".xlsx":
            pandas.DataFrame(rows).to_excel(path, index=False)
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


def write_in(folder, name, rows):
    folder.mkdir(exist_ok=True)
    return write(folder / name, rows)


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
        Row(2, 'Say "hi",\nin two lines', "hi\n\nhi", "a, b\nc" if suffix == ".xlsx" else "a, b\r\nc", ""),
        Row(3, "Übersetze: 漢字 🦜", "kanji", "spaced", "x"),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_texts_are_read_whole(tmp_path, suffix):
    long = "word " * (6_000 if suffix == ".xlsx" else 60_000) + "end"  # a cell of Excel has room for 32,767 letters
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


def test_messages_are_recognised_beside_columns_that_are_named(tmp_path):
    record = {"messages": turns("user: q", "assistant: a"), "kind": "k", "text": "c"}
    assert read_one(tmp_path, record, {"category": "kind"}) == Row(1, "q", "a", category="k")
    assert read_one(tmp_path, record, {"category": "kind", "context": "text"}) == Row(1, "q", "a", "c", "k")
    assert read_one(tmp_path, record, {"instruction": "kind", "response": "text"}) == Row(1, "k", "c")
    with pytest.raises(DataError, match="has no column 'sort'"):
        read_one(tmp_path, record, {"category": "sort"})


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


SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "source": "chats"}
"""A record as in the ShareGPT data sets of the hub."""
TRL = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
       "completion": [{"role": "assistant", "content": "a"}]}  # fmt: skip
"""A record of TRL's conversational prompt-completion format."""


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize(("record", "row"), [(SHAREGPT, Row(1, "q", "a")), (TRL, Row(1, "q", "a", system="s"))])
def test_conversations_in_the_words_of_other_tools_are_read(tmp_path, suffix, record, row):
    assert read_table(write(tmp_path / f"rows{suffix}", [record])).rows == (row,)


@pytest.mark.parametrize(
    ("value", "text"), [(1, "1"), (0, "0"), (True, "true"), (False, "false"), (0.5, "0.5"), (3.0, "3"), ("1", "1")]
)
def test_labels_that_are_numbers_or_truth_values_are_answers(tmp_path, value, text):
    record = {"text": "q", "label": value, "kind": value}
    columns = {"instruction": "text", "response": "label", "category": "kind"}
    assert read_one(tmp_path, record, columns) == Row(1, "q", text, category=text)
    for suffix in (".parquet", ".xlsx"):
        table = read_table(write(tmp_path / f"rows{suffix}", [record]), columns)
        assert table.rows == (Row(1, "q", text, category=text),)


def test_sheet_of_excel_is_read_below_its_row_of_names(tmp_path):
    book = openpyxl.Workbook()
    rows = [["instruction", "response", None, "notes"], ["q", 3], [None], ["r", "b", None, "n"], ["s", "c", 1, 2, 3]]
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "rows.xlsx")
    table = read_table(str(tmp_path / "rows.xlsx"))
    assert table.rows == (Row(1, "q", "3"), Row(3, "r", "b"))
    assert [(bad.number, bad.reason[:40]) for bad in table.rejected] == [
        (4, "has 1 cells more than there are columns;")
    ]
    book.create_sheet("Other")
    book.save(tmp_path / "rows.xlsx")
    with pytest.raises(DataError, match=r"has 2 sheets \(Sheet, Other\); delete all but the one"):
        read_table(str(tmp_path / "rows.xlsx"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".xlsx"])
def test_files_of_a_folder_are_one_table(tmp_path, suffix):
    write_in(tmp_path / "rows", f"b{suffix}", [{"instruction": f"q{i}", "response": f"a{i}"} for i in (3, 4)])
    write_in(tmp_path / "rows", f"a{suffix}", [SAID, {"instruction": "q2", "response": ""}])
    (tmp_path / "rows" / "README.md").write_text("What this is.")
    table = read_table(str(tmp_path / "rows"))
    assert table.rows == (Row(1, "q", "a"), Row(3, "q3", "a3"), Row(4, "q4", "a4"))
    assert table.source == f"{tmp_path / 'rows'} (2 {suffix} files)"
    assert [(bad.number, bad.reason) for bad in table.rejected] == [
        (2, f"(a{suffix}, row 2) response is empty; write one, or leave the row out")
    ]
    sizes = {"subset": 1, "held_out": 2, "seed": 1}
    drawn = draw(open_source(Settings(data=str(tmp_path / "rows"))), Settings(data=str(tmp_path / "rows"), **sizes))
    assert drawn[1:] == split(table.rows, **sizes)
    write_in(tmp_path / "rows", f"b{suffix}", [{"instruction": "another", "response": "a"}])
    assert read_table(str(tmp_path / "rows")).fingerprint != table.fingerprint


def test_a_folder_of_several_kinds_or_none_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no file of rows; put files of one kind into it: \.jsonl"):
        read_table(str(tmp_path))
    write(tmp_path / "a.csv", [SAID])
    write(tmp_path / "b.jsonl", [SAID])
    with pytest.raises(DataError, match=r"holds files of several kinds \(\.csv, \.jsonl\)"):
        read_table(str(tmp_path))


def tables(library):
    """(a table of that library, the kinds that its rows shall have): some values are missing."""
    values = {
        "question": ["a?", "b?", None],
        "reply": ["yes", None, "no"],
        "topic": ["x", "y", "x"],
        "size": [1, None, 3],
    }
    if library == "pandas":
        return pandas.DataFrame(values, index=[7, 3, 5]).astype({"topic": "category"}), ["x"]
    if library == "polars":
        return polars.DataFrame(values, schema_overrides={"topic": polars.Categorical}), ["x"]
    label = datasets.ClassLabel(names=["x", "y"])
    several = datasets.Dataset.from_dict(values | {"topic": [0, 1, -1]}).cast_column("topic", label)
    return several.select([2, 1, 0, 0]), ["x", "x"]


@pytest.mark.parametrize("library", ["pandas", "polars", "datasets"])
def test_a_table_of_a_notebook_is_read_with_its_row_numbers(tmp_path, library):
    table, kinds = tables(library)
    path = write_parquet(tmp_path / "df.parquet", table)
    assert set(pyarrow.parquet.read_schema(path).names) == {"question", "reply", "topic", "size"}  # no index
    found = read_table(str(path), {"instruction": "question", "response": "reply"})
    assert [(row.instruction, row.response, row.category) for row in found.rows] == [
        ("a?", "yes", kind) for kind in kinds
    ]
    assert {bad.number: bad.reason.split(";")[0] for bad in found.rejected} == {
        2: "reply is empty", 1 if library == "datasets" else 3: "question is empty",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([SAID], "df is a list, not a table; .*pandas.DataFrame"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list([SAID])), "df is a DatasetDict, .* one split of"),
        (pandas.DataFrame({"label": ["x", 1]}), "df cannot be stored .*column label.*astype"),
        (pandas.DataFrame([["x", "y"]], columns=["a", "a"]), "df cannot be stored .*Duplicate column names"),
    ],
)
def test_what_is_no_table_is_refused_by_its_name(tmp_path, value, said):
    with pytest.raises(DataError, match=said):
        write_parquet(tmp_path / "df.parquet", value)


def test_first_rows_of_every_format_are_looked_at_before_a_run(tmp_path):
    for suffix in SUFFIXES:
        data = write_in(tmp_path / suffix, f"rows{suffix}", [{"question": "q", "reply": "a"}])
        for each in (data, str(tmp_path / suffix)):
            with pytest.raises(DataError, match="has no response column; its columns are question, reply"):
                check_beginning(Settings(data=each))


# Templates


def drawn_by(template, path, records, **more):
    """(the table, all rows) that a template makes of the records."""
    settings = Settings(data=write(path, records), template=template, subset=1, held_out=2, train_on="last", **more)
    table, training, held = draw(open_source(settings), settings)
    return table, sorted([*training, *held], key=lambda row: row.number)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".xlsx"])
def test_a_template_makes_rows_of_any_table(tmp_path, suffix):
    records = [
        {
            "the text": f" text {i}\n{{x}} ",
            "label": i,
            "n": 0.5,
            "done": True,
            "none": None,
            "kind": "k",
            "response": "no",
        }
        for i in range(1, 4)
    ]
    template = {"user": 'Classify: {the text}{none} {{"n": {n}}} {', "assistant": "{label}: {done}"}
    table, rows = drawn_by(template, tmp_path / f"rows{suffix}", records, columns={"category": "kind"})
    assert rows == [
        Row(i, f'Classify: text {i}\n{{x}} {{"n": 0.5}} {{', f"{i}: true", category="k") for i in range(1, 4)
    ]
    assert table.rejected == ()


def test_a_template_takes_the_dates_of_a_sheet(tmp_path):
    records = [{"day": datetime.date(2026, 11, i), "text": "t"} for i in (1, 2, 3)]
    _, rows = drawn_by({"user": "{text}{day}", "assistant": "{day}"}, tmp_path / "rows.xlsx", records)
    assert rows[0] == Row(1, "t2026-11-01 00:00:00", "2026-11-01 00:00:00")


def test_what_a_template_cannot_make_is_a_row_that_is_not_used(tmp_path):
    good = {"text": "t", "label": "a"}
    bad = [
        {"txt": "t", "label": "a"},
        {"text": "t", "label": ""},
        {"text": None, "label": 1},
        {"text": [1], "label": 1},
    ]
    template = {"user": "Classify: {text}", "assistant": "{label}"}
    table, _ = drawn_by(template, tmp_path / "rows.jsonl", [*bad, *({**good, "text": f"t{i}"} for i in range(3))])
    assert [(each.number, each.reason) for each in table.rejected] == [
        (1, "has no column 'text' (named in template); it has txt, label; did you mean {txt}?"),
        (2, "label: empty; write something, or leave the row out"),
        (3, "text: empty; write something, or leave the row out"),
        (4, "text is not text but a list; write it as a text, in quotes"),
    ]
    with pytest.raises(DataError, match=r"row 1: has no column 'text' \(named in template\); it has txt, label"):
        drawn_by(template, tmp_path / "rows.jsonl", bad)
    with pytest.raises(DataError, match=r"did you mean \{txt\}"):
        check_beginning(Settings(data=write(tmp_path / "rows.jsonl", bad[:1]), template=template))


# Data sets of the hub, recorded as a cache has them: the hub itself is not asked.


def recorded(cache, monkeypatch):
    """A data set of the hub in a cache folder, as if it had been downloaded."""
    folder = cache / "datasets--owner--set"
    (folder / "snapshots" / ("5" * 40) / "data").mkdir(parents=True)
    write(folder / "snapshots" / ("5" * 40) / "data" / "rows.jsonl", [SAID])
    (folder / "refs").mkdir()
    for name in ("main", "v2"):
        (folder / "refs" / name).write_text("5" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize("revision", ["", "@v2", f"@{'5' * 40}"])
def test_a_file_on_the_hub_is_read_by_its_address(tmp_path, monkeypatch, revision):
    recorded(tmp_path, monkeypatch)
    table = read_table(f"hf://datasets/owner/set{revision}/data/rows.jsonl")
    assert table.rows == (Row(1, "q", "a"),)
    assert table.source == f"hf://datasets/owner/set{revision}/data/rows.jsonl"
    with pytest.raises(DataError, match=r"data/none.jsonl of the hub data set owner/set cannot be fetched"):
        read_table(f"hf://datasets/owner/set{revision}/data/none.jsonl")


def test_config_split_and_revision_reach_the_hub_and_classes_are_read_by_their_names(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    found = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [1, 0, -1]}, features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **more: asked.append((given, more)) or found)
    columns = {"instruction": "text", "response": "label"}
    chosen = Settings(data="owner/set", config="en", split="test[:3]", revision="v2", columns=columns)
    source = open_source(chosen)
    assert asked == [(("owner/set", "en"), {"split": "test[:3]", "revision": "v2"})]
    assert next(source.records(None)) == (1, {"text": "x", "label": "bad"})
    table = read_table("owner/set", columns)
    assert asked[1] == (("owner/set", None), {"split": "train", "revision": None})
    assert table.rows == (Row(1, "x", "bad"), Row(2, "y", "good"))
    assert table.rejected[0].reason.startswith("label is empty")


@pytest.mark.parametrize("data", ["dolly", "sample", "hf://datasets/a/b/c.jsonl"])
def test_settings_of_the_hub_are_refused_for_other_data(data):
    with pytest.raises(DataError, match='config and split: only for a hub id like "owner/name", not for data = '):
        open_source(Settings(data=data, config="en", split="test"))


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
        ({"instruction": True, "response": "a"}, "instruction is not text but a bool"),
        ({"conversations": "q"}, "conversations is not a list of objects with role and content"),
        ({"conversations": [{"from": "tool", "value": "q"}]}, "conversations are not user and assistant in turn"),
        ({"conversations": [{"from": "human", "value": 3}]}, "value is not text but a int"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a"}, "prompt is not text but a list"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "user", "content": "a"}]},
            "the messages of prompt and completion are not user and assistant in turn",
        ),
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
        (
            "cut.jsonl.gz",
            gzip.compress(b"x" * 99, mtime=0)[:-9],
            "cannot be decompressed (OSError: Truncated compressed stream)",
        ),
        ("text.jsonl.zst", b"not compressed", "cannot be decompressed"),
        ("blank.jsonl.gz", gzip.compress(b"\n\n", mtime=0), "holds no rows"),
        ("utf16.jsonl.gz", gzip.compress("{}".encode("utf-16"), mtime=0), "is UTF-16 or UTF-32"),
        ("bad.jsonl.gz", gzip.compress(b"1\n2\n", mtime=0), "holds no usable row among 2: row 1: is a int"),
        ("text.xlsx", b"instruction,response\nq,a", "is not an .xlsx file that can be read (BadZipFile"),
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
    with pytest.raises(DataError) as caught:
        read_table(f"none{suffix}")
    assert str(caught.value) == f"there is no file none{suffix} (looked in {tmp_path})"


@pytest.mark.parametrize("data", ["rows.txt", "rows", "a/b/c", "dolly ", "DOLLY", "https://a.b/c", "hf://a/b"])
def test_unknown_kind_lists_what_is_accepted(data):
    with pytest.raises(
        DataError, match=r'is neither "dolly" nor "sample".*\.jsonl, \.json, \.csv, \.parquet.*folder.*"owner/'
    ):
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
    with pytest.raises(
        DataError, match=r'"no-such/data-set" cannot be loaded.*split named train \(split\), its config'
    ):
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


def folded(row: Row) -> tuple[object, ...]:
    """The question as it is asked."""
    return tuple(" ".join(text.split()).casefold() for text in (row.instruction, row.context)), row.history


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
def test_split_of_dolly_shares_no_question_and_no_context(dolly_table, sizes):
    training, held = split(dolly_table.rows, subset=sizes[0], held_out=sizes[1], seed=42)
    assert (len(set(training)), len(set(held))) == sizes
    assert not set(training) & set(held)
    assert not {folded(row) for row in training} & {folded(row) for row in held}
    assert not {row.context for row in training if row.context} & {row.context for row in held}


def test_questions_that_differ_only_in_case_and_white_space_are_one():
    rows = [Row(1, "Why  is\nthat?", "a"), Row(2, "WHY IS THAT?", "b"), Row(3, "Straße", "c"), Row(4, "strasse", "d")]
    rows += some_rows(30)
    for seed in range(20):
        training, held = split(rows, subset=15, held_out=10, seed=seed)
        assert not {folded(row) for row in training} & {folded(row) for row in held}


def test_rows_that_ask_the_same_of_different_texts_are_split():
    rows = [Row(i, "Summarize the following text.", f"s{i}", f"Text {i}") for i in range(3000)]
    training, held = split(rows, subset=2900, held_out=64, seed=42)
    assert (len(training), len(held)) == (2900, 64)
    turns = [Row(i, "Go on.", f"a{i}", history=((f"q{i}", "a"),)) for i in range(100)]
    assert len(split(turns, subset=90, held_out=10, seed=42)[0]) == 90


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_drawn_rows_are_those_of_the_whole_table_split(tmp_path, suffix):
    data = write(tmp_path / f"rows{suffix}", [{"instruction": f"q{i % 90}", "response": f"a{i}"} for i in range(100)])
    sizes = {"subset": 50, "held_out": 10, "seed": 7}
    table, training, held = draw(open_source(Settings(data=data)), Settings(data=data, **sizes))
    whole = read_table(data)
    assert (training, held) == split(whole.rows, **sizes)
    assert (table.usable, table.fingerprint, table.rows) == (100, whole.fingerprint, ())


@pytest.mark.slow
def test_rows_that_are_not_drawn_take_no_memory():
    script = Path(__file__).parents[1] / "benchmarks" / "rows_memory.py"
    result = subprocess.run([sys.executable, script, "60"], capture_output=True, text=True, check=True)
    assert int(re.search(r"(\d+) MB more at the peak", result.stdout)[1]) < 40


def test_no_answer_that_is_held_out_is_learned_as_an_earlier_turn():
    """Conversations unrolled: a row for each answer, with what was said before it."""
    said = [[(f"q{i}.{turn}", f"a{i}.{turn}") for turn in range(4)] for i in range(50)]
    rows = [Row(0, *turns[end], history=tuple(turns[:end])) for turns in said for end in range(4)]
    for train_on in ("last", "response", "all"):
        training, held = split(rows, subset=120, held_out=10, seed=42, train_on=train_on)
        learned = {turn for row in training for turn in row.history if train_on != "last"}
        learned |= {(row.instruction, row.response) for row in training}
        assert not learned & {(row.instruction, row.response) for row in held}


def test_held_out_rows_do_not_depend_on_what_is_trained_on():
    rows = some_rows(100)
    _, held = split(rows, subset=20, held_out=10, seed=1)
    assert split(rows, subset=80, held_out=10, seed=2)[1] == held
    assert split(rows, subset=20, held_out=15, seed=1)[1][:10] == held


def test_rows_about_the_same_context_are_on_one_side():
    rows = [Row(i, f"Question {i}", "a", f"Text {i // 10}") for i in range(200)]
    training, held = split(rows, subset=100, held_out=8, seed=42)
    assert not {row.context for row in training} & {row.context for row in held}


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
    with pytest.raises(
        DataError, match=r"has 100 usable rows.*are 36 .*: set subset to at most 36, or held_out to at .* 10"
    ):
        split(some_rows(100), subset=90, held_out=64, seed=0)
    with pytest.raises(DataError, match="set held_out to at most 40"):
        split(some_rows(50), subset=10, held_out=64, seed=0)
    with pytest.raises(DataError, match="set held_out to 10 and subset to at most 40"):
        split(some_rows(50), subset=1000, held_out=64, seed=0)
    with pytest.raises(DataError, match="a context of all rows belongs in system_prompt"):
        split([Row(i, f"q{i}", "a", "the same") for i in range(100)], subset=10, held_out=10, seed=0)


def test_a_reason_that_all_rows_share_is_said_once(rows_file):
    rows = [{"Frage": "a", "Antwort": "b"}] * 3 + [{"instruction": "", "response": "b"}]
    with pytest.raises(DataError) as caught:
        read_table(str(rows_file(rows)))
    said = str(caught.value)
    assert said.count("has no instruction column") == 1
    assert "row 1: has no instruction column" in said
    assert "row 4: instruction is empty" in said


@pytest.mark.parametrize("name", ["dolly", "contexts", "few"])
def test_the_numbers_that_split_advises_can_be_had(request, name):
    if name == "dolly":
        rows = list(request.getfixturevalue("dolly_table").rows)
    else:
        rows = [Row(i, f"q{i}", "a", f"c{i // 7}") for i in range(1000 if name == "contexts" else 40)]
    asked = {"subset": len(rows) - 10, "held_out": 64, "seed": 42}
    with pytest.raises(DataError) as caught:
        split(rows, **asked)
    advice = re.split("set ", str(caught.value))[-1]
    found = {
        key: int(number.replace(",", "")) for key, number in re.findall(r"(\w+) to (?:at most )?([\d,]+\d|\d)", advice)
    }
    for change in [found] if " and " in advice else [{key: number} for key, number in found.items()]:
        sizes = asked | change
        training, held = split(rows, **sizes)
        assert (len(training), len(held)) == (sizes["subset"], sizes["held_out"])
        more = {key: number + 1 for key, number in change.items() if key == "subset" or " and " not in advice}
        with pytest.raises(DataError):
            split(rows, **sizes | more)


def test_a_pyarrow_that_was_replaced_under_the_kernel_is_named_with_the_restart(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "a", "response": "b"}]), path)
    installed = pyarrow.__version__
    monkeypatch.setattr(pyarrow, "__version__", "18.1.0")  # as if pandas had imported it before the install cell
    words = rf"pyarrow 18\.1\.0 was imported before {re.escape(installed)} was installed.*Restart the kernel"
    for source in (str(path), "owner/name"):
        with pytest.raises(DataError, match=words):
            read_table(source)
    assert read_table("sample").rows  # reads no Parquet
