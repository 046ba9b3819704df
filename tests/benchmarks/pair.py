"""Base and tuned in one batch against one after the other, greedy, 64 tokens each. Usage: pair.py RUN_DIRECTORY"""

import json
import sys
import time
from pathlib import Path

from bizassist_nb import Assistant
from bizassist_nb.runs import Run

QUESTION = "Suggest three concrete ways to use machine learning in predictive maintenance for production lines."

assistant = Assistant(Run(Path(sys.argv[1])))


def seconds(*who: str) -> float:
    start = time.perf_counter()
    assistant.ask(QUESTION, who=who, max_new_tokens=64)
    return time.perf_counter() - start


seconds("base", "tuned")  # loads the model
turns = [(seconds("base", "tuned"), seconds("base") + seconds("tuned")) for _ in range(5)]
pair, sequence = (min(times) for times in zip(*turns, strict=True))
print(json.dumps({"pair_s": pair, "one_after_the_other_s": sequence, "ratio": pair / sequence}))
