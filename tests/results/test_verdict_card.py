"""The verdict card and what is said of held-out loss, of runs made of files alone."""

import os
import time

import msgspec
import pytest

from bizassist_nb.api import Run
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.notebook.views import progress_html
from bizassist_nb.results.ballot import append
from bizassist_nb.results.degeneration import counted
from bizassist_nb.results.summary import headline, how_to_go_on, run_html, run_text
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.results.verdict_card import rising, sections
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal, json_line, take_lock


@pytest.fixture
def make(tmp_path):
    """A run with these held-out losses by step, the base's first."""

    def make(losses, **settings) -> Run:
        (tmp_path / "settings.toml").write_text(Settings(**settings).to_toml())
        journal = Journal(tmp_path)
        journal.write(records.Plan(steps=100))
        for step, loss in losses:
            journal.write(records.Evaluation(step=step, loss=loss))
        return Run(tmp_path)

    return make


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([], None),
        ([(0, 3.0)], None),
        ([(0, 3.0), (20, 2.5)], None),
        ([(0, 3.0), (20, 2.5), (40, 2.4)], None),
        ([(0, 3.0), (20, 2.5), (40, 2.4), (60, 2.45)], "Held-out loss has risen since step 40 (2.400, now 2.450)"),
        ([(0, 3.0), (20, 2.5), (40, 2.7), (60, 2.6)], "Held-out loss has risen since step 20 (2.500, now 2.600)"),
        ([(0, 3.0), (20, 2.5), (40, 2.7), (60, 2.4)], None),
        ([(0, 3.0), (20, 3.5)], "Held-out loss is above the base's (3.000, now 3.500)."),
    ],
)
def test_a_rise_is_said_in_words(make, losses, words):
    run = make(losses)
    said = rising(run)
    assert said is None if words is None else said.startswith(words)
    for view in (run_html(run), run_text(run)):
        assert ("Held-out loss" in view) == bool(words)


@pytest.mark.parametrize(
    ("keep", "words"), [("best", "(the run will save it)"), ("last", '(keep = "best" has a run save it)')]
)
def test_what_becomes_of_the_best_is_said(make, keep, words):
    run = make([(0, 3.0), (20, 2.5), (40, 2.6)], keep=keep)
    assert rising(run).endswith(f"the best checkpoint is kept in {run.path / 'best'} {words}.")
    lock = take_lock(run.path)
    Journal(run.path).write(records.State(state="training"))
    assert rising(run).endswith(f"the best checkpoint is kept {words}.")
    os.close(lock)


@pytest.fixture
def judged(make):
    run = make([(0, 3.0), (100, 2.5)])
    base = [Score(i, 30.0, 10, "ab"[i % 2]) for i in range(20)]
    tuned = [Score(i, 30.0 + (i - 14) / 2, 10, "ab"[i % 2]) for i in range(20)]
    found = judge(base, tuned, seed=0, questions={i: f"Question {i}? " + "x" * 200 for i in range(20)})
    answers = [
        records.Answers(
            prompt=f"Prompt {i}",
            base=records.Answer(text="Fine.", stopped=True, signs=[]),
            tuned=records.Answer(text="Loop loop", stopped=False, signs=["loops"]),
        )
        for i in range(12)
    ]
    write_json(run.path / "answers.json", answers)
    write_json(run.path / "evaluation.json", assess(found, found, counted(answers, 64)))
    return run


def test_the_card_lists_the_five_most_improved_and_most_damaged(judged):
    by_title = {section.title: section for section in sections(judged)}
    improved, damaged = by_title["The 5 most improved rows"], by_title["The 5 most damaged rows"]
    assert [row[0] for row in improved.rows] == ["0", "1", "2", "3", "4"]
    assert [row[0] for row in damaged.rows] == ["19", "18", "17", "16", "15"]
    assert improved.rows[0][2:] == ("3.000", "2.300", "-0.700")
    assert improved.rows[0][1].startswith("Question 0? ")
    assert improved.rows[0][1].endswith("x…")
    assert [row[0] for row in by_title["By category"].rows] == ["a", "b"]


