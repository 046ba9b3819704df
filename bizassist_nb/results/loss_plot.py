"""The loss curve of a run: live as SVG, which is cheap to draw and follows the page's theme, and as a PNG to save.

Object-oriented matplotlib only: pyplot's global state breaks when threads share it.
"""

import html
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bizassist_nb.core.files import write_atomic
from bizassist_nb.runs.records import Step
from bizassist_nb.runs.run import RunDirectory

_Floats = npt.NDArray[np.float64]

# Okabe and Ito's colours, which colour-blind people can tell apart; the line styles differ too.
_GREY, _BLUE, _ORANGE = "#999999", "#0072B2", "#D55E00"
_COLORS: Final = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMOOTHING: Final = 0.9
"""Weight of the past in the smoothed loss."""
_DRAWN: Final = 1000
"""Most points of a curve, so that a long run's plot costs no more than a short one's."""

# The SVG's box and, in it, the axes' (left, top, right, bottom), in pixels.
_BOX, _AXES = (640, 270), (64, 12, 556, 230)
_LIGHT_BLUE = "#1f83c4"
"""A blue with a contrast of 4 to white and to black alike."""


class LossFigure(Figure):
    """A figure that a notebook shows when it is a cell's value, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def loss_figure(*runs: RunDirectory) -> LossFigure:
    """Smoothed training loss, of a single run each step's, too, and held-out loss, on white also in dark themes."""
    figure = LossFigure(figsize=(6.4, 3.4), dpi=100, layout="constrained", facecolor="white")
    axes = FigureCanvasAgg(figure).figure.add_subplot(ylabel="loss (nats a token)")
    axes.set_xlabel("step (lines: training, smoothed; dashed: held-out answers)")
    axes.grid(alpha=0.3)
    lines: list[Any] = []
    for run, color, mark in zip(runs, itertools.cycle(_COLORS), itertools.cycle("os^Dv"), strict=False):
        if steps := run.steps:
            numbers, losses, smooth = _points(steps)
            if len(runs) == 1:
                axes.plot(numbers, losses, color=_GREY, linewidth=0.8)
            lines += axes.plot(numbers, smooth, color=color, linewidth=2)
        if held_out := run.held_out:
            axes.plot(*zip(*held_out, strict=True), color=color, marker=mark, linestyle="--", clip_on=False)
    known = [run for run in runs if run.steps]
    if known:
        least, most = _range([loss for run in runs for loss in _shown(run)])
        axes.set_ylim(least - 0.05 * (most - least), most + 0.05 * (most - least))
        legend = figure.legend(lines, [""] * len(lines), loc="outside upper left", ncols=3, frameon=False)
        for text, run in zip(legend.get_texts(), known, strict=True):
            text.set_parse_math(False)  # a name is a name: no formula between dollar signs
            text.set_text(run.name)
    axes.set_xlim(left=0)
    return figure


