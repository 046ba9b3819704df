"""The beginning of the verdict card: a badge, a line, and a picture in which what helped is on the right."""

import re

import msgspec
import numpy as np
import pages
import pytest
from matplotlib.image import imread

from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.model_card import write_card
from bizassist_nb.results.summary import run_html, run_text
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.results.verdict_figure import opening
from bizassist_nb.runs import records
from bizassist_nb.runs.run import RunDirectory


def compared(change: float, rows: int = 64) -> records.Judged:
    """Rows of 10 tokens, whose loss changed by about so much each."""
    base = [Score(row, 30.0, 10) for row in range(rows)]
    tuned = [Score(row, 30.0 + 10 * float(change + np.resize([0.02, -0.02], rows)[row]), 10) for row in range(rows)]
    return judge(base, tuned, seed=0)


def found(held_out: float, general: float, prompted: float | None = None) -> records.Result:
    result = assess(compared(held_out), compared(general, 50), None)
    if prompted is None:
        return result
    return msgspec.structs.replace(result, prompted=compared(prompted), examples=(4, 8, 9))


def circles(page: str) -> list[float]:
    """Pixels of the points from the left."""
    return [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', page)]


def test_what_helped_is_on_the_right_of_what_hurt():
    page = opening(found(-0.25, 0.3, prompted=-0.1)).page
    held_out, general, prompted = circles(page)
    [zero] = set(re.findall(r'<path d="M([\d.]+),\d+v18"', page))
    assert general < float(zero) < prompted < held_out


@pytest.mark.parametrize(("held_out", "general"), [(-40.0, 3.0), (-0.001, 0.001), (2.0, 2.0)])
def test_a_point_lies_within_its_interval_and_all_within_the_picture(held_out, general):
    page = opening(found(held_out, general)).page
    intervals = re.findall(r'points="([\d.]+),\d+ ([\d.]+),', page)
    for ends, point in zip(intervals, circles(page), strict=True):
        low, high = sorted(map(float, ends))
        assert 0 < low <= point <= high < 440


@pytest.mark.parametrize(
    ("held_out", "general", "badge", "line"),
    [
        (-0.25, 0.0, "✓ helped", "On 64 rows that it never saw, right answers are 22% less surprising (perplexity)."),
        (-0.25, 0.3, "✓ helped, at a cost", "22% less surprising"),
        (0.0, 0.0, "= no practical difference", "0% more surprising"),
        (0.25, 0.0, "✗ hurt", "28% more surprising"),
        (3.0, 0.0, "✗ hurt", "20.1 times as surprising"),
    ],
)
def test_badge_and_line_come_before_everything_else(tmp_path, held_out, general, badge, line):
    run = RunDirectory.create(tmp_path / "run", Settings())
    write_json(run.path / "evaluation.json", found(held_out, general))
    for view in (run_text(run), run_html(run)):
        told = re.sub("<[^>]+>", "\n", pages.read(view))
        assert told.index("Did it help?") < told.index(badge) < told.index(line) < told.index("Fine-tuning ")


def test_answers_that_broke_down_are_the_first_that_is_said():
    counts = {"base": {"sound": 12}, "tuned": {"sound": 3}}
    answers = records.AnswerCounts(prompts=14, max_new_tokens=64, verdict="hurt", **counts)
    first = opening(assess(compared(-0.25), compared(0.0), answers))
    assert first.text == "[✗ hurt] Its answers broke down: 3 of 14 are sound, and 12 of base's."


def test_a_notebook_folds_the_table_and_a_terminal_shows_it(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Settings())
    write_json(run.path / "evaluation.json", found(-0.25, 0.0, prompted=-0.1))
    page = run_html(run)
    assert page.index("<svg") < page.index("Fine-tuning helped") < page.index("<details>") < page.index("<table>")
    assert "held-out loss, nats a token (64 rows)" in run_text(run)
    assert "base with 3 examples in its prompt: held-out loss" in run_text(run)


def test_a_model_card_has_the_picture_with_its_words(tmp_path):
    run = RunDirectory.create(tmp_path / "run", Settings())
    write_json(run.path / "evaluation.json", found(-0.25, 0.0))
    write_card(run)
    card = (run.path / "README.md").read_text("utf-8")
    assert re.search(r"!\[Changes of loss .*64 held-out rows: -0\.250 \(.*; 50 general .*\]\(verdict\.png\)", card)
    pixels = imread(run.path / "verdict.png")
    assert pixels[..., :3].std() > 0.05  # something is drawn
