"""Signs of a breakdown in answers: found where they are, and not in what people wrote."""

import pytest

from bizassist_nb.data.rows import read_table
from bizassist_nb.results.degeneration import SIGNS, counted, endless, prompts, repetition, signs
from bizassist_nb.runs import records

PROMPT = "How should we price a new analytics add-on for customers who already pay for the main product?"
GOOD = (
    "Start from what the add-on is worth to a customer in a month. Ask ten of them what they do by hand today, and set "
    "the price at a tenth of what that costs them."
)


@pytest.fixture
def signs_of(chat):
    def found(answer: str, prompt: str = PROMPT) -> list[str]:
        return signs(prompt, answer, chat.tokenizer.encode(answer, add_special_tokens=False))

    return found


def test_a_good_answer_has_none(signs_of):
    assert signs_of(GOOD) == []


@pytest.mark.parametrize(
    ("answer", "sign"),
    [
        ("", "empty"),
        (" \n\n - ** …", "empty"),
        (PROMPT, "repeats"),
        (PROMPT.upper() + "\n\nWell, " + GOOD, "repeats"),
        (f"The question is: {PROMPT} Answer it.", "repeats"),
        ("We should ask our customers first. " * 6, "loops"),
        (GOOD + " And then," + " and then we ask again," * 12, "loops"),
        ("!" * 60 + "a", "loops"),
        ("Wir sollten zuerst unsere Kunden fragen, was ihnen die neue Funktion im Monat wert ist.", "language"),
        ("Nous devrions d'abord demander à nos clients combien ils paieraient chaque mois.", "language"),
    ],
)
def test_each_breakdown_shows_its_sign(signs_of, answer, sign):
    assert signs_of(answer) == [sign]


def test_the_answer_may_take_up_words_of_the_question(signs_of):
    assert signs_of(f"To price a new analytics add-on for customers who already pay, do this. {GOOD}") == []


@pytest.mark.parametrize("answer", ["Yes.", "42", "ROI, KPI, NPS", "a * b + c", "1. Price\n2. Scope"])
def test_a_short_answer_has_no_language_to_leave(signs_of, answer):
    assert signs_of(answer) == []


def test_repetition_is_the_share_of_4_grams_seen_before():
    assert repetition(range(100)) == 0
    assert repetition([1, 2, 3, 4] * 5) == pytest.approx(1 - 4 / 17)
    assert repetition([7] * 15) == 0  # too few tokens to tell


def test_the_prompts_are_fixed_english_and_no_training_rows():
    assert len(prompts()) == len(set(prompts())) >= 12
    assert not set(prompts()) & {row.instruction for row in read_table("sample").rows}
    for prompt in prompts():
        assert "language" in signs(prompt, "Wir fragen zuerst unsere Kunden und dann die Verkäufer im Außendienst.", [])


def test_answers_that_people_wrote_have_hardly_any(dolly, chat):
    rows = [row for row in read_table("dolly").rows[::30] if row.category != "classification"]
    found = [
        signs(row.instruction, row.response, chat.tokenizer.encode(row.response, add_special_tokens=False)[:128])
        for row in rows
    ]
    assert len(rows) > 400
    for sign in SIGNS:
        assert sum(sign in one for one in found) / len(rows) < 0.02, sign


def given(base: list[str], tuned: list[str]) -> list[records.Answers]:
    return [
        records.Answers(
            prompt="p",
            base=records.Answer(text="b", stopped=True, signs=b.split()),
            tuned=records.Answer(text="t", stopped=False, signs=t.split()),
        )
        for b, t in zip(base, tuned, strict=True)
    ]


def test_signs_are_counted():
    found = counted(given(["", "loops", ""], ["loops language", "", "empty"]), 64)
    assert (found.prompts, found.max_new_tokens) == (3, 64)
    assert found.base == {"stopped": 3, "repeats": 0, "loops": 1, "empty": 0, "language": 0, "endless": 0, "sound": 2}
    assert found.tuned == {"stopped": 0, "repeats": 0, "loops": 1, "empty": 1, "language": 1, "endless": 0, "sound": 1}


@pytest.mark.parametrize(
    ("base", "tuned", "verdict"),
    [
        ([""] * 14, [""] * 14, "no difference"),
        ([""] * 14, ["loops"] * 4 + [""] * 10, "no difference"),  # 4 of 4 the same way: p = 1/16
        ([""] * 14, ["loops"] * 5 + [""] * 9, "hurt"),  # 5 of 5: p = 1/32
        (["loops"] * 6 + [""] * 8, [""] * 14, "no difference"),  # only harm is looked for
        (["loops"] * 3 + [""] * 11, [""] * 3 + ["loops"] * 6 + [""] * 5, "no difference"),
    ],
)
def test_only_more_breakdowns_than_chance_gives_are_a_verdict(base, tuned, verdict):
    assert counted(given(base, tuned), 64).verdict == verdict


def test_an_answer_without_end_is_a_sign_where_the_limit_is_long_enough_to_tell():
    ended, cut = (records.Answer(text="a", stopped=stopped, signs=[]) for stopped in (True, False))
    assert endless(ended, cut, learned=0.2)
    assert not endless(ended, cut, learned=0.3)  # answers as long as the limit were learned
    assert not endless(cut, cut, learned=0.2)  # base needs more room, too
    assert not endless(ended, ended, learned=0.2)


def test_answers_with_a_light_penalty_are_counted_beside():
    sound, loops = (records.Answer(text="a", stopped=True, signs=signs) for signs in ([], ["loops"]))
    greedy = [records.Answers(prompt="p", base=sound, tuned=loops, penalised=(sound, sound)) for _ in range(14)]
    found = counted(greedy, 64)
    assert (found.verdict, found.tuned["sound"], found.tuned["loops"]) == ("hurt", 0, 14)
    assert (found.penalised.verdict, found.penalised.tuned["sound"]) == ("no difference", 14)
    before = [records.Answers(prompt="p", base=sound, tuned=sound)]
    assert counted(before, 64).penalised is None  # of a run made before
