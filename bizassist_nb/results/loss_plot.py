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
from matplotlib.axes import Axes
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
_BOX, _AXES = (640, 280), (64, 34, 616, 240)
_LIGHT_BLUE = "#1f83c4"
"""A blue with a contrast of 4 to white and to black alike."""


class LossFigure(Figure):
    """A figure that a notebook shows when it is a cell's value, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def loss_figure(run: RunDirectory) -> LossFigure:
    """Training loss, raw and smoothed, and held-out loss against the step, on white also in dark themes."""
    figure, axes = _empty(3.2)
    if steps := run.steps:
        numbers, losses, smooth = _points(steps)
        axes.plot(numbers, losses, color=_GREY, linewidth=0.8, label="training, each step")
        axes.plot(numbers, smooth, color=_BLUE, linewidth=2, label="training, smoothed")
    _draw_held_out(axes, run, color=_ORANGE, marker="o", label="held-out answers")
    axes.set_xlim(0, run.total_steps or 1)
    axes.set_xlabel("step")
    return _with_legend(figure)


def overlaid_figure(runs: Sequence[RunDirectory]) -> LossFigure:
    """Smoothed training loss (lines) and held-out loss (dashed, with marks) of several runs against the step."""
    figure, axes = _empty(3.6)
    names: list[str] = []
    for run, color, mark in zip(runs, itertools.cycle(_COLORS), itertools.cycle("os^Dv"), strict=False):
        if steps := run.steps:
            numbers, _, smooth = _points(steps)
            axes.plot(numbers, smooth, color=color, label=f"run {len(names)}")
            names.append(run.name)
        _draw_held_out(axes, run, color=color, marker=mark)
    axes.set_xlim(left=0)
    axes.set_xlabel("step (lines: training, smoothed; dashed: held-out answers)")
    _with_legend(figure)
    for text, name in zip(figure.legends[0].get_texts() if names else (), names, strict=True):
        text.set_parse_math(False)  # a name is a name: no formula between dollar signs ...
        text.set_text(name)  # ... and not left out of the legend for its underscore
    return figure


def _empty(height: float) -> tuple[LossFigure, Axes]:
    figure = LossFigure(figsize=(6.4, height), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    return figure, axes


def _draw_held_out(axes: Axes, run: RunDirectory, **style: Any) -> None:
    if held_out := run.held_out:
        axes.plot(*zip(*held_out, strict=True), linestyle="--", clip_on=False, **style)


def _with_legend(figure: LossFigure) -> LossFigure:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def loss_svg(run: RunDirectory) -> str:
    """The same curves as an SVG element in the page's colours, with a text for those who cannot see it."""
    steps, held_out, end = run.steps, run.held_out, run.total_steps or 1
    losses = [*(step.loss for step in steps), *(loss for _, loss in held_out)] or [0.0, 1.0]
    up = [float(tick) for tick in MaxNLocator(5).tick_values(min(losses), max(losses))]
    left, top, right, bottom = _AXES

    def place(step: float, loss: float) -> tuple[float, float]:
        """Where they are drawn, in pixels to one decimal: steps begin at the left edge, ticks end at the others."""
        down = (up[-1] - loss) / (up[-1] - up[0])
        return round(left + (right - left) * step / end, 1), round(top + (bottom - top) * down, 1)

    curves: list[tuple[str, str, Iterable[tuple[float, float]]]] = []
    dots = ""
    if steps:
        numbers, values, smooth = _points(steps)
        grey, blue = 'stroke="currentColor" opacity="0.4"', f'stroke="{_LIGHT_BLUE}" stroke-width="2.5"'
        curves.append(("training, each step", grey, zip(numbers, values, strict=True)))
        curves.append(("training, smoothed", blue, zip(numbers, smooth, strict=True)))
    if held_out:
        curves.append(("held-out answers", f'stroke="{_ORANGE}" stroke-width="2" stroke-dasharray="6 4"', held_out))
        dots = "".join('<circle cx="{}" cy="{}" r="4"/>'.format(*place(*point)) for point in held_out)
    lines, keys = "", ""
    for i, (name, style, points) in enumerate(curves):
        path = " ".join("{},{}".format(*place(*point)) for point in points)
        lines += f'<polyline points="{path}" fill="none" {style}/>'
        keys += f'<path d="M{left + 170 * i},14h24" {style}/><text x="{left + 170 * i + 30}" y="18">{name}</text>'
    across = (step for step in MaxNLocator(6, integer=True).tick_values(0, end) if step <= end)
    steps_at = [(place(step, up[0])[0], f"{step:,.0f}") for step in across]
    losses_at = [(place(0, loss)[1], f"{round(loss, 6):g}") for loss in up]
    return (
        f'<svg viewBox="0 0 {_BOX[0]} {_BOX[1]}" role="img" aria-label="{html.escape(loss_words(run))}" '
        f'style="width: 100%; max-width: {_BOX[0] * 1.25:.0f}px; height: auto; font: 14px sans-serif" '
        f'fill="currentColor">{_svg_frame(steps_at, losses_at)}{keys}{lines}<g fill="{_ORANGE}">{dots}</g></svg>'
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
