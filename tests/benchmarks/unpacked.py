"""A decode step on a CPU with 4-bit matrices unpacked in every pass, and unpacked once. Usage: unpacked.py [ROWS ...]

The embedded model without an adapter, prompts of 50 tokens, median of 5 steps in seconds. Set OMP_NUM_THREADS.
"""

import json
import statistics
import sys
import time

from bizassist_nb.assistant.decoding import Batch, read_prompts
from bizassist_nb.models.base import load_nf4, unpack
from bizassist_nb.models.embedded import embedded_folder

model, found = load_nf4(embedded_folder()), {}
for state in ("packed", "unpacked"):
    for rows in map(int, sys.argv[1:] or ("2", "56")):
        batch = Batch([[5 + row, *range(10, 59)] for row in range(rows)], {}, frozenset(), 0)
        with read_prompts(model, batch, 8, None) as (_, steps):
            took = []
            for _ in range(5):
                start = time.perf_counter()
                steps([5] * rows)
                took.append(time.perf_counter() - start)
        found[f"{state}, {rows} rows"] = round(statistics.median(took), 3)
    start = time.perf_counter()
    unpack(model)
    found.setdefault("unpacking", round(time.perf_counter() - start, 2))
print(json.dumps(found))
