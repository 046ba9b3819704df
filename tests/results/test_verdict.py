"""The verdict: means over tokens, what so few rows leave uncertain, and what the card makes of it."""

import math

import numpy as np
import pytest

from bizassist_nb.results.verdict import Score, assess, judge, mean_loss, rows_needed
from bizassist_nb.runs import records


def scored(nats, tokens=None) -> list[Score]:
    tokens = [10] * len(nats) if tokens is None else tokens
    return [Score(i, float(n), int(t), f"c{i}") for i, (n, t) in enumerate(zip(nats, tokens, strict=True), 1)]


@pytest.fixture
def pair() -> tuple[list[Score], list[Score]]:
    """64 rows of unequal length under two models that differ a little."""
    random = np.random.default_rng(7)
    tokens = random.integers(1, 300, size=64)
    base = random.gamma(4, 0.6, size=64) * tokens
    return scored(base, tokens), scored(base + random.normal(-0.05, 0.3, size=64) * tokens, tokens)


def test_mean_loss_counts_every_token_the_same():
    assert mean_loss(scored([2.0, 30.0], [1, 9])) == pytest.approx(3.2)  # and not (2 + 30 / 9) / 2


def test_summaries_are_of_all_tokens():
    found = judge(scored([2.0, 30.0], [1, 9]), scored([1.0, 24.0], [1, 9]), seed=0)
    assert found.base == records.Losses(loss=3.2, perplexity=pytest.approx(math.exp(3.2)), tokens=10, rows=2)
    assert found.tuned == records.Losses(loss=2.5, perplexity=pytest.approx(math.exp(2.5)), tokens=10, rows=2)
    assert found.difference == pytest.approx(-0.7)


NOISE = np.resize([0.2, -0.2], 64)


def shifted(shift: float) -> dict:
    """64 rows whose loss went from 3 to 3 + shift."""
    return judge(scored(np.full(64, 30.0)), scored(30.0 + 10 * (shift + NOISE)), seed=42)


def answered(base: int, tuned: int, verdict: str) -> records.AnswerCounts:
    counts = {"base": {"sound": base}, "tuned": {"sound": tuned}}
    return records.AnswerCounts(prompts=14, max_new_tokens=64, verdict=verdict, **counts)


@pytest.mark.parametrize(
    ("shift", "verdict", "words", "forgotten"),
    [
        (-0.5, "helped", "Fine-tuning helped: held-out loss ", "it got better: "),
        (0.0, "can't tell yet", "Can't tell yet whether fine-tuning helped (about ", "nobody can tell yet: "),
        (0.5, "hurt", "Fine-tuning hurt: held-out loss ", "it got worse: "),
    ],
)
def test_verdict_follows_the_interval(shift, verdict, words, forgotten):
    found = assess(shifted(shift), shifted(shift), None)
    assert found.verdict == verdict
    assert found.sentence.startswith(words)
    assert f"held-out loss 3.000 before and {3 + shift:.3f} after, a change of {shift:+.3f} nats" in found.sentence
    assert found.sentence.endswith("64 rows).")
    low, high = found.interval
    assert low < found.difference < high
    assert (high < 0, low > 0) == (verdict == "helped", verdict == "hurt")
    assert f"On general questions of other kinds {forgotten}" in found.notes[0]


def alike(change: float, rows: int = 64) -> records.Judged:
    """Rows whose loss changed by about as much each."""
    noise = np.resize([0.001, -0.001], rows)
    return judge(scored([30.0] * rows), scored(30.0 + 10 * (change + noise)), seed=0)


@pytest.mark.parametrize(
    ("change", "rows", "verdict"),
    [
        (-0.005, 64, "no difference"),  # certain, but within the margin
        (0.005, 64, "no difference"),
        (-0.021, 64, "helped"),
        (0.021, 64, "hurt"),
        (-0.3, 12, "helped"),
        (-0.3, 11, "can't tell yet"),
        (0.0, 11, "can't tell yet"),
        (0.0, 12, "no difference"),
    ],
)
def test_a_difference_is_held_against_the_margin_and_few_rows_never_tell(change, rows, verdict):
    found = assess(alike(change, rows), alike(0.0), None)
    assert found.verdict == verdict
    assert any("within ± 0.02 nats" in note and "fewer than 12 rows" in note for note in found.notes)


