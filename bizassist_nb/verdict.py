"""Did it help? Held-out losses of base and tuned compared, with the uncertainty that so few rows leave."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_RESAMPLES: Final = 10_000


@dataclasses.dataclass(frozen=True)
class Score:
    """One held-out row's loss under one model."""

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


def compare(base: Sequence[Score], tuned: Sequence[Score], *, seed: int) -> dict[str, Any]:
    """What evaluation.json holds.

    "base" and "tuned": "loss" (nats an answer token), "perplexity", "tokens", "rows"; "difference" (tuned - base) with
    "interval" (95 %) and "standard_error" by bootstrap over rows (Efron & Tibshirani 1993, chapters 6 and 13);
    "verdict" ("helped", "no difference", "hurt"), the same in a "sentence", and "rows" one by one.
    """
    difference = mean_loss(tuned) - mean_loss(base)
    resampled = _bootstrap(base, tuned, seed)
    low, high = (float(bound) for bound in np.quantile(resampled, [0.025, 0.975]))
    verdict = "helped" if high < 0 else "hurt" if low > 0 else "no difference"
    return {
        "base": _summary(base),
        "tuned": _summary(tuned),
        "difference": difference,
        "interval": [low, high],
        "standard_error": float(np.std(resampled, ddof=1)),
        "verdict": verdict,
        "sentence": _sentence(verdict, mean_loss(base), mean_loss(tuned), low, high, len(base)),
        "rows": [
            {
                "row": b.row,
                "category": b.category,
                "tokens": b.tokens,
                "base": b.nats / b.tokens,
                "tuned": t.nats / t.tokens,
            }
            for b, t in zip(base, tuned, strict=True)
        ],
    }


def _bootstrap(base: Sequence[Score], tuned: Sequence[Score], seed: int) -> npt.NDArray[np.float64]:
    """Differences of mean loss over resampled sets of rows; shape (_RESAMPLES,)."""
    tokens = np.array([score.tokens for score in base], dtype=np.float64)
    gained = np.array([t.nats - b.nats for b, t in zip(base, tuned, strict=True)])
    random = np.random.default_rng(seed)
    parts = []
    for _ in range(_RESAMPLES // 100):  # a hundred at a time, for memory's sake
        drawn = random.integers(len(base), size=(100, len(base)))
        parts.append(gained[drawn].sum(axis=1) / tokens[drawn].sum(axis=1))
    return np.concatenate(parts)


def _summary(scores: Sequence[Score]) -> dict[str, float]:
    loss = mean_loss(scores)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": sum(score.tokens for score in scores),
        "rows": len(scores),
    }


def _sentence(verdict: str, base: float, tuned: float, low: float, high: float, rows: int) -> str:
    figures = (
        f"held-out loss {base:.3f} before and {tuned:.3f} after, a change of {tuned - base:+.3f} nats per answer token "
        f"(95 % interval {low:+.3f} to {high:+.3f}, {rows} rows)"
    )
    opening = {
        "helped": "Fine-tuning helped",
        "no difference": "Fine-tuning made no measurable difference",
        "hurt": "Fine-tuning hurt",
    }[verdict]
    return f"{opening}: {figures}."
