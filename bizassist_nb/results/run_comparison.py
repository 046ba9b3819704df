"""Runs beside one another: a table with the settings that differ, and who is better on the rows they share."""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from bizassist_nb.core import rendering
from bizassist_nb.core.rendering import Section, duration, losses
from bizassist_nb.core.settings import Settings
from bizassist_nb.core.terms import explain
from bizassist_nb.results.verdict import Score, judge, rows_needed
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory

if TYPE_CHECKING:
    from bizassist_nb.results.loss_plot import LossFigure


class RunComparison:
    """Runs compared: a table, sentences that say which is better, and their loss curves in one plot."""

    def __init__(self, runs: Sequence[RunDirectory]):
        """`runs` in the order of the table; the others are compared with the first."""
        self.runs = tuple(runs)

    def plot(self) -> "LossFigure":
        """The loss curves, overlaid, as a matplotlib Figure."""
        from bizassist_nb.results.loss_plot import loss_figure

        return loss_figure(*self.runs)

    def __repr__(self) -> str:
        """The table and the sentences, for a terminal."""
        return repr(self._section())

    def _repr_html_(self) -> str:
        words = "loss curves of " + ", ".join(run.name for run in self.runs)
        plot = rendering.image(self.plot()._repr_png_(), words)
        table = f'<div tabindex="0" style="overflow-x: auto">{explain(self._section().page())}</div>'  # keys scroll it
        return rendering.untypeset(table + plot)

    def _section(self) -> Section:
        section = runs_section(self.runs)
        lines = tuple(against(self.runs[0], run) for run in self.runs[1:])
        return dataclasses.replace(section, title="Runs compared", lines=lines)


def runs_section(runs: Iterable[RunDirectory]) -> Section:
    """A table of runs: the settings that differ, the results, time and memory, and when each began.

    A damaged run has only its name in the table, and a line that says what is wrong.
    """
    runs = list(runs)
    if not runs:
        return Section("", ("no runs yet",))
    damaged = {run.path: damage for run in runs if (damage := run.damage)}
    differing = _differing([run for run in runs if run.path not in damaged])
    head = (
        "run", "status", "model", "data", *differing, "steps", "held-out loss: base", "tuned", "change", "verdict",
        "training time", "tokens/s", "memory", "began",
    )  # fmt: skip
    nothing = ("",) * (len(head) - 2)
    rows = [_row(run, differing) if run.path not in damaged else (run.name, "damaged", *nothing) for run in runs]
    if any(notes := [run.note for run in runs]):
        head, rows = (*head, "note"), [(*row, note) for row, note in zip(rows, notes, strict=True)]
    return Section("", tuple(damaged.values()), head, rows)


def against(first: RunDirectory, other: RunDirectory) -> str:
    """A sentence: which of two runs has the lower loss on the held-out rows that both were scored on."""
    names = f"{other.name} against {first.name}"
    if not first.evaluation or not other.evaluation:
        return f"{names}: not both have been scored."
    ours, theirs = (
        {row.row: Score(row.row, row.tuned * row.tokens, row.tokens) for row in found.rows}
        for found in (first.evaluation, other.evaluation)
    )
    both = [row for row in ours if row in theirs]
    shared = [row for row in both if ours[row].tokens == theirs[row].tokens]  # not cut at another max_length
    other_tokenizer = first.model != other.model and shared != both
    if len(shared) < 2 or other_tokenizer or first.environment.fingerprint != other.environment.fingerprint:
        return f"{names}: they were scored on other rows, or with another tokenizer; their losses cannot be compared."
    found = judge([ours[row] for row in shared], [theirs[row] for row in shared], seed=first.settings.seed)
    low, high = found.interval
    words = {"helped": "better", "hurt": "worse", "no difference": "no practical difference"}.get(
        found.verdict, f"can't tell yet; about {rows_needed(found):,} rows would"
    )
    return (
        f"{names}: {words} ({found.difference:+.3f} nats per answer token, 95 % interval {low:+.3f} to {high:+.3f}, "
        f"on the same {len(shared)} held-out rows; {found.by_row})."
    )


def _differing(runs: Sequence[RunDirectory]) -> list[str]:
    """Names of the settings in which the runs differ, except those that have a column of their own."""
    names = [field.name for field in dataclasses.fields(Settings) if field.name not in ("model", "data", "runs_dir")]
    return [name for name in names if len({str(getattr(run.settings, name)) for run in runs}) > 1]


def _row(run: RunDirectory, differing: Sequence[str]) -> tuple[str, ...]:
    settings, scores, steps = run.settings, run.evaluation, run.steps
    seconds = math.fsum(step.seconds for step in steps)
    memory = run.last(records.Memory)
    return (
        run.name,
        run.status,
        run.model,
        settings.data,
        *(str(getattr(settings, name)) for name in differing),
        f"{len(steps)}/{run.total_steps or '?'}",
        *((*losses(scores.base.loss, scores.tuned.loss), scores.verdict) if scores else [""] * 4),
        duration(seconds) if steps else "",
        f"{sum(step.tokens for step in steps) / seconds:,.0f}" if seconds else "",
        f"{memory.peak / 2**30:.1f} GiB" if memory else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(run.events[0].time)) if run.events else "",
    )
