"""How small a change of held-out loss a run will show, known before it trains: from how rows differed in others."""

import math
import statistics
from collections.abc import Iterator
from typing import Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.verdict import FEWEST, MARGIN
from bizassist_nb.runs.records import Power
from bizassist_nb.runs.run import list_runs

_DOLLY: Final = 0.17
"""Nats a token: the spread of Dolly's rows, measured with the embedded model (docs/verdict.md)."""
_ASKED: Final = 0.05
"""Nats a token: the change for which the rows needed are said."""


def power(settings: Settings, model: str, rows: int) -> Power:
    """What so many test rows will show of a run with these settings and that base.

    The spread of rows (standard error of the change, times the root of the rows) is the root mean square of earlier
    runs of that base on the same data; without any it is Dolly's.

    Raises:
        RunError: if the folder of runs cannot be read.
    """
    known = list(_spreads(settings, model))
    spread = math.sqrt(statistics.fmean(each**2 for each in known)) if known else _DOLLY
    runs = "1 earlier run" if len(known) == 1 else f"{len(known)} earlier runs"
    like = f"in {runs} on this data" if known else "measured on Dolly with smollm2-135m"
    change = visible(rows, spread) if rows >= FEWEST else None
    words = (
        f"With {rows} test rows, changes of {change:.2g} nats a token or more will be seen in 4 of 5 cases"
        if change
        else f"With {rows} test rows nobody can tell (at least {FEWEST} are needed)"
    )
    needed = f"{_ASKED} nats take {rows_for(_ASKED, spread):,} rows"
    return Power(rows=rows, change=change, sentence=f"{words}; {needed} (rows that differ as {like})")


def visible(rows: int, spread: float) -> float:
    """The least change, in nats a token, that 4 of 5 sets of so many rows tell from 0; no less than the margin.

    It is that of a two-sided t test at 5 % with a power of 80 % (Cohen 1988, chapter 2; for evaluations of language
    models Miller 2024, "Adding Error Bars to Evals", section 5).
    """
    from scipy import stats

    quantiles = stats.t.ppf([0.975, 0.8], rows - 1)
    return max(MARGIN, float(quantiles.sum()) * spread / math.sqrt(rows))


def rows_for(change: float, spread: float) -> int:
    """The rows that show such a change in 4 of 5 cases; hundreds and more are rounded up to tens."""
    rows = FEWEST
    for _ in range(4):  # the quantiles hardly depend on the rows, so this settles at once
        rows = max(FEWEST, math.ceil(rows * (visible(rows, spread) / change) ** 2))
    return rows if rows < 100 else math.ceil(rows / 10) * 10


def _spreads(settings: Settings, model: str) -> Iterator[float]:
    runs = [] if settings.data.startswith("{") else list_runs(settings.runs_dir)  # another table may have that name
    for run in runs:
        try:
            same = run.settings.data == settings.rooted().data and run.model == model
            found = run.evaluation if same else None
        except RunError:  # damaged, which the table of runs says
            continue
        if found and found.standard_error and found.base.rows >= FEWEST:
            yield found.standard_error * math.sqrt(found.base.rows)
