"""The loss curve of a run: live as SVG, which is cheap to draw and follows the page's theme, and to keep as a PNG.

Object-oriented matplotlib only: pyplot's global state breaks when threads share it.
"""

import dataclasses
import html
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bizassist_nb.core.files import write_atomic
from bizassist_nb.runs.run import RunDirectory

# Okabe and Ito's colours, told apart by colour-blind people too; line styles differ besides.
_GREY, _BLUE, _ORANGE = "#999999", "#0072B2", "#D55E00"
_COLORS: Final = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMOOTHING: Final = 0.9
"""Weight of the past in the smoothed loss."""
_DRAWN: Final = 1000
"""Points drawn at most, so that a long run's plot costs no more than a short one's."""

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
    """Training loss, smoothed and as it is, and held-out loss, against the step; white behind, for dark themes too."""
    figure, axes = _empty(3.2)
    steps = run.steps
    if steps:
        numbers = np.array([step.step for step in steps])
        losses = np.array([step.loss for step in steps])
        shown = _drawn(len(steps))
        axes.plot(numbers[shown], losses[shown], color=_GREY, linewidth=0.8, label="training, each step")
        axes.plot(numbers[shown], smoothed(losses)[shown], color=_BLUE, linewidth=2, label="training, smoothed")
    if held_out := run.held_out:
        axes.plot(
            *zip(*held_out, strict=True),
            color=_ORANGE,
            linestyle="--",
            marker="o",
            clip_on=False,
            label="held-out answers",
        )
    axes.set_xlim(0, run.total_steps or 1)
    axes.set_xlabel("step")
    return _with_legend(figure)


def overlaid_figure(runs: Sequence[RunDirectory]) -> LossFigure:
    """Smoothed training loss (lines) and held-out loss (dashed, with marks) of several runs against the step."""
    figure, axes = _empty(3.6)
    names: list[str] = []
    for run, color, mark in zip(runs, itertools.cycle(_COLORS), itertools.cycle("os^Dv"), strict=False):
        steps = run.steps
        if steps:
            shown = _drawn(len(steps))
            numbers, losses = np.array([(step.step, step.loss) for step in steps]).T
            axes.plot(numbers[shown], smoothed(losses)[shown], color=color, label=f"run {len(names)}")
            names.append(run.name)
        if held_out := run.held_out:
            axes.plot(*zip(*held_out, strict=True), color=color, linestyle="--", marker=mark, clip_on=False)
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


def _with_legend(figure: LossFigure) -> LossFigure:
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Where a step and a loss are drawn between the axes."""

    end: int
    """The step at the right edge; the left one is 0."""
    low: float
    high: float

    def x(self, step: float) -> float:
        left, _, right, _ = _AXES
        return left + (right - left) * step / self.end

    def y(self, loss: float) -> float:
        _, top, _, bottom = _AXES
        return bottom - (bottom - top) * (loss - self.low) / (self.high - self.low)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        path = " ".join(f"{self.x(step):.1f},{self.y(loss):.1f}" for step, loss in points)
        return f'<polyline points="{path}" fill="none" {style}/>'


def loss_svg(run: RunDirectory) -> str:
    """The same as an SVG element in the colours of the text around it, with a text for those who cannot see it."""
    steps, held_out = run.steps, run.held_out
    end = run.total_steps or 1
    losses = [*(step.loss for step in steps), *(loss for _, loss in held_out)] or [0.0, 1.0]
    up = MaxNLocator(5).tick_values(min(losses), max(losses))
    scale = _Scale(end, up[0], up[-1])
    across = [step for step in MaxNLocator(6, integer=True).tick_values(0, end) if step <= end]
    legend, curves = [], []
    if steps:
        shown = _drawn(len(steps))
        numbers, values = np.array([(step.step, step.loss) for step in steps]).T
        each, smooth = 'stroke="currentColor" opacity="0.4"', f'stroke="{_LIGHT_BLUE}" stroke-width="2.5"'
        curves.append(scale.line(zip(numbers[shown], values[shown], strict=True), each))
        curves.append(scale.line(zip(numbers[shown], smoothed(values)[shown], strict=True), smooth))
        legend += [("training, each step", each), ("training, smoothed", smooth)]
    if held_out:
        style = f'stroke="{_ORANGE}" stroke-width="2" stroke-dasharray="6 4"'
        dots = (f'<circle cx="{scale.x(step):.1f}" cy="{scale.y(loss):.1f}" r="4"/>' for step, loss in held_out)
        curves += [scale.line(held_out, style), f'<g fill="{_ORANGE}">{"".join(dots)}</g>']
        legend.append(("held-out answers", style))
    width, height = _BOX
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(loss_words(run))}" '
        f'style="width: 100%; max-width: {width * 1.25:.0f}px; height: auto; font: 14px sans-serif" '
        f'fill="currentColor">{_svg_frame(scale, across, up, legend)}{"".join(curves)}</svg>'
    )


def _svg_frame(scale: _Scale, across: Iterable[float], up: Sequence[float], legend: Sequence[tuple[str, str]]) -> str:
    """Ticks at these steps and losses, what the axes show, and (name, style) of each curve."""
    left, top, right, bottom = _AXES
    losses = [
        f'<path d="M{left},{scale.y(loss):.1f}H{right}" stroke="currentColor" opacity="0.15"/>'
        f'<text x="{left - 6}" y="{scale.y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>'
        for loss in np.round(up, 6)
    ]
    steps = [
        f'<text x="{scale.x(step):.1f}" y="{bottom + 16}" text-anchor="middle">{step:,.0f}</text>' for step in across
    ]
    keys = [
        f'<path d="M{left + 170 * i},14h24" {style}/><text x="{left + 170 * i + 30}" y="18">{name}</text>'
        for i, (name, style) in enumerate(legend)
    ]
    return (
        f"{''.join([*losses, *steps, *keys])}"
        f'<text x="{(left + right) / 2}" y="{_BOX[1] - 4}" text-anchor="middle">step</text>'
        f'<text transform="translate(12 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        "loss (nats a token)</text>"
    )


def loss_words(run: RunDirectory) -> str:
    """The curve in words."""
    steps, held_out = run.steps, run.held_out
    words = "loss against step"
    if steps:
        words += (
            f": training loss {steps[0].loss:.3f} at step {steps[0].step}, {steps[-1].loss:.3f} at {steps[-1].step}"
        )
    return words + "".join(f"; held-out loss {loss:.3f} at step {step}" for step, loss in held_out)


def _drawn(count: int) -> npt.NDArray[np.int64]:
    """Which of that many points are drawn."""
    return np.unique(np.linspace(0, count - 1, _DRAWN).astype(np.int64))


def smoothed(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Exponential moving average with its start corrected for (Kingma & Ba 2015, section 3)."""
    average, values = 0.0, np.empty_like(losses)
    for i, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * float(loss)
        values[i - 1] = average / (1 - _SMOOTHING**i)
    return values


def loss_png(run: RunDirectory) -> bytes:
    """The loss curve as a PNG image."""
    return loss_figure(run)._repr_png_()


def save_loss_png(run: RunDirectory) -> None:
    """Write the run's loss.png."""
    write_atomic(run.path / "loss.png", lambda part: part.write_bytes(loss_png(run)))
