"""How often the verdict is right: of simulated rows, or those of real runs. Usage: verdict.py [DRAWS [RUN_DIRECTORY …]]

*Covered*: how often its 95 % interval holds the truth. Answers are as long as those of Dolly (BIZASSIST_DOLLY) or of
the sample rows; what a row gains is spread normally, wider for short answers, skewed, or alike in rows that share a
context (up to four rows, half of the variance their own). The truth is that of the 100,000 rows drawn from.
*Of nothing*: how often "helped" or "hurt" is said where there is nothing: gains with their signs drawn anew, those of
rows that share a context together.
*Planted*: how often a change is called what it is that `results.power` promises to be seen in 4 of 5 cases after nine
earlier runs with 64 test rows, nine others for every 20 draws; the rows' own change is taken off before. *Planted
against*: the same of a change for the worse, by rows that are skewed as before.
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bizassist_nb.api import Run
from bizassist_nb.data.rows import read_table
from bizassist_nb.results.power import deviations, visible
from bizassist_nb.results.verdict import Score, judge
from bizassist_nb.runs.records import Judged

LETTERS_A_TOKEN = 4.5
SIZES = (12, 24, 64, 256)
EARLIER = 64
DRAWS = int(sys.argv[1]) if len(sys.argv) > 1 else 500
KINDS = ("normal", "wider for short answers", "skewed", "shared contexts")
random = np.random.default_rng(0)


class Rows(NamedTuple):
    """Rows by their answers' tokens, what each gained in nats a token, and which context it has."""

    tokens: np.ndarray
    gains: np.ndarray
    contexts: np.ndarray

    @property
    def change(self) -> float:
        return (self.gains * self.tokens).sum() / self.tokens.sum()

    def drawn(self, count: int) -> "Rows":
        """So many rows, drawn by context."""
        starts = np.flatnonzero(np.diff(self.contexts, prepend=-1))
        ends = np.append(starts[1:], len(self.tokens))
        chosen = random.integers(len(starts), size=count)
        places = np.concatenate([np.arange(starts[i], ends[i]) for i in chosen])[:count]
        contexts = np.repeat(np.arange(count), (ends - starts)[chosen])[:count]
        return Rows(self.tokens[places], self.gains[places], contexts)

    def judged(self, seed: int) -> Judged:
        base = [Score(i, 3.0 * t, int(t)) for i, t in enumerate(self.tokens)]
        tuned = [Score(i, (3.0 + g) * t, int(t)) for i, (t, g) in enumerate(zip(self.tokens, self.gains, strict=True))]
        return judge(base, tuned, seed=seed, groups=dict(enumerate(map(str, self.contexts))))


def made(count: int, lengths: list[float], kind: str) -> Rows:
    tokens = np.ceil(random.choice(lengths, count)).clip(2, 2000)
    contexts = np.arange(count)
    if kind == "shared contexts":
        contexts = np.repeat(contexts, random.integers(1, 5, count))[:count]
    gains = {
        "normal": lambda: random.normal(0, 0.3, count),
        "wider for short answers": lambda: random.normal(0, 1.5, count) / np.sqrt(tokens),
        "skewed": lambda: 0.25 * (random.exponential(size=count) - 1) * random.choice([1, 1, 1, -1], count),
        "shared contexts": lambda: random.normal(0, 0.2, count)[contexts] + random.normal(0, 0.2, count),
    }[kind]()
    return Rows(tokens, gains, contexts)


def covered(count: int, whole: Rows) -> float:
    intervals = [whole.drawn(count).judged(seed).interval for seed in range(DRAWS)]
    return sum(low <= whole.change <= high for low, high in intervals) / DRAWS


def of_nothing(count: int, whole: Rows) -> dict[str, float]:
    verdicts = []
    for seed in range(DRAWS):
        rows = whole.drawn(count)
        signs = random.choice([1, -1], count)[rows.contexts]
        verdicts.append(rows._replace(gains=rows.gains * signs).judged(seed).verdict)
    return shares(verdicts)


def planted(count: int, whole: Rows, sign: int = -1) -> dict[str, float]:
    own = Rows(whole.tokens, whole.gains - whole.change, np.arange(len(whole.tokens)))
    verdicts = []
    for _ in range(max(1, DRAWS // 20)):
        differ = [each for seed in range(9) for each in deviations(own.drawn(EARLIER).judged(seed))]
        shifted = own._replace(gains=own.gains + sign * visible(count, differ))
        verdicts += [shifted.drawn(count).judged(seed).verdict for seed in range(20)]
    return shares(verdicts)


def planted_against(count: int, whole: Rows) -> dict[str, float]:
    return planted(count, whole, 1)


def shares(verdicts: list[str]) -> dict[str, float]:
    return {verdict: verdicts.count(verdict) / len(verdicts) for verdict in sorted(set(verdicts))}


def held_out(path: str) -> Rows:
    found = Run(Path(path)).evaluation
    assert found is not None, f"{path} has no scores"
    tokens = np.array([row.tokens for row in found.rows])
    return Rows(tokens, np.array([row.tuned - row.base for row in found.rows]), np.arange(len(tokens)))


sources = {f"the run {Path(path).name}": held_out(path) for path in sys.argv[2:]}
for data in () if sources else ("dolly", "sample"):
    lengths = [1 + len(row.response) / LETTERS_A_TOKEN for row in read_table(data).rows]
    sources |= {f"{kind}, {data}": made(100_000, lengths, kind) for kind in KINDS}
for name, whole in sources.items():
    for question in (of_nothing, planted, planted_against, covered):
        answer = {count: question(count, whole) for count in SIZES}
        print(json.dumps({"rows": name, question.__name__: answer, "draws": DRAWS}), flush=True)
