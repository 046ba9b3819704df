"""The verdict at a glance: a badge, a line, and changes with their intervals on an axis from hurt to helped."""

import html
import math
from pathlib import Path
from typing import Final

from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.rendering import Opening, plain_markdown
from bizassist_nb.results.verdict import MARGIN
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory

_PNG: Final = "verdict.png"
# Badges have white text on a colour with a contrast of at least 5 to it, and a sign for those who see no colours.
_BADGES: Final[dict[records.Verdict, tuple[str, str]]] = {
    "helped": ("✓ helped", "#0b6bab"),
    "helped, at a cost": ("✓ helped, at a cost", "#8a6100"),
    "no difference": ("= no practical difference", "#666666"),
    "can't tell yet": ("? can't tell yet", "#666666"),
    "hurt": ("✗ hurt", "#b34700"),
}
_AXIS: Final = f"change of loss, nats a token; shaded: within ± {MARGIN}"
# The SVG in pixels; it is shown at up to its own width, and narrower on a phone.
_WIDTH, _EDGE, _ROW = 440, 12, 42


def opening(found: records.Result) -> Opening:
    """What the card begins with; in Markdown with the PNG beside it, which is said in words."""
    (badge, color), line = _BADGES[found.verdict], _line(found)
    style = f"background: {color}; color: #ffffff; border-radius: 10px; padding: 2px 10px; font-weight: 600"
    shown = f'<span style="{style}; white-space: nowrap">{html.escape(badge)}</span> {html.escape(line)}'
    return Opening(
        text=f"[{badge}] {line}",
        page=f"<p>{shown}</p>{_svg(found)}",
        card=f"**{badge}**: {plain_markdown(line)}\n\n![{_words(found)}]({_PNG})",
    )


def save_png(run: RunDirectory, folder: Path) -> None:
    """Write the picture into the folder, on white also in dark themes; nothing before there are scores."""
    if not (found := run.evaluation):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    marks = _marks(found)
    figure = Figure(figsize=(7.2, 1 + 0.45 * len(marks)), dpi=100, layout="constrained", facecolor="white")
    axes = FigureCanvasAgg(figure).figure.add_subplot(xlabel=_AXIS, ylim=(len(marks) - 0.4, -0.6))
    axes.axvspan(-MARGIN, MARGIN, color="#dddddd")
    axes.axvline(0, color="#777777", linewidth=1)
    for i, (_, one) in enumerate(marks):
        axes.plot(one.interval, (i, i), color=_color(one, "#444444"), linewidth=2.5)
        axes.plot(one.difference, i, "o", color=_color(one, "#444444"))
    axes.set_yticks(range(len(marks)), [name.replace(": ", "\n") for name, _ in marks])
    axes.invert_xaxis()
    axes.set_title("← hurt", loc="left", fontsize=10)
    axes.set_title("helped →", loc="right", fontsize=10)
    write_atomic(folder / _PNG, lambda part: figure.savefig(part, format="png"))


def _marks(found: records.Result) -> list[tuple[str, records.Judged]]:
    """What is drawn, each with its name and figures."""
    compared: list[tuple[str, records.Judged]] = [
        (f"{found.base.rows} held-out rows", found),
        (f"{found.general.base.rows} general questions", found.general),
    ]
    if found.prompted:
        compared.append((f"held-out, against a prompt with {len(found.examples)} examples", found.prompted))
    return [(f"{name}: {one.difference:+.3f} ({one.interval[0]:+.3f} to {one.interval[1]:+.3f})", one)
            for name, one in compared]  # fmt: skip


def _svg(found: records.Result) -> str:
    """The picture in the page's colours, with a text for those who cannot see it."""
    marks = _marks(found)
    ends = [-MARGIN, MARGIN, *(end for _, one in marks for end in (*one.interval, one.difference))]
    scale = (_WIDTH - 4 * _EDGE) / (max(ends) - min(ends))

    def place(change: float) -> float:
        """Pixels from the left: what helped, a lower loss, is on the right."""
        return round(2 * _EDGE + scale * (max(ends) - change), 1)

    parts = []
    for i, (name, one) in enumerate(marks):
        y, color = 52 + _ROW * i, _color(one, "currentColor")
        interval = " ".join(f"{place(end)},{y}" for end in one.interval)
        parts += [
            f'<text x="{_EDGE}" y="{y - 15}">{name}</text>',
            f'<rect x="{place(MARGIN)}" y="{y - 9}" width="{2 * MARGIN * scale:.1f}" height="18" opacity="0.2"/>',
            f'<path d="M{place(0)},{y - 9}v18" stroke="currentColor" opacity="0.6"/>',
            f'<path d="M{_EDGE},{y}H{_WIDTH - _EDGE}" stroke="currentColor" opacity="0.25"/>',
            f'<polyline points="{interval}" stroke="{color}" stroke-width="3"/>',
            f'<circle cx="{place(one.difference)}" cy="{y}" r="5.5" fill="{color}"/>',
        ]
    foot = 38 + _ROW * len(marks)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {foot + 6}" role="img" aria-label="{html.escape(_words(found))}" '
        f'style="width: 100%; max-width: {_WIDTH}px; height: auto; font: 13px sans-serif" fill="currentColor">'
        f'<text x="{_EDGE}" y="14">← hurt</text> <text x="{_WIDTH - _EDGE}" y="14" text-anchor="end">helped →</text> '
        f'{" ".join(parts)} <text x="{_EDGE}" y="{foot}">{_AXIS}</text></svg>'
    )


def _words(found: records.Result) -> str:
    marks = "; ".join(name for name, _ in _marks(found))
    return f"Changes of loss in nats a token, with 95 % intervals; below -{MARGIN} is better: {marks}."


def _line(found: records.Result) -> str:
    """What matters most, in words that need no knowledge of losses."""
    if found.answers and found.answers.verdict == "hurt":
        base, tuned = found.answers.base["sound"], found.answers.tuned["sound"]
        return f"Its answers broke down: {tuned} of {found.answers.prompts} are sound, and {base} of base's."
    times = math.exp(min(found.difference, 700.0))
    more = f"{abs(times - 1):.0%} {'less' if times < 1 else 'more'}" if times < 2 else f"{times:.3g} times as"
    return f"On {found.base.rows} rows that it never saw, right answers are {more} surprising (perplexity)."


def _color(one: records.Judged, unclear: str) -> str:
    """Blue or orange, which colour-blind people tell apart, where the interval leaves out 0."""
    low, high = one.interval
    return "#1f83c4" if high < 0 else "#d55e00" if low > 0 else unclear
