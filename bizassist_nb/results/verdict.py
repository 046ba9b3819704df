"""Did it help? Losses of base and tuned compared row by row, with the uncertainty that so few rows leave."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

_RESAMPLES: Final = 10_000
_DRAWN: Final = 2_000_000
"""Rows drawn at once in the bootstrap, for memory's sake."""
_TIE: Final = 0.01
"""Nats a token: less than this, a change of perplexity by 1 %, is a tie of the row, and no difference of the whole."""


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
    base: Sequence[Score], tuned: Sequence[Score], *, seed: int, questions: Mapping[int, str] | None = None
) -> dict[str, Any]:
    """The two models' losses on the same rows, compared.

    "base" and "tuned": "loss" (nats an answer token), "perplexity", "tokens", "rows"; "difference" (tuned - base) with
    "interval" (95 %) and "standard_error" by bootstrap over rows; "wins", "ties" and "losses" of tuned, by row;
    "verdict" ("helped", "no difference", "hurt"), the "categories" and the "rows" one by one, with their questions.

    Raises:
        ValueError: for fewer than two rows, or for unequally many.
    """
    paired = list(zip(base, tuned, strict=True))
    compared = _compared(paired)
    low, high, standard_error = _interval(base, tuned, seed)
    telling = abs(compared["difference"]) >= _TIE
    categories = dict.fromkeys(b.category for b in base)
    return {
        **compared,
        "interval": [low, high],
        "standard_error": standard_error,
        "verdict": "helped" if high < 0 and telling else "hurt" if low > 0 and telling else "no difference",
        "categories": [
            {"category": name, **_compared([pair for pair in paired if pair[0].category == name])}
            for name in sorted(categories)
        ]
        if len(categories) > 1
        else [],
        "rows": [_row(b, t, (questions or {}).get(b.row, "")) for b, t in paired],
    }


def _row(base: Score, tuned: Score, question: str) -> dict[str, Any]:
    return {
        "row": base.row,
        "category": base.category,
        "question": question,
        "tokens": base.tokens,
        "base": base.nats / base.tokens,
        "tuned": tuned.nats / tuned.tokens,
    }


def assess(held_out: dict[str, Any], general: dict[str, Any], answers: dict[str, Any] | None) -> dict[str, Any]:
    """What evaluation.json holds: the held-out rows' comparison, "general" and "answers" beside it, and the verdict.

    `held_out` and `general` come from `judge`, `answers` from `results.degeneration.counted` (None where there are
    none). A model whose answers have broken down was hurt, whatever its loss: "verdict" and "sentence" say so.
    "notes" are sentences on what was forgotten, and on the answers.
    """
    verdict, sentence = held_out["verdict"], _sentence(held_out)
    if answers and answers["verdict"] == "hurt":
        verdict = "hurt"
        sentence = f"Fine-tuning hurt: {_answers_words(answers)}; {_figures(held_out)}."
    notes = [_general_sentence(general)]
    if answers:
        notes.append(_answers_sentence(answers))
    return {
        **held_out,
        "verdict": verdict,
        "sentence": sentence,
        "notes": notes,
        "general": general,
        "answers": answers,
    }


def _interval(base: Sequence[Score], tuned: Sequence[Score], seed: int) -> tuple[float, float, float]:
    """(low, high, standard error) of the difference of mean losses, by bootstrap over rows.

    Percentiles of resampled sets of rows (Efron & Tibshirani 1993, chapter 13), taken further out by the factor that
    the percentile interval of few rows is too narrow by (Hesterberg 2015, "What Teachers Should Know About the
    Bootstrap", section 3.3: the expanded percentile interval).
    """
    import numpy as np
    from scipy import stats

    rows = len(base)
    if rows < 2:
        raise ValueError(f"{rows} rows leave no telling how much they differ; at least two are needed")
    tokens = np.array([score.tokens for score in base], dtype=np.float64)
    gained = np.array([t.nats - b.nats for b, t in zip(base, tuned, strict=True)])
    if np.ptp(gained / tokens) == 0:  # every set of rows differs by the same
        return float(gained[0] / tokens[0]), float(gained[0] / tokens[0]), 0.0
    expanded = stats.norm.cdf(stats.t.ppf(0.025, rows - 1) * math.sqrt(rows / (rows - 1)))
    found = stats.bootstrap(
        (gained, tokens),
        lambda gained, tokens, axis: gained.sum(axis) / tokens.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=max(1, _DRAWN // rows),
        confidence_level=1 - 2 * float(expanded),
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = (float(bound) for bound in found.confidence_interval)
    return low, high, float(found.standard_error)


def _compared(paired: Sequence[tuple[Score, Score]]) -> dict[str, Any]:
    base, tuned = (_summary(scores) for scores in zip(*paired, strict=True))
    changes = [t.nats / t.tokens - b.nats / b.tokens for b, t in paired]
    return {
        "base": base,
        "tuned": tuned,
        "difference": tuned["loss"] - base["loss"],
        "wins": sum(change <= -_TIE for change in changes),
        "ties": sum(abs(change) < _TIE for change in changes),
        "losses": sum(change >= _TIE for change in changes),
    }


def _summary(scores: Sequence[Score]) -> dict[str, float]:
    loss = mean_loss(scores)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": sum(score.tokens for score in scores),
        "rows": len(scores),
    }


def _sentence(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    if found["verdict"] == "no difference" and not low <= 0 <= high:
        return f"Fine-tuning made no practical difference (less than 1 % of perplexity): {_figures(found)}."
    opening = {
        "helped": "Fine-tuning helped",
        "no difference": "Fine-tuning made no measurable difference",
        "hurt": "Fine-tuning hurt",
    }[found["verdict"]]
    return f"{opening}: {_figures(found)}."


def _figures(found: Mapping[str, Any]) -> str:
    return (
        f"held-out loss {found['base']['loss']:.3f} before and {found['tuned']['loss']:.3f} after, a change of "
        f"{_change(found)}"
    )


def _change(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return (
        f"{found['difference']:+.3f} nats per answer token "
        f"(95 % interval {low:+.3f} to {high:+.3f}, {found['base']['rows']} rows)"
    )


def _general_sentence(found: Mapping[str, Any]) -> str:
    opening = {
        "helped": "On general questions of other kinds it got better, too",
        "no difference": "On general questions of other kinds nothing measurable was lost",
        "hurt": "On general questions of other kinds it got worse",
    }[found["verdict"]]
    losses = f"loss {found['base']['loss']:.3f} before and {found['tuned']['loss']:.3f} after"
    return f"{opening}: {losses}, a change of {_change(found)}."


def _answers_sentence(answers: Mapping[str, Any]) -> str:
    words = _answers_words(answers)
    return f"{words[0].upper()}{words[1:]}."


def _answers_words(answers: Mapping[str, Any]) -> str:
    sound = {who: answers[who]["sound"] for who in ("base", "tuned")}
    return f"of {answers['prompts']} fixed prompts base answered {sound['base']} soundly and tuned {sound['tuned']}"
