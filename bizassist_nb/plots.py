"""The loss curve of a run. Object-oriented matplotlib only: pyplot's global state breaks when threads share it."""

import io
import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bizassist_nb.runs import Run, write_whole

# Okabe and Ito's colours, told apart by colour-blind people too; line styles differ besides.
_GREY, _BLUE, _ORANGE = "#999999", "#0072B2", "#D55E00"
_COLORS: Final = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SMOOTHING: Final = 0.9
"""Weight of the past in the smoothed loss."""
_DRAWN: Final = 1000
"""Points drawn at most, so that a long run's plot costs no more than a short one's."""


class LossFigure(Figure):
    """A figure that a notebook shows when it is a cell's value, without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def loss_figure(run: Run) -> LossFigure:
    """Training loss, smoothed and as it is, and held-out loss, against the step; white behind, for dark themes too."""
    figure = LossFigure(figsize=(6.4, 3.2), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = run.steps
    if steps:
        numbers = np.array([step.step for step in steps])
        losses = np.array([step.loss for step in steps])
        shown = np.unique(np.linspace(0, len(steps) - 1, _DRAWN).astype(int))
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
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if steps or held_out:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def overlaid_figure(runs: Sequence[Run]) -> LossFigure:
    """Smoothed training loss (lines) and held-out loss (dashed, with marks) of several runs against the step."""
    figure = LossFigure(figsize=(6.4, 3.6), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run, color, mark in zip(runs, itertools.cycle(_COLORS), itertools.cycle("os^Dv"), strict=False):
        steps = run.steps
        if steps:
            shown = np.unique(np.linspace(0, len(steps) - 1, _DRAWN).astype(int))
            numbers, losses = np.array([(step.step, step.loss) for step in steps]).T
            axes.plot(numbers[shown], smoothed(losses)[shown], color=color, label=run.name)
        if held_out := run.held_out:
            axes.plot(*zip(*held_out, strict=True), color=color, linestyle="--", marker=mark, clip_on=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("step (lines: training, smoothed; dashed: held-out answers)")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def smoothed(losses: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Exponential moving average with its start corrected for (Kingma & Ba 2015, section 3)."""
    average, values = 0.0, np.empty_like(losses)
    for i, loss in enumerate(losses, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * float(loss)
        values[i - 1] = average / (1 - _SMOOTHING**i)
    return values


def loss_png(run: Run) -> bytes:
    """The loss curve as a PNG image."""
    return loss_figure(run)._repr_png_()


def save_loss_png(run: Run) -> None:
    """Write the run's loss.png."""
    write_whole(run.path / "loss.png", lambda part: part.write_bytes(loss_png(run)))
