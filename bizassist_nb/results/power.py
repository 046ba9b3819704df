"""How small a fall of held-out loss a run will show, known before it trains: from how rows differed in others."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.verdict import FEWEST, MARGIN, tail
from bizassist_nb.runs.records import Judged, Power
from bizassist_nb.runs.run import list_runs

_DOLLY: Final = (
    (6, -2.86), (10, -1.44), (14, -0.91), (16, -0.64), (11, -0.48), (16, -0.35), (30, -0.27), (51, -0.22), (45, -0.17),
    (28, -0.14), (38, -0.09), (35, -0.05), (52, -0.04), (129, -0.01), (62, 0.01), (117, 0.03), (101, 0.04), (119, 0.06),
    (188, 0.07), (85, 0.08), (47, 0.1), (114, 0.12), (79, 0.16), (41, 0.2), (118, 0.24),
)  # fmt: skip
"""Tokens of Dolly's rows and how far they were from their mean change, with the embedded model (docs/verdict.md)."""
_ASKED: Final = 0.05
"""Nats a token: the change for which the rows needed are said."""
_SETS, _RESAMPLES = 1000, 2000
"""Sets of rows that are drawn, and how often each is resampled."""
_MANY: Final = 256
"""With more rows than this, a change is taken to shrink by the root of their number."""


def power(settings: Settings, model: str, rows: int) -> Power:
    """What so many test rows will show of a run with these settings and that base.

    Rows are taken to differ as in earlier runs of that base on the same data; without any, as Dolly's do.

    Raises:
        RunError: if the folder of runs cannot be read.
    """
    known = list(_earlier(settings, model))
    differ = [each for found in known for each in deviations(found)] or _DOLLY
    runs = "1 earlier run" if len(known) == 1 else f"{len(known)} earlier runs"
    like = f"in {runs} on this data" if known else "measured on Dolly with smollm2-135m"
    change = visible(rows, differ) if rows >= FEWEST else None
    words = (
        f"With {rows} test rows, a fall of {change:.2g} nats a token or more will be seen in 4 of 5 cases"
        if change
        else f"With {rows} test rows nobody can tell (at least {FEWEST} are needed)"
    )
    needed = f"{_ASKED} nats take {rows_for(_ASKED, differ):,} rows"
    return Power(rows=rows, change=change, sentence=f"{words}; {needed} (rows that differ as {like})")


def deviations(found: Judged) -> list[tuple[float, float]]:
    """Of each row its tokens and how far it was from the mean change, in nats a token.

    They are as far apart as the standard error has it, so rows that share a context count as little as in the interval,
    and a little more: they are too close to a mean that they made themselves.
    """
    rows = [(float(row.tokens), row.tuned - row.base - found.difference) for row in found.rows]
    alone = math.sqrt(math.fsum((tokens * off) ** 2 for tokens, off in rows)) / found.base.tokens
    own = math.fsum(tokens**2 for tokens, _ in rows) / found.base.tokens**2
    scale = (found.standard_error or 0) / alone / math.sqrt(1 - own)
    return [(tokens, off * scale) for tokens, off in rows]


def visible(rows: int, differ: Sequence[tuple[float, float]]) -> float:
    """The least fall, in nats a token, that 4 of 5 sets of so many rows tell from 0; no less than the margin.

    Sets are drawn from rows that differ so (see `deviations`). A fall is told by those sets in which it is larger than
    the upper end of an interval around no change, which is made as the verdict's is.
    """
    import numpy as np

    some, known, random = min(rows, _MANY), np.array(differ), np.random.default_rng(0)
    tokens, off = np.moveaxis(known[random.integers(len(known), size=(_SETS, some))], 2, 0)
    counts = random.multinomial(some, np.full(some, 1 / some), size=_RESAMPLES).T  # of each row in each resampled set
    ends = np.quantile((tokens * off) @ counts / (tokens @ counts), 1 - tail(some), axis=1)
    return max(MARGIN, float(np.quantile(ends, 0.8)) * math.sqrt(some / rows))


def rows_for(change: float, differ: Sequence[tuple[float, float]]) -> int:
    """The rows that show such a fall in 4 of 5 cases; hundreds and more are rounded up to tens."""
    rows = 64
    for _ in range(2):  # few rows need more than the root of their number says, so the second guess mends the first
        rows = max(FEWEST, math.ceil(rows * (visible(rows, differ) / change) ** 2))
    return rows if rows < 100 else math.ceil(rows / 10) * 10


def _earlier(settings: Settings, model: str) -> Iterator[Judged]:
    runs = [] if settings.data.startswith("{") else list_runs(settings.runs_dir)  # another table may have that name
    for run in runs:
        try:
            same = run.settings.data == settings.rooted().data and run.model == model
            found = run.evaluation if same else None
        except RunError:  # damaged, which the table of runs says
            continue
        if found and found.standard_error and found.base.rows >= FEWEST:
            yield found