def test_the_card_counts_the_answers_and_the_verdict_follows_them(judged):
    first = sections(judged)[0]
    assert first.lines[0].startswith(
        "Fine-tuning hurt: of 12 prompts base answered 12 soundly and tuned 0; held-out loss 3.000 before and "
    )
    rows = {row[0]: row[1:3] for row in first.rows}
    assert rows["answers that loop"] == ("0 of 12", "12 of 12")
    assert rows["answers that stop within 64 tokens"] == ("12 of 12", "0 of 12")
    (answers,) = [section for section in sections(judged) if "fixed prompts" in section.title]
    assert answers.rows[0] == ("Prompt 0", "Fine.", "[loops] Loop loop …")


def test_votes_stand_beside_the_losses(judged):
    vote = {"time": 1.0, "question": "q", "base": "b", "tuned": "t", "left": "base"}
    for winner in ("tuned", "tuned", "base", "tie"):
        append(judged, records.Vote(winner=winner, **vote))
    first = sections(judged)[0]
    assert ("blind votes won", "1", "2", "7% to 100% for tuned") in first.rows
    assert any(line.startswith("Tuned won 2 of 3 decided blind votes") for line in first.lines)


def test_texts_of_rows_and_answers_are_marked_as_private(judged):
    for section in sections(judged):
        told = [text for row in section.rows for text in row]
        assert section.private == any("Question" in text or "Prompt" in text for text in told)


def test_answers_that_are_missing_are_said_to_be(judged):
    found = judged.evaluation
    write_json(judged.path / "evaluation.json", assess(found, found.general, None))
    Journal(judged.path).write(records.Unanswered(reason="the fixed prompts could not be answered: killed"))
    first = sections(judged)[0]
    assert "the fixed prompts could not be answered: killed" in first.lines
    assert not any("answers that" in row[0] for row in first.rows)


STEP = {"loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens": 100, "seconds": 1.0}


def test_the_way_to_go_on_is_one_that_is_allowed(make):
    """A run with steps cannot be begun anew under its name (test_cli.py), only resumed, from the start if need be."""
    run = make([])
    journal = Journal(run.path)
    journal.write(records.State(state="stopped"))
    assert how_to_go_on(run) == f"it had no checkpoint yet; begin from the start with: %%finetune {run.name}"
    journal.write(records.Step(step=1, **STEP))
    assert how_to_go_on(run).endswith(f"begin from the start with: %%finetune {run.name} --resume")
    journal.write(records.Checkpoint(step=1))
    assert how_to_go_on(run).startswith("the checkpoint at step 1 is kept")


def test_who_is_being_scored_is_said_of_a_resumed_run_too(make):
    run = make([])
    lock, journal = take_lock(run.path), Journal(run.path)
    journal.write(records.Step(step=1, **STEP))
    for who in ("base", "tuned"):
        journal.write(records.State(state="scoring", who=who))
        said = {"base": "measuring base on rows", "tuned": "measuring base and tuned on rows"}
        assert said[who] in headline(run)
    os.close(lock)


def test_a_resumed_run_says_how_long_it_has_been_at_it_and_promises_nothing_before_it_trains(make):
    run, now = make([]), time.time()
    lock, journal = take_lock(run.path), Journal(run.path)

    def write(ago, event):
        journal.append(json_line(msgspec.structs.replace(event, time=now - ago)))

    write(9000, records.State(state="starting"))
    write(8900, records.State(state="training"))
    write(8890, records.Step(step=1, **STEP))
    write(8880, records.State(state="stopped"))
    write(3000, records.State(state="starting"))
    write(2940, records.State(state="loading"))
    assert " left" not in headline(run)
    assert "(for 49 min, 50 min since its start)" in run_html(run)
    assert "for 49 min, 50 min since its start" in progress_html(run)
    write(600, records.State(state="training"))
    assert headline(run).endswith("of training left")
    assert "training, for 10 min, 50 min since its start" in progress_html(run)
    os.close(lock)
    write(100, records.State(state="finished"))
    assert "since its start" not in run_html(run)