def _shown(run: RunDirectory) -> list[float]:
    """The losses that are wholly in sight: those of the first tenth of the steps, often far above, may be cut off."""
    steps = run.steps
    return [*(step.loss for step in steps[len(steps) // 10 :]), *(loss for _, loss in run.held_out)]


def _range(losses: Sequence[float]) -> tuple[float, float]:
    least, most = min(losses, default=0.0), max(losses, default=1.0)
    return (least, most) if most > least else (least - 0.5, least + 0.5)


def loss_svg(run: RunDirectory) -> str:
    """The same curves as an SVG element in the page's colours, with a text for those who cannot see it."""
    steps, held_out, end = run.steps, run.held_out, run.total_steps or 1
    up = [float(tick) for tick in MaxNLocator(5).tick_values(*_range(_shown(run)))]
    left, top, right, bottom = _AXES

    def place(step: float, loss: float) -> tuple[float, float]:
        """Where they are drawn, in pixels to one decimal: steps begin at the left edge, ticks end at the others."""
        down = min(max(0.0, (up[-1] - loss) / (up[-1] - up[0])), 1.0)
        return round(left + (right - left) * step / end, 1), round(top + (bottom - top) * down, 1)

    curves: list[tuple[str, str, Sequence[tuple[float, float]]]] = []
    dots = ""
    if steps:
        numbers, values, smooth = _points(steps)
        grey, blue = 'stroke="currentColor" opacity="0.4"', f'stroke="{_LIGHT_BLUE}" stroke-width="2.5"'
        curves.append(("each step", grey, [*zip(numbers, values, strict=True)]))
        curves.append(("smoothed", blue, [*zip(numbers, smooth, strict=True)]))
    if held_out:
        curves.append(("held-out", f'stroke="{_ORANGE}" stroke-width="2" stroke-dasharray="6 4"', held_out))
        dots = "".join('<circle cx="{}" cy="{}" r="4"/>'.format(*place(*point)) for point in held_out)
    lines, below = "", 0.0
    for name, style, points in sorted(curves, key=lambda curve: -curve[2][-1][1]):  # the highest end first
        path = " ".join("{},{}".format(*place(*point)) for point in points)
        lines += f'<polyline points="{path}" fill="none" {style}/>'
        x, y = place(*points[-1])
        below = max(y + 4, below + 16)  # names of curves that end beside one another stand below one another
        lines += f'<text x="{x + 10:.1f}" y="{below:.1f}">{name}</text>'
    across = (step for step in MaxNLocator(6, integer=True).tick_values(0, end) if step <= end)
    steps_at = [(place(step, up[0])[0], f"{step:,.0f}") for step in across]
    losses_at = [(place(0, loss)[1], f"{round(loss, 6):g}") for loss in up]
    return (
        f'<svg viewBox="0 0 {_BOX[0]} {_BOX[1]}" role="img" aria-label="{html.escape(loss_words(run))}" '
        f'style="width: 100%; max-width: {_BOX[0] * 1.25:.0f}px; height: auto; font: 14px sans-serif" '
        f'fill="currentColor">{_svg_frame(steps_at, losses_at)}{lines}<g fill="{_ORANGE}">{dots}</g></svg>'
    )


def _svg_frame(across: Iterable[tuple[float, str]], up: Iterable[tuple[float, str]]) -> str:
    """The names of both axes, and their ticks: (pixel, label) of steps and of losses."""
    left, top, right, bottom = _AXES
    steps = [f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{label}</text>' for x, label in across]
    losses = [
        f'<path d="M{left},{y}H{right}" stroke="currentColor" opacity="0.15"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        for y, label in up
    ]
    return (
        f'{"".join([*losses, *steps])}<text x="{(left + right) / 2}" y="{_BOX[1] - 4}" text-anchor="middle">step</text>'
        f'<text transform="translate(12 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "loss (nats a token)</text>"
    )


def loss_words(run: RunDirectory) -> str:
    """The curve in words."""
    steps, held_out = run.steps, run.held_out
    words = "loss against step"
    if steps:
        first, last = steps[0], steps[-1]
        words += f": training loss {first.loss:.3f} at step {first.step}, {last.loss:.3f} at {last.step}"
    return words + "".join(f"; held-out loss {loss:.3f} at step {step}" for step, loss in held_out)


def _points(steps: Sequence[Step]) -> list[list[float]]:
    """Steps, losses and smoothed losses of the points that are drawn."""
    numbers, losses = np.array([(step.step, step.loss) for step in steps]).T
    shown = np.unique(np.linspace(0, len(steps) - 1, _DRAWN).astype(np.int64))
    return [each[shown].tolist() for each in (numbers, losses, _smoothed(losses))]


def _smoothed(losses: _Floats) -> _Floats:
    """Exponential moving average with bias correction (Kingma & Ba 2015, section 3)."""
    averages = itertools.accumulate(losses, lambda mean, loss: _SMOOTHING * mean + (1 - _SMOOTHING) * loss, initial=0.0)
    return np.array([mean / (1 - _SMOOTHING**i) for i, mean in enumerate(averages) if i])


def save_loss_png(run: RunDirectory) -> None:
    """Write the run's loss.png."""
    write_atomic(run.path / "loss.png", lambda part: part.write_bytes(loss_figure(run)._repr_png_()))
