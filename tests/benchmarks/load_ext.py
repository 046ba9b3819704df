"""Time of `%load_ext bizassist_nb` in fresh kernels, and the heavy packages it imports. Usage: load_ext.py"""

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from live_kernel import kernel

CODE = """import sys, time
_start = time.perf_counter()
{line}
_seconds = time.perf_counter() - _start
print(_seconds, sorted({{"torch", "transformers", "matplotlib", "ipywidgets", "numpy"}} & set(sys.modules)))"""


def measure(line: str) -> tuple[float, str]:
    with tempfile.TemporaryDirectory() as folder, kernel(Path(folder)) as fresh:
        seconds, _, modules = fresh.run(CODE.format(line=line)).text.partition(" ")
    return float(seconds), modules.strip()


found = [measure("%load_ext bizassist_nb") for _ in range(5)]
print(json.dumps({"load_ext_s": statistics.median(s for s, _ in found), "imported": found[0][1]}))
