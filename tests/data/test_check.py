"""The data check: each thing it finds, in rows that have it and rows that do not."""

import pytest

from bizassist_nb.core.settings import Settings
from bizassist_nb.data.check import Check, check_source, language
from bizassist_nb.data.overlap import near_duplicates
from bizassist_nb.data.rows import Rejected, Row, read_table

TEXT = "The invoice of March has to be paid until the end of the month, or a fee is due for every week after it."
LONG = "Of all that was said in the meeting on Monday, only the new price of the service was written down by anyone."
GERMAN = "Die Rechnung vom März muss bis zum Ende des Monats bezahlt werden, sonst wird jede Woche eine Gebühr fällig."


def found(*rows: Row, max_length: int = 2048, rejected=(), tokens=None) -> dict[str, tuple[int, tuple[int, ...], str]]:
    check = Check(max_length, tokens)
    for row in rows:
        check.add(row)
    return {finding.what: finding[1:] for finding in check.findings(rejected)}


def rows(*answers: str) -> list[Row]:
    return [Row(i, f"What about number {i}?", answer) for i, answer in enumerate(answers, 1)]


def test_rows_without_anything_odd_have_no_findings():
    assert found(*read_table("sample").rows) == {}


def test_rows_that_repeat_others_are_named_once():
    some = [
        Row(1, TEXT, "Yes."), Row(2, f" {TEXT.upper()}", "yes"), Row(3, TEXT, "No."),
        Row(5, "What is due?", "A fee.", LONG), Row(6, "When is it?", "Weekly.", LONG),
        Row(8, "Is it money?", "It is."),
    ]  # fmt: skip
    assert found(*some) == {
        "repeat an earlier row": (1, (2,), "leave them out, or they are learned twice"),
        "nearly repeat another row": (1, (3,), "leave one of each pair out"),
    }


def test_near_duplicates_are_those_of_every_pair_compared(dolly):
    some = read_table("dolly").rows[:100]
    some = [
        *some,
        *(Row(10_000 + row.number, row.instruction, f"{row.response} Indeed.", row.context) for row in some[:9]),
    ]

    def pieces(row):
        words = (
            "".join(c if c.isalnum() else " " for c in f"{row.instruction} {row.context} {row.response}")
            .casefold()
            .split()
        )
        return set(zip(words, words[1:], words[2:], strict=False)) or {" ".join(words)}

    sets = {row.number: pieces(row) for row in some}
    expected = {(a, b) for a in sets for b in sets if len(sets[a] & sets[b]) >= 0.5 * len(sets[a] | sets[b])}
    assert len(expected) > len(some)
    assert set(near_duplicates(some, some)) == expected


@pytest.mark.parametrize(("tokens", "cut"), [(None, 2), ([99, 101, 100], 2)])
def test_rows_that_are_cut_are_counted_in_tokens_where_they_are_known(tokens, cut):
    some = rows("short", "x" * 400, "short")
    assert found(*some, max_length=100, tokens=tokens)["are cut"][:2] == (1, (cut,))


def test_answers_much_longer_or_shorter_than_most_are_found():
    some = rows(*[f"{TEXT} {i * TEXT[:i]}" for i in range(10)], "Yes.", f"{TEXT} " * 40)
    assert found(*some)["have an answer of one or two words, where most are long"][:2] == (1, (11,))
    assert found(*some)["have an answer at least eight times as long as most"][:2] == (1, (12,))


def test_answers_that_repeat_the_question_are_found():
    some = [Row(1, "What is due in March?", "what is due in March: the invoice"), Row(2, "Name?", "Name? Jane.")]
    assert found(*some)["have an answer that repeats the question"][:2] == (1, (1,))


@pytest.mark.parametrize("text", ["jane.doe+x@mail.example.co.uk", "Jane <jane@example.com>."])
def test_e_mail_addresses_are_found(text):
    assert found(Row(7, "Who?", f"Ask {text}"))["hold an e-mail address"][:2] == (1, (7,))


@pytest.mark.parametrize(
    "text", ["+49 30 1234567", "+1 (555) 123-4567", "(555) 123-4567", "555-123-4567", "030 1234567", "(0171) 123 45 67"]
)
def test_phone_numbers_are_found(text):
    assert found(Row(7, "Who?", "Nobody.", f"Call {text}, please."))["hold a phone number"][:2] == (1, (7,))


@pytest.mark.parametrize(
    "text",
    ["in 2019-2020 and 2021", "1 000 000 000", "2026-11-27", "10.5.2026", "3.14159265358", "a@b", "1,234,567,890"],
)
def test_other_numbers_and_signs_are_neither(text):
    assert found(Row(7, "Who?", f"It was {text} of them.")) == {}


def test_rows_in_another_language_than_most_are_found():
    some = [
        Row(1, "Why?", TEXT),
        Row(2, "When?", f"{TEXT} That is the rule."),
        Row(3, "Warum?", GERMAN),
        Row(4, "Hm", "ok"),
    ]
    assert (language(TEXT), language(GERMAN), language("ok")) == ("en", "de", None)
    assert found(*some)["are in another language than most"][:2] == (1, (3,))


def test_labels_are_counted_and_rare_ones_named():
    balanced = rows(*["yes", "no"] * 15)
    assert found(*balanced) == {"answers are labels: yes 15, no 15": (30, (2,), "they are balanced")}
    rare = rows(*["yes"] * 27, *["no"] * 3)
    assert found(*rare)["answers are labels: yes 27, no 3"] == (
        30, (28,), "add rows of the rare ones, or leave out some of the others"
    )  # fmt: skip


def test_rows_that_cannot_be_used_are_found_by_reason(rows_file):
    data = str(rows_file([{"instruction": f"q{i}", "response": "a" if i else ""} for i in [*range(30), *[0] * 9]]))
    words, findings = check_source(Settings(data=data))
    assert words == f"{data}: 29 rows can be used"
    assert findings[0][:3] == ("cannot be used: response is empty", 10, (1, 31, 32, 33, 34))
    assert findings[0].cells()[2:] == ("rows 1, 31, 32, 33, 34, …", "write one, or leave the row out")
    assert found(rejected=[Rejected(3, "is odd")]) == {"cannot be used: is odd": (1, (3,), "correct them")}
