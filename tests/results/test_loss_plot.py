"""The loss curve: what is in sight, and where its curves are named."""

import itertools
import re

import pytest

from bizassist_nb.core.settings import Settings
from bizassist_nb.results.loss_plot import loss_figure, loss_svg
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.run import RunDirectory


@pytest.fixture
def run(tmp_path):
    """A run of 40 steps whose first two losses are far above the others."""
    run = RunDirectory.create(tmp_path / "run", Settings())
    journal = Journal(run.path)
    journal.write(records.Plan(steps=40))
    for step in range(1, 41):
        loss = 60.0 if step <= 2 else 2.5 - step / 40
        journal.write(records.Step(step=step, loss=loss, learning_rate=0, gradient_norm=1, tokens=1, seconds=1))
    for step, loss in ((0, 2.6), (40, 1.9)):
        journal.write(records.Evaluation(step=step, loss=loss))
    return run


def test_the_first_noisy_steps_do_not_squeeze_the_rest(run):
    lines = re.findall(r'<polyline points="([^"]*)"', loss_svg(run))
    held_out = next(line for line in lines if len(line.split()) == 2)
    (_, high), (_, low) = (map(float, point.split(",")) for point in held_out.split())
    assert low - high > 70  # of 218 pixels
    assert min(float(point.partition(",")[2]) for line in lines for point in line.split()) >= 12  # in the axes
    assert loss_figure(run).axes[0].get_ylim()[1] < 3


def test_each_curve_is_named_where_it_ends_and_names_lie_apart(run):
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)">(each step|smoothed|held-out)</text>', loss_svg(run))
    assert {name for _, _, name in names} == {"each step", "smoothed", "held-out"}
    assert {float(x) for x, _, _ in names} == {566.0}
    heights = sorted(float(y) for _, y, _ in names)
    assert all(below - above >= 16 for above, below in itertools.pairwise(heights))