def test_what_general_questions_lost_is_the_cost_of_the_help():
    found = assess(shifted(-0.5), shifted(0.5), None)
    assert found.verdict == "helped, at a cost"
    assert found.sentence.startswith("Fine-tuning helped, at a cost (general questions got worse): held-out loss 3.000")
    assert assess(shifted(-0.5), alike(0.015), None).verdict == "helped"
    assert assess(shifted(0.5), shifted(0.5), None).verdict == "hurt"


def test_as_many_rows_as_it_asks_for_do_tell():
    random = np.random.default_rng(3)

    def drawn(rows: int) -> records.Judged:
        return judge(scored([30.0] * rows), scored(30.0 + 10 * random.normal(-0.1, 0.4, rows)), seed=0)

    asked = [rows_needed(found) for found in (drawn(24) for _ in range(8)) if found.verdict == "can't tell yet"]
    assert len(asked) > 3
    told = [
        drawn(2 * rows).verdict for rows in asked
    ]  # twice as many: what 24 rows said of the change is itself unsure
    assert sum(verdict != "can't tell yet" for verdict in told) > len(told) / 2


def test_answers_that_broke_down_outweigh_a_lower_loss():
    found = assess(shifted(-0.5), shifted(0.0), answered(13, 2, "hurt"))
    assert found.verdict == "hurt"
    assert found.sentence.startswith(
        "Fine-tuning hurt: of 14 prompts base answered 13 soundly and tuned 2; held-out loss 3.000 before and 2.5"
    )


def test_sound_answers_do_not_make_up_for_a_loss_that_rose():
    assert assess(shifted(0.5), shifted(0.0), answered(2, 13, "no difference")).verdict == "hurt"


def test_rows_are_won_lost_or_alike():
    found = judge(scored([30.0] * 6), scored([20.0, 29.0, 29.95, 30.05, 31.0, 30.0]), seed=0)
    assert (found.wins, found.ties, found.losses) == (2, 3, 1)


def test_categories_are_compared_each_for_itself():
    base = [Score(1, 30.0, 10, "a"), Score(2, 10.0, 5, "b"), Score(3, 20.0, 10, "a")]
    tuned = [Score(1, 20.0, 10, "a"), Score(2, 15.0, 5, "b"), Score(3, 20.0, 10, "a")]
    a, b = judge(base, tuned, seed=0).categories
    assert (a.category, a.base.rows, a.base.loss, a.tuned.loss) == ("a", 2, 2.5, 2.0)
    assert (a.wins, a.ties, a.losses) == (1, 1, 0)
    assert (b.category, b.difference, b.losses) == ("b", 1.0, 1)
    assert judge(base[::2], tuned[::2], seed=0).categories == []  # one category says nothing that is not said


@pytest.mark.parametrize("rows", [16, 64])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rows):
    """Rows drawn 300 times from a population as wide as Dolly's: lengths are skewed, and so is what is gained."""
    random = np.random.default_rng(rows)

    def drawn(count: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.ceil(random.lognormal(4.2, 0.7, size=count))
        return tokens, tokens * (0.25 * random.exponential(size=count) - 0.35)

    tokens, gains = drawn(1_000_000)
    truth = gains.sum() / tokens.sum()
    covered = 0
    for seed in range(300):
        tokens, gains = drawn(rows)
        low, high = judge(scored(3 * tokens, tokens), scored(3 * tokens + gains, tokens), seed=seed).interval
        covered += low <= truth <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_equal_models_make_no_difference():
    found = judge(scored([3.0, 5.0] * 6), scored([3.0, 5.0] * 6), seed=1)
    assert (found.verdict, found.difference, found.interval, found.standard_error) == (
        "no difference",
        0.0,
        (0.0, 0.0),
        0.0,
    )


def test_one_great_gain_among_many_rows_is_no_verdict():
    tuned = np.full(64, 30.0)
    tuned[0] -= 29
    assert judge(scored(np.full(64, 30.0)), scored(tuned), seed=0).verdict == "can't tell yet"


def test_interval_is_decided_by_the_seed(pair):
    first = judge(*pair, seed=42)
    assert judge(*pair, seed=42) == first
    other = judge(*pair, seed=43)
    assert other.interval != first.interval
    assert other.interval == pytest.approx(first.interval, abs=0.01)
    assert other.difference == first.difference


def test_standard_error_and_interval_agree_with_other_computations(pair):
    base, tuned = pair
    found = judge(base, tuned, seed=42)
    tokens = np.array([score.tokens for score in base])
    gains = np.array([t.nats - b.nats for b, t in zip(base, tuned, strict=True)])
    # The delta method for a ratio of means (Cochran 1977, section 6.3), with no resampling in it.
    residuals = gains - found.difference * tokens
    by_formula = np.sqrt(np.mean(residuals**2) / len(base)) / tokens.mean()
    assert found.standard_error == pytest.approx(by_formula, rel=0.05)
    # A bootstrap of its own, written as a loop with another generator, read off 2 % further out: 64 rows are few.
    random = np.random.RandomState(1)
    drawn = []
    for _ in range(20_000):
        rows = random.choice(len(base), size=len(base))
        drawn.append(gains[rows].sum() / tokens[rows].sum())
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.03)
    assert found.interval == pytest.approx(np.percentile(drawn, [2.365, 97.635]), abs=0.1 * found.standard_error)


