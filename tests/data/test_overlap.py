"""Rows that belong together stay together, and rows that nearly repeat each other are found."""

import dataclasses
import itertools

import pytest

from bizassist_nb.core.errors import DataError
from bizassist_nb.data.overlap import NEAR, group, near_duplicates, near_words, validation_split
from bizassist_nb.data.rows import Row, folded, read_table, split


def row(number: int, question: str, answer: str = "It depends.", context: str = "") -> Row:
    return Row(number, question, answer, context)


def test_questions_that_differ_only_in_punctuation_are_one():
    rows = [
        row(1, "What is a bond?"),
        row(2, "what is a BOND"),
        row(3, "What is a «bond» …"),
        row(4, "What is a share?"),
    ]
    rows += [row(i, f"Question {i}?") for i in range(5, 30)]
    for seed in range(20):
        training, held_out = ({one.number for one in side} for side in split(rows, subset=10, held_out=10, seed=seed))
        assert not (training & {1, 2, 3} and held_out & {1, 2, 3})
    assert (folded(" C++ is, well:\tfine. "), folded("?!"), folded("a-b", exact=True)) == (
        "c is well fine",
        "?!",
        "a-b",
    )


def test_a_third_of_the_rows_validates_and_no_context_is_on_both_sides():
    rows = [row(i, f"Question {i}?", context=f"Report {i // 4}." if i < 20 else "") for i in range(30)]
    validation, test = validation_split(rows)
    assert 8 <= len(validation) <= 10
    assert sorted(one.number for one in [*validation, *test]) == list(range(30))
    assert not {group(one) for one in validation} & {group(one) for one in test}
    assert validation_split(rows) == (validation, test)


@pytest.mark.parametrize("rows", [3, 4, 12, 64])
def test_rows_of_their_own_are_split_as_they_come(rows):
    validation, test = validation_split([row(i, f"Question {i}?") for i in range(rows)])
    assert [one.number for one in validation] == list(range(rows // 3))
    assert [one.number for one in test] == list(range(rows // 3, rows))


def test_rows_of_one_context_cannot_be_split():
    with pytest.raises(DataError, match=r"the 6 held-out rows leave no two .* raise held_out, or do without"):
        validation_split([row(i, f"Question {i}?", context="The report.") for i in range(6)])


def test_near_duplicates_are_those_that_share_half_of_their_pieces(dolly):
    rows = read_table(dolly).rows[:1500]
    others = rows[:150]
    altered = [
        dataclasses.replace(one, number=10_000 + one.number, response=f"{one.response} Indeed.") for one in others[:20]
    ]

    def pieces(one: Row) -> set[tuple[str, ...]]:
        words = folded(f"{one.instruction} {one.context} {one.response}").split()
        return set(zip(words, words[1:], words[2:], strict=False))

    known = {one.number: pieces(one) for one in (*rows, *altered)}
    training = [*rows[150:], *altered]
    expected = {
        (one.number, other.number)
        for one, other in itertools.product(training, others)
        if len(known[one.number] & known[other.number]) >= NEAR * len(known[one.number] | known[other.number])
    }
    found = near_duplicates(training, others)
    assert set(found) == expected
    assert len(found) == len(expected) >= 20
    assert f"{len({one for one, _ in found})} training rows nearly repeat a held-out row (rows " in near_words(found)
