"""Blind votes: nothing gives away whose answer is whose, none is lost, and they count and export as they should."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from scipy.stats import binom

from bizassist_nb.__main__ import main
from bizassist_nb.api import Run
from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.ballot import (
    Ballot,
    Tally,
    VoteError,
    append,
    blind_html,
    choice_of,
    preference_pairs,
    read_votes,
    tally,
)
from bizassist_nb.runs.records import Vote

ANSWERS = {"base": "The base's **words**.", "tuned": "Tuned words."}
BOTH = Comparison("How <b>much</b>?", ANSWERS, ("pricing",), cut=("tuned",), limit=9)


@pytest.fixture
def run(tmp_path) -> Run:
    path = tmp_path / "pricing"
    path.mkdir()
    (path / "settings.toml").write_text(Settings(system_prompt="Be brief.").to_toml())
    return Run(path)


def votes(run: Run) -> list[Vote]:
    return read_votes(run)[0]


def cast(run: Run, *choices: str, order: tuple[str, str] = ("base", "tuned")) -> None:
    for choice in choices:
        Ballot(run, BOTH, order).cast(choice)


def test_before_the_vote_no_name_is_shown(run):
    for order in (("base", "tuned"), ("tuned", "base")):
        ballot = Ballot(run, BOTH, order)
        for text in (ballot._repr_html_(), blind_html(BOTH, order), repr(ballot)):
            assert "pricing" not in text
            assert "tuned" not in text
            assert "base" not in text.replace("The base's", "").replace("The base&#x27;s", "")


def test_the_answers_stand_in_the_order_drawn(run):
    left_base, left_tuned = (Ballot(run, BOTH, order)._repr_html_() for order in (("base", "tuned"), ("tuned", "base")))
    assert left_base.index("<strong>words") < left_base.index("Tuned words")
    assert left_tuned.index("<strong>words") > left_tuned.index("Tuned words")
    assert "left, stopped at the limit of 9 tokens" in left_tuned


def test_the_order_is_drawn_anew_each_time(run):
    assert {Ballot(run, BOTH).order for _ in range(64)} == {("base", "tuned"), ("tuned", "base")}


@pytest.mark.parametrize(
    ("choice", "order", "winner"),
    [
        ("left", ("base", "tuned"), "base"),
        ("left", ("tuned", "base"), "tuned"),
        ("right", ("base", "tuned"), "tuned"),
        ("right", ("tuned", "base"), "base"),
        ("tie", ("tuned", "base"), "tie"),
        ("bad", ("tuned", "base"), "bad"),
    ],
)
def test_a_vote_is_for_whose_answer_stood_there_and_reveals_it(run, choice, order, winner):
    ballot = Ballot(run, BOTH, order)
    vote = ballot.cast(choice)
    assert (vote.winner, vote.left) == (winner, order[0])
    assert votes(run) == [vote]
    for side, who in zip(("left", "right"), order, strict=True):
        assert f"{side}: {'tuned (pricing)' if who == 'tuned' else 'base'}" in ballot._repr_html_()
    assert "You voted: " in repr(ballot)


@pytest.mark.parametrize(
    ("key", "choice"),
    [("1", "left"), ("2", "right"), ("3", "tie"), ("4", "bad"), ("L", "left"), (" r", "right"), ("tie", "tie"),
     ("b", "bad"), ("5", None), ("x", None), ("", None)],
)  # fmt: skip
def test_keys_vote_by_number_and_by_first_letter(key, choice):
    assert choice_of(key) == choice


def test_a_ballot_is_cast_once_and_only_for_what_there_is(run):
    ballot = Ballot(run, BOTH)
    with pytest.raises(VoteError, match="'up' cannot be voted; it is one of left, right, tie, bad"):
        ballot.cast("up")
    ballot.cast("tie")
    with pytest.raises(VoteError, match="has been cast"):
        ballot.cast("left")
    assert len(votes(run)) == 1


@pytest.mark.parametrize("missing", ["base", "tuned"])
def test_both_answers_and_a_run_are_needed(run, missing):
    with pytest.raises(VoteError, match="needs a base and a tuned answer"):
        Ballot(run, dataclasses.replace(BOTH, answers={who: text for who, text in ANSWERS.items() if who != missing}))
    with pytest.raises(VoteError, match="train a run first"):
        Ballot(None, BOTH)


def test_a_vote_is_on_one_run_as_it_was_trained(run):
    with pytest.raises(VoteError, match="not at strength"):
        Ballot(run, dataclasses.replace(BOTH, strength=0.5))
    several = {"base": "One.", "tuned (a)": "Two.", "tuned (b)": "Three."}
    with pytest.raises(VoteError, match="needs a base and a tuned answer"):
        Ballot(run, dataclasses.replace(BOTH, answers=several))


def test_votes_are_kept_when_the_process_is_killed(run):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom bizassist_nb.api import Run\n"
        "from bizassist_nb.results.ballot import Ballot\nfrom bizassist_nb.assistant.comparison import Comparison\n"
        "run = Run(Path(sys.argv[1]))\n"
        "for i in range(3):\n    Ballot(run, Comparison(f'Q{i}', {'base': 'a', 'tuned': 'b'})).cast('left')\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(run.path)], check=False).returncode == -9
    assert [vote.question for vote in votes(run)] == ["Q0", "Q1", "Q2"]


def test_a_torn_line_costs_that_vote_alone(run):
    cast(run, "left", "right")
    file = run.path / "votes.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    assert len(votes(run)) == 1
    cast(run, "tie")
    assert [vote.winner for vote in votes(run)] == ["base", "tie"]


def test_any_text_comes_back(run):
    text = 'Zeile\n"\\ \u2028 🦜'
    vote = Vote(1.5, text, text, text, "tie", "base")
    append(run, vote)
    append(run, msgspec.structs.replace(vote, question="half \ud800"))
    assert votes(run)[0] == vote
    assert len(votes(run)) == 2


def test_tally_counts_and_the_interval_is_that_of_the_mixture(run):
    cast(run, *["right"] * 9, "left", "tie", "bad", "bad")
    found = tally(run)
    assert (found.wins, found.losses, found.ties, found.bad, found.win_rate) == (9, 1, 1, 2, 0.9)
    shares = (np.arange(100_000) + 0.5) / 100_000
    mean = binom.pmf(9, 10, shares).mean()  # how likely these votes are, if any share is as likely as another
    within = shares[binom.pmf(9, 10, shares) * 20 > mean]
    assert found.interval == pytest.approx((within[0], within[-1]), abs=1e-4)
    assert found.sentence.startswith(
        "Tuned won 9 of 10 decided blind votes, 90% (95 % interval 45% to 100%, whenever voting stops): about 2 more "
    )


def test_who_stops_as_soon_as_the_result_pleases_is_wrong_in_one_of_twenty_cases_at_most():
    """2,000 people vote without a preference, and look after every vote."""
    random = np.random.default_rng(5)
    tallies = [(wins, votes - wins) for votes in range(1, 61) for wins in range(votes + 1)]
    seen = {counts: Tally(*counts, ties=0, bad=0).interval for counts in tallies}
    wrong = 0
    for votes in random.integers(2, size=(2000, 60)).tolist():
        wins = itertools.accumulate(votes)
        intervals = (seen[each, number - each] for number, each in enumerate(wins, 1))
        wrong += any(low > 0.5 or high < 0.5 for low, high in intervals)
    assert wrong / 2000 < 0.05


def test_the_votes_that_are_asked_for_do_tell():
    assert (Tally(0, 0, 0, 0).needed, Tally(8, 0, 0, 0).needed, Tally(10, 10, 0, 0).needed) == (8, 0, None)
    for wins, losses in ((3, 1), (1, 3), (6, 4), (11, 9)):
        needed = Tally(wins, losses, 0, 0).needed
        decided = wins + losses + needed
        won = round(decided * wins / (wins + losses))
        assert "is preferred" in Tally(won, decided - won, 0, 0).sentence
        assert f"about {needed} more votes like these would tell" in Tally(wins, losses, 0, 0).sentence


def test_all_votes_for_one_are_an_interval_too():
    assert Tally(8, 0, 0, 0).interval == pytest.approx((0.523, 1.0), abs=1e-3)
    assert Tally(0, 8, 0, 0).interval == pytest.approx((0.0, 0.477), abs=1e-3)


def test_without_a_decided_vote_there_is_no_rate(run):
    cast(run, "tie", "bad")
    found = tally(run)
    assert (found.win_rate, found.interval) == (None, pytest.approx((0.0, 1.0), abs=1e-3))
    assert "No vote has decided" in found.sentence
    assert "at least 8 are needed" in found.sentence


def test_the_report_shows_the_votes_once_there_are_any(run):
    assert "Blind votes" not in run._repr_html_()
    cast(run, "left")
    assert "Tuned won 0 of 1 decided blind votes" in run._repr_html_()


def test_pairs_are_those_that_trl_trains_on(run, chat):
    from trl.data_utils import is_conversational, maybe_apply_chat_template

    cast(run, "left", "right", "tie", "bad")
    pairs = preference_pairs(run)
    assert len(pairs) == 2
    for pair, (chosen, rejected) in zip(pairs, [(BOTH.base, BOTH.tuned), (BOTH.tuned, BOTH.base)], strict=True):
        assert is_conversational(pair)
        text = maybe_apply_chat_template(pair, chat.tokenizer)
        assert text["prompt"].startswith("<|im_start|>system\nBe brief.<|im_end|>")
        assert text["prompt"].endswith("How <b>much</b>?<|im_end|>\n<|im_start|>assistant\n")
        assert text["chosen"].startswith(chosen)
        assert text["rejected"].startswith(rejected)


def test_the_command_line_counts_and_exports(run, tmp_path, capsys):
    where = ["--runs-dir", str(run.path.parent)]
    target = tmp_path / "pairs.jsonl"
    assert main(["votes", "pricing", "--to", str(target), *where]) == 1
    assert "no decided votes to export" in capsys.readouterr().err
    cast(run, "left", "right")
    assert main(["votes", "pricing", "--to", str(target), *where]) == 0
    assert "2 preference pairs" in capsys.readouterr().out
    assert [json.loads(line) for line in target.read_text("utf-8").splitlines()] == preference_pairs(run)
    nowhere = tmp_path / "no" / "such" / "x.jsonl"
    assert main(["votes", "pricing", "--to", str(nowhere), *where]) == 1
    assert f"{nowhere} cannot be written (No such file or directory)" in capsys.readouterr().err


def test_a_vote_is_synced_before_it_counts(run, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    cast(run, "left")
    assert synced == [(run.path / "votes.jsonl").stat().st_size]