def test_rows_are_listed_one_by_one():
    base = [Score(7, 12.0, 4, "open_qa"), Score(3, 5.0, 10)]
    tuned = [Score(7, 8.0, 4, "open_qa"), Score(3, 6.0, 10)]
    assert judge(base, tuned, seed=0, questions={7: "Why?"}).rows == [
        records.RowLosses(row=7, category="open_qa", question="Why?", tokens=4, base=3.0, tuned=2.0),
        records.RowLosses(row=3, category="", question="", tokens=10, base=0.5, tuned=0.6),
    ]


def test_one_row_tells_nothing():
    with pytest.raises(ValueError, match="at least two"):
        judge(scored([3.0]), scored([2.0]), seed=0)


def test_a_loss_beyond_floats_still_has_a_perplexity():
    assert math.isfinite(judge(scored([1e5, 1e5]), scored([1e5, 1e5]), seed=0).base.perplexity)


def test_scores_of_unequally_many_rows_cannot_be_compared():
    with pytest.raises(ValueError, match="shorter"):
        judge(scored([1.0, 2.0]), scored([1.0]), seed=0)


def test_rows_of_one_context_are_resampled_together():
    """Four rows that say the same weigh as one: the interval is that of the 16 contexts, not of 64 rows."""
    tuned = 30.0 + 10 * (NOISE[:16] - 0.1)
    alone = judge(scored([30.0] * 16), scored(tuned), seed=3)
    base, repeated = scored([30.0] * 64), scored([nats for nats in tuned for _ in range(4)])
    groups = {score.row: f"report {place // 4}" for place, score in enumerate(base)}
    together = judge(base, repeated, seed=3, groups=groups)
    assert together.interval == pytest.approx(alone.interval)
    assert (together.groups, alone.groups, together.base.rows) == (16, 16, 64)
    low, high = judge(base, repeated, seed=3).interval
    assert together.interval[0] < low < high < together.interval[1]
    assert "64 rows of 16 contexts" in assess(together, alike(0.0), None).sentence
    few = {row: f"report {int(name.split()[1]) // 2}" for row, name in groups.items()}
    assert judge(base, repeated, seed=3, groups=few).verdict == "can't tell yet"  # 8 contexts, however many rows


@pytest.mark.parametrize(
    ("beyond", "words"),
    [
        (-0.2, "Fine-tuning helped, beyond a prompt with 3 examples: −0.20 nats (−0."),
        (0.0, "Fine-tuning helped, but a prompt with 3 examples does as well: "),
        (0.2, "Fine-tuning helped, but a prompt with 3 examples does better: +0.20 nats (+0."),
    ],
)
def test_the_sentence_says_whether_a_prompt_would_have_done(beyond, words):
    flat = 0.05 * NOISE
    prompted = judge(scored(np.full(64, 30.0)), scored(30.0 + 10 * (beyond + flat - flat.mean())), seed=0)
    found = assess(shifted(-0.5), alike(0.0), None, (prompted, (4, 7, 9)))
    assert found.sentence.startswith(words)
    assert (found.prompted, found.examples) == (prompted, (4, 7, 9))
    assert any(note.startswith("Held against base with a prompt of 3 examples: loss 3.000") for note in found.notes)
    hurt = assess(shifted(0.5), alike(0.0), None, (prompted, (4, 7, 9)))
    assert hurt.sentence.startswith("Fine-tuning hurt: ")


def test_what_was_forgotten_is_said():
    lost = records.Forgetting(kl_held_out=0.31, kl_general=0.12, right_to_wrong=3, wrong_to_right=1, questions=23)
    said = " ".join(assess(shifted(-0.5), alike(0.0), None, None, lost).notes)
    assert "moved 0.310 nats a token from base on the held-out rows and 0.120 on the general ones" in said
    assert "of 23 general questions with one answer it lost 3 that base knew, and won 1" in said
