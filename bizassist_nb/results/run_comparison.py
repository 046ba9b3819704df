"""Runs beside one another: a table with the settings that differ, and who is better on the rows they share."""

import base64
import dataclasses
import html
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.rendering import Section, duration
from bizassist_nb.results.verdict import Score, judge
from bizassist_nb.runs.run import RunDirectory

if TYPE_CHECKING:
    from bizassist_nb.results.loss_plot import LossFigure


class RunComparison:
    """Runs compared: a table, sentences on which is better, and their loss curves in one plot."""

    def __init__(self, runs: Sequence[RunDirectory]):
        """`runs` in the order they are to be shown; the first is what the others are held against."""
        self.runs = tuple(runs)

    def plot(self) -> "LossFigure":
        """The loss curves, overlaid, as a matplotlib Figure."""
        from bizassist_nb.results.loss_plot import overlaid_figure

        return overlaid_figure(self.runs)

    def __repr__(self) -> str:
        """The table and the sentences, for a terminal."""
        return rendering.sections_text([self._section()])

    def _repr_html_(self) -> str:
        png = base64.b64encode(self.plot()._repr_png_()).decode()
        names = html.escape(", ".join(run.name for run in self.runs))
        plot = f'<img alt="loss curves of {names}" src="data:image/png;base64,{png}">'
        return rendering.sections_html([self._section()]) + plot

    def _section(self) -> Section:
        section = runs_section(self.runs)
        lines = tuple(against(self.runs[0], run) for run in self.runs[1:])
        return dataclasses.replace(section, title="Runs compared", lines=lines)


def runs_section(runs: Iterable[RunDirectory]) -> Section:
    """A table of runs: what differs in their settings, what came of them, what they took, and when.

    Of damaged ones there is only the name, and a line that says what is wrong.
    """
    runs = list(runs)
    damaged = {run.path: damage for run in runs if (damage := run.damage)}
    differing = _differing([run for run in runs if run.path not in damaged])
    head = (
        "run", "status", "model", "data", *differing, "steps", "held-out loss: base", "tuned", "change", "verdict",
        "training time", "tokens/s", "memory", "began",
    )  # fmt: skip
    nothing = ("",) * (len(head) - 2)
    rows = (_row(run, differing) if run.path not in damaged else (run.name, "damaged", *nothing) for run in runs)
    return Section("Runs", tuple(damaged.values()), head, tuple(rows))


def runs_text(runs: Iterable[RunDirectory]) -> str:
    """The table of runs for a terminal."""
    section = runs_section(runs)
    table = rendering.text_table([section.head, *section.rows]) if section.rows else "no runs yet"
    return "\n\n".join([table, *map(printable, section.lines)])


def against(first: RunDirectory, other: RunDirectory) -> str:
    """Which of two runs predicts the held-out answers better, in a sentence; both must have been scored on the same."""
    names = f"{other.name} against {first.name}"
    if not first.evaluation or not other.evaluation:
        return f"{names}: not both have been scored."
    scores = [_scores(run.evaluation["rows"]) for run in (first, other) if run.evaluation]
    rows = [[(score.row, score.tokens) for score in one] for one in scores]
    if rows[0] != rows[1] or first.environment.get("fingerprint") != other.environment.get("fingerprint"):
        return f"{names}: they were scored on other rows, or with another tokenizer; their losses cannot be compared."
    found = judge(*scores, seed=first.settings.seed)
    low, high = found["interval"]
    words = {"helped": "better", "hurt": "worse", "no difference": "no measurable difference"}[found["verdict"]]
    return (
        f"{names}: {words} ({found['difference']:+.3f} nats per answer token, 95 % interval {low:+.3f} to {high:+.3f}, "
        f"on the same {len(rows[0])} held-out rows; {found['wins']} better, {found['ties']} alike, "
        f"{found['losses']} worse)."
    )


def _scores(rows: Iterable[dict[str, Any]]) -> list[Score]:
    return [Score(row["row"], row["tuned"] * row["tokens"], row["tokens"], row["category"]) for row in rows]


def _differing(runs: Sequence[RunDirectory]) -> list[str]:
    """Names of the settings in which the runs differ, but for those that have a column of their own."""
    settings = [dataclasses.asdict(run.settings) for run in runs]
    shown = ("model", "data", "runs_dir")
    return [
        name
        for name in (settings[0] if settings else ())
        if name not in shown and any(other[name] != settings[0][name] for other in settings)
    ]


def _row(run: RunDirectory, differing: Sequence[str]) -> tuple[str, ...]:
    settings, scores, steps = run.settings, run.evaluation, run.steps
    seconds = math.fsum(step.seconds for step in steps)
    memory = run.last("memory")
    return (
        run.name,
        run.status,
        run.model,
        settings.data,
        *(str(getattr(settings, name)) for name in differing),
        f"{len(steps)}/{run.total_steps or '?'}",
        *([f"{scores[who]['loss']:.3f}" for who in ("base", "tuned")] if scores else ["", ""]),
        f"{scores['difference']:+.3f}" if scores else "",
        scores["verdict"] if scores else "",
        duration(seconds) if steps else "",
        f"{sum(step.tokens for step in steps) / seconds:,.0f}" if seconds else "",
        f"{memory['peak'] / 2**30:.1f} GiB" if memory else "",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(run.events[0]["time"])) if run.events else "",
    )
