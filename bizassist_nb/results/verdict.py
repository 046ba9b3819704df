"""Did it help? Losses of base and tuned compared row by row, with the uncertainty that so few rows leave."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from bizassist_nb.results.degeneration import PENALTY
from bizassist_nb.runs.records import (
    AnswerCounts,
    Category,
    Compared,
    Forgetting,
    Judged,
    Losses,
    Result,
    RowLosses,
    Verdict,
)

_RESAMPLES: Final = 10_000
_DRAWN: Final = 2_000_000
"""Rows drawn at once in the bootstrap, for memory's sake."""
_TIE: Final = 0.01
"""Nats a token: a row whose loss changes by less, which is 1 % of perplexity, is a tie."""
MARGIN: Final = 0.02
"""Nats a token, 2 % of perplexity: the least change that matters in practice."""
FEWEST: Final = 12
"""With fewer rows it is never known: the interval of so few is too narrow too often."""
METHOD: Final = (
    f"Changes within ± {MARGIN} nats (2 % of perplexity) make no practical difference. The 95 % interval comes from a "
    f"bootstrap over rows, those of one context together; with fewer than {FEWEST} rows or contexts nobody can tell."
)

_OPENINGS: Final[Mapping[Verdict, str]] = {
    "helped": "Fine-tuning helped",
    "helped, at a cost": "Fine-tuning helped, at a cost (general questions got worse)",
    "no difference": "Fine-tuning made no practical difference",
    "can't tell yet": "Can't tell yet whether fine-tuning helped",
    "hurt": "Fine-tuning hurt",
}
_PROMPTED: Final[Mapping[Verdict, str]] = {
    "helped": ", beyond a prompt with {}: {} nats ({} to {})",
    "no difference": ", but a prompt with {} does as well: {} nats ({} to {})",
    "can't tell yet": "; whether more than a prompt with {}, nobody can tell yet: {} nats ({} to {})",
    "hurt": ", but a prompt with {} does better: {} nats ({} to {})",
}
"""What a run that helped is held against: base with training rows as examples in its prompt."""
_GENERAL: Final[Mapping[Verdict, str]] = {
    "helped": "it got better",
    "no difference": "nothing that matters in practice was lost",
    "can't tell yet": "nobody can tell yet",
    "hurt": "it got worse",
}


@dataclasses.dataclass(frozen=True)
class Score:
    """One row's loss under one model."""

    row: int
    """Its number in the source."""
    nats: float
    """Negative log-likelihood of the answer, summed over its tokens."""
    tokens: int
    """Tokens of the answer, its end token included."""
    category: str = ""


def mean_loss(scores: Sequence[Score]) -> float:
    """Nats an answer token, every token counting the same."""
    return sum(score.nats for score in scores) / sum(score.tokens for score in scores)


def judge(
    base: Sequence[Score],
    tuned: Sequence[Score],
    *,
    seed: int,
    questions: Mapping[int, str] | None = None,
    groups: Mapping[int, str] | None = None,
) -> Judged:
    """The two models' losses on the same rows, compared; the interval comes from a bootstrap over groups of rows.

    `questions` and `groups` are those of the rows, by number; without groups each row is one.

    Raises:
        ValueError: for fewer than two rows, or for unequally many.
    """
    paired = list(zip(base, tuned, strict=True))
    compared = _compared(paired)
    of = [(groups or {}).get(score.row, str(score.row)) for score in base]
    low, high, standard_error = _interval(paired, of, seed)
    names = sorted({b.category for b in base})
    by_category = [(name, _compared([pair for pair in paired if pair[0].category == name])) for name in names]
    return Judged(
        **msgspec.structs.asdict(compared),
        interval=(low, high),
        standard_error=standard_error,
        verdict=_verdict(low, high, len(set(of))),
        groups=len(set(of)),
        categories=[Category(category=name, **msgspec.structs.asdict(one)) for name, one in by_category]
        if len(names) > 1
        else [],
        rows=[_row_losses(*pair, (questions or {}).get(pair[0].row, "")) for pair in paired],
    )


def _row_losses(base: Score, tuned: Score, question: str) -> RowLosses:
    return RowLosses(
        row=base.row,
        category=base.category,
        question=question,
        tokens=base.tokens,
        base=base.nats / base.tokens,
        tuned=tuned.nats / tuned.tokens,
    )


def _verdict(low: float, high: float, groups: int) -> Verdict:
    """What the interval tells: an equivalence test (Schuirmann 1987: two one-sided tests) before one for a change."""
    if groups < FEWEST:
        return "can't tell yet"
    if low > -MARGIN and high < MARGIN:
        return "no difference"
    return "helped" if high < 0 else "hurt" if low > 0 else "can't tell yet"


def rows_needed(found: Judged) -> int:
    """About how many rows would tell, if they differ as these do: the interval shrinks by the root of their number."""
    low, high = found.interval
    telling = max(abs(found.difference), MARGIN - abs(found.difference))  # to leave out 0, or to lie within the margin
    rows, groups = found.base.rows, found.groups or found.base.rows
    rows = max(math.ceil(FEWEST * rows / groups), math.ceil(rows * ((high - low) / 2 / telling) ** 2), rows + 1)
    return rows if rows < 100 else math.ceil(rows / 10) * 10


