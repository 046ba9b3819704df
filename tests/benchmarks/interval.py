"""How often the verdict's 95 % interval holds the truth, by simulation. Usage: interval.py [DRAWS]

Answers are as long as those of Dolly (BIZASSIST_DOLLY) or of the sample rows; what a row gains has a normal spread, one
that is wider for short answers, or a skewed one. The truth is that of four million rows.
"""

import json
import sys

import numpy as np

from bizassist_nb.data.rows import read_table
from bizassist_nb.results.verdict import Score, judge

LETTERS_A_TOKEN = 4.5
DRAWS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
random = np.random.default_rng(0)


def rows(count: int, lengths: list[float], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, gained nats) of that many rows."""
    tokens = np.ceil(random.choice(lengths, count)).clip(2, 2000)
    spread = {
        "normal": lambda: random.normal(0, 0.3, count),
        "wider for short answers": lambda: random.normal(0, 1.5, count) / np.sqrt(tokens),
        "skewed": lambda: 0.25 * (random.exponential(size=count) - 1) * random.choice([1, 1, 1, -1], count),
    }[kind]()
    return tokens, tokens * (spread - 0.1)


def covered(count: int, lengths: list[float], kind: str) -> float:
    tokens, gains = rows(4_000_000, lengths, kind)
    truth = gains.sum() / tokens.sum()
    hits = 0
    for seed in range(DRAWS):
        tokens, gains = rows(count, lengths, kind)
        base = [Score(i, 3.0 * t, int(t)) for i, t in enumerate(tokens)]
        tuned = [Score(i, 3.0 * t + g, int(t)) for i, (t, g) in enumerate(zip(tokens, gains, strict=True))]
        low, high = judge(base, tuned, seed=seed)["interval"]
        hits += low <= truth <= high
    return hits / DRAWS


for data in ("dolly", "sample"):
    lengths = [1 + len(row.response) / LETTERS_A_TOKEN for row in read_table(data).rows]
    for kind in ("normal", "wider for short answers", "skewed"):
        found = {count: covered(count, lengths, kind) for count in (12, 24, 64)}
        print(json.dumps({"lengths": data, "gains": kind, "draws": DRAWS, "covered": found}), flush=True)
