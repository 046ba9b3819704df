"""Peak memory of drawing 1,000 of a large file's rows. Usage: rows_memory.py [MEGABYTES [LETTERS [SUFFIX]]]

Writes a file (.jsonl, .jsonl.gz, .jsonl.zst or .xlsx) with so many megabytes (500) of rows of about so many letters
(2,000), in a process of its own, and draws from it.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import pyarrow

from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import draw, open_source

megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 500
letters = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
suffix = sys.argv[3] if len(sys.argv) > 3 else ".jsonl"


def rows():
    """As many as come to so many megabytes."""
    count = written = 0
    while written < megabytes * 10**6:
        text = f"{count} " + "word " * (letters // 5)
        yield {"instruction": f"Question {count}?", "context": text, "response": "An answer."}
        count, written = count + 1, written + len(text) + 70


def write(path: Path) -> None:
    """Write them as the suffix says."""
    if suffix == ".xlsx":
        import openpyxl

        book = openpyxl.Workbook(write_only=True)
        sheet = book.create_sheet()
        sheet.append(["instruction", "context", "response"])
        for row in rows():
            sheet.append(list(row.values()))
        book.save(path)
        return
    compression = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}.get(suffix)
    with pyarrow.output_stream(path, compression=compression, buffer_size=2**20) as file:
        for row in rows():
            file.write(json.dumps(row).encode() + b"\n")


def peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / f"rows{suffix}"
    writer = multiprocessing.get_context("fork").Process(target=write, args=(path,))
    writer.start()
    writer.join()
    before, start = peak(), time.monotonic()
    table, training, held = draw(open_source(Settings(data=str(path))), Settings(data=str(path)))
    print(
        f"{suffix}, {megabytes:,} MB of rows in {path.stat().st_size / 1e6:,.0f} MB, "
        f"{table.usable:,} rows: {len(training):,} and {len(held)} drawn in "
        f"{time.monotonic() - start:.1f} s; peak RSS {peak() / 1e6:,.0f} MB, "
        f"{(peak() - before) // 10**6} MB more at the peak than before"
    )