def assess(
    held_out: Judged,
    general: Judged,
    answers: AnswerCounts | None,
    prompted: tuple[Judged, tuple[int, ...]] | None = None,
    forgetting: Forgetting | None = None,
) -> Result:
    """The verdict of a run, from the comparisons of its held-out and of the general rows, and its answers' faults.

    A model whose answers have broken down was hurt, whatever its loss: verdict and sentence say so. One that got worse
    at general questions, by more than the margin, helped at a cost. `prompted` is tuned compared with the prompted
    base, and the numbers of the rows in that prompt.
    """
    verdict = held_out.verdict
    if verdict == "helped" and general.verdict == "hurt" and general.difference > MARGIN:
        verdict = "helped, at a cost"
    more = f" (about {rows_needed(held_out):,} held-out rows would tell)" if verdict == "can't tell yet" else ""
    if prompted and held_out.verdict == "helped":
        more = _against_prompt(*prompted)
    sentence = f"{_OPENINGS[verdict]}{more}: held-out {_losses(held_out)}."
    judged = {name: getattr(held_out, name) for name in Judged.__struct_fields__}
    found = {**judged, "verdict": verdict, "sentence": sentence}
    notes = [f"On general questions of other kinds {_GENERAL[general.verdict]}: {_losses(general)}."]
    notes += [_forgetting_words(forgetting)] if forgetting else []
    if prompted:
        found |= {"prompted": prompted[0], "examples": prompted[1]}
        notes.append(f"Held against base with a prompt of {_examples(prompted[1])}: {_losses(prompted[0])}.")
    if answers:
        base, tuned = answers.base["sound"], answers.tuned["sound"]
        words = f"of {answers.prompts} prompts base answered {base} soundly and tuned {tuned}"
        notes.append(f"{words.capitalize()}.")
        if light := answers.penalised:
            sound = f"{light.base['sound']} and {light.tuned['sound']}"
            notes.append(f"With a repetition penalty of {PENALTY} the sound answers are {sound}.")
        if answers.verdict == "hurt":
            found |= {"verdict": "hurt", "sentence": f"Fine-tuning hurt: {words}; held-out {_losses(held_out)}."}
    return Result(**found, notes=[*notes, METHOD], general=general, answers=answers, forgetting=forgetting)


def _against_prompt(found: Judged, examples: Sequence[int]) -> str:
    change = (f"{nats:+.2f}".replace("-", "−") for nats in (found.difference, *found.interval))
    return _PROMPTED[found.verdict].format(_examples(examples), *change)


def _examples(numbers: Sequence[int]) -> str:
    return "1 example" if len(numbers) == 1 else f"{len(numbers)} examples"


def _forgetting_words(found: Forgetting) -> str:
    words = (
        f"Tuned has moved {found.kl_held_out:.3f} nats a token from base on the held-out rows and "
        f"{found.kl_general:.3f} on the general ones (KL divergence)"
    )
    if found.questions:
        words += (
            f"; of {found.questions} general questions with one answer it lost {found.right_to_wrong} that base knew, "
            f"and won {found.wrong_to_right}"
        )
    return f"{words}."


def _interval(paired: Sequence[tuple[Score, Score]], groups: Sequence[str], seed: int) -> tuple[float, float, float]:
    """(low, high, standard error) of the difference of mean losses, by bootstrap over groups of rows.

    Rows of one group are drawn together, as they are not independent (Davison & Hinkley 1997, section 3.8; Cameron,
    Gelbach & Miller 2008: the pairs cluster bootstrap); if all are of one group, rows are drawn. Its ends are
    percentiles of the resampled sets (Efron & Tibshirani 1993, chapter 13), as far out as `tail` says.
    """
    import numpy as np
    from scipy import stats

    if len(paired) < 2:
        raise ValueError(f"{len(paired)} rows leave no telling how much they differ; at least two are needed")
    places = {name: place for place, name in enumerate(dict.fromkeys(groups))}
    of = [places[name] for name in groups] if len(places) > 1 else list(range(len(paired)))
    tokens = np.bincount(of, [float(base.tokens) for base, _ in paired])
    gained = np.bincount(of, [tuned.nats - base.nats for base, tuned in paired])
    rows = len(tokens)
    if np.ptp(gained / tokens) == 0:  # every set of rows differs by the same
        return float(gained[0] / tokens[0]), float(gained[0] / tokens[0]), 0.0
    found = stats.bootstrap(
        (gained, tokens),
        lambda gained, tokens, axis: gained.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _DRAWN // rows),
        confidence_level=1 - 2 * tail(rows),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = (float(bound) for bound in found.confidence_interval)
    return low, high, float(found.standard_error)


def tail(rows: int) -> float:
    """The share of resampled sets beyond each end of the 95 % interval: less than 0.025, as the percentile interval of
    few rows is too narrow (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 3.3).
    """
    from scipy import stats

    return float(stats.norm.cdf(stats.t.ppf(0.025, rows - 1) * math.sqrt(rows / (rows - 1))))


def _compared(paired: Sequence[tuple[Score, Score]]) -> Compared:
    base, tuned = (_summary(scores) for scores in zip(*paired, strict=True))
    changes = [t.nats / t.tokens - b.nats / b.tokens for b, t in paired]
    return Compared(
        base=base,
        tuned=tuned,
        difference=tuned.loss - base.loss,
        wins=sum(change <= -_TIE for change in changes),
        ties=sum(abs(change) < _TIE for change in changes),
        losses=sum(change >= _TIE for change in changes),
    )


def _summary(scores: Sequence[Score]) -> Losses:
    loss = mean_loss(scores)
    tokens = sum(score.tokens for score in scores)
    return Losses(loss=loss, perplexity=math.exp(min(loss, 700.0)), tokens=tokens, rows=len(scores))


def _losses(found: Judged) -> str:
    low, high = found.interval
    of = f" of {found.groups} contexts" if found.groups and found.groups < found.base.rows else ""
    return (
        f"loss {found.base.loss:.3f} before and {found.tuned.loss:.3f} after, a change of {found.difference:+.3f} nats "
        f"per answer token (95 % interval {low:+.3f} to {high:+.3f}, {found.base.rows} rows{of})"
    )
