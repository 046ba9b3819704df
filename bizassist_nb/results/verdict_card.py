"""The verdict card: what evaluation.json says, as sections that every view shows in its own way."""

from collections.abc import Sequence
from typing import Any, Final

from bizassist_nb.core.rendering import Section
from bizassist_nb.results.degeneration import SIGNS
from bizassist_nb.runs.run import ENDED, RunDirectory

_EXTREMES: Final = 5
"""Rows listed as most improved, and as most damaged."""
_EXCERPT: Final = 160
"""Characters of a question that are shown."""


def sections(run: RunDirectory) -> list[Section]:
    """The card, most important first; empty before there are scores. Only the first is shown unfolded."""
    found = run.evaluation
    if found is None:
        return []
    improved = sorted((row for row in found["rows"] if row["tuned"] < row["base"]), key=_gain)
    damaged = sorted((row for row in found["rows"] if row["tuned"] > row["base"]), key=_gain, reverse=True)
    return [
        _summary(run, found),
        *_categories("By category", found["categories"]),
        *_rows(f"The {min(_EXTREMES, len(improved))} most improved rows", improved),
        *_rows(f"The {min(_EXTREMES, len(damaged))} most damaged rows", damaged),
        *_categories("General rows, by kind", found["general"]["categories"]),
        *_answers(run, found["answers"]),
    ]


def rising(run: RunDirectory) -> str | None:
    """That held-out loss rises while training, or that the run has saved an earlier adapter for it; None otherwise."""
    if kept := run.last("kept"):
        return f"The adapter saved is that of step {kept['step']}, the best on the held-out rows."
    scored = run.held_out
    if len(scored) < 2:
        return None
    (_, base), (newest, loss) = scored[0], scored[-1]
    step, least = min(scored[1:], key=lambda pair: pair[1])
    if step < newest and least < loss:
        where = f" in {run.path / 'best'}" if run.status in ENDED else ""
        advice = "the run will save it" if run.settings.keep == "best" else 'keep = "best" has a run save it'
        return (
            f"Held-out loss has risen since step {step} ({least:.3f}, now {loss:.3f}); the best checkpoint is kept"
            f"{where} ({advice})."
        )
    return f"Held-out loss is above the base's ({base:.3f}, now {loss:.3f})." if loss > base else None


def _summary(run: RunDirectory, found: dict[str, Any]) -> Section:
    lines = [found["sentence"], *found["notes"]]
    if words := rising(run):
        lines.append(words)
    if found["answers"] is None and (missing := run.last("unanswered")):
        lines.append(missing["reason"])
    rows = [*_loss_rows("held-out", found), *_loss_rows("general", found["general"])]
    if answers := found["answers"]:
        of = answers["prompts"]
        kinds = {"sound": "are sound", "stopped": f"stop within {answers['max_new_tokens']} tokens", **SIGNS}
        rows += [
            (f"answers that {words}", *(f"{answers[who][kind]} of {of}" for who in ("base", "tuned")), "")
            for kind, words in kinds.items()
        ]
    return Section("Did it help?", tuple(lines), ("", "base", "tuned", "change"), tuple(rows))


def _loss_rows(kind: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    base, tuned = found["base"], found["tuned"]
    low, high = found["interval"]
    return [
        (
            f"{kind} loss, nats a token ({base['rows']} rows)",
            f"{base['loss']:.3f}",
            f"{tuned['loss']:.3f}",
            f"{found['difference']:+.3f} ({low:+.3f} to {high:+.3f})",
        ),
        (
            f"{kind} perplexity",
            f"{base['perplexity']:.4g}",
            f"{tuned['perplexity']:.4g}",
            f"× {tuned['perplexity'] / base['perplexity']:.3g}",
        ),
        (f"{kind} rows", "", "", f"{found['wins']} better, {found['ties']} alike, {found['losses']} worse"),
    ]


def _categories(title: str, found: Sequence[dict[str, Any]]) -> list[Section]:
    if not found:
        return []
    rows = [
        (
            one["category"] or "(none)",
            str(one["base"]["rows"]),
            f"{one['base']['loss']:.3f}",
            f"{one['tuned']['loss']:.3f}",
            f"{one['difference']:+.3f}",
            f"{one['wins']} better, {one['ties']} alike, {one['losses']} worse",
        )
        for one in sorted(found, key=lambda one: one["difference"])
    ]
    return [Section(title, (), ("category", "rows", "base", "tuned", "change", "by row"), tuple(rows), folded=True)]


def _rows(title: str, found: Sequence[dict[str, Any]]) -> list[Section]:
    rows = tuple(
        (
            str(row["row"]),
            row["question"] if len(row["question"]) <= _EXCERPT else row["question"][: _EXCERPT - 1] + "…",
            f"{row['base']:.3f}",
            f"{row['tuned']:.3f}",
            f"{_gain(row):+.3f}",
        )
        for row in found[:_EXTREMES]
    )
    head = ("row", "question", "base", "tuned", "change")
    return [Section(title, (), head, rows, folded=True, private=True)] if rows else []


def _answers(run: RunDirectory, counts: dict[str, Any] | None) -> list[Section]:
    if counts is None:
        return []
    rows = tuple((one["prompt"], *(_answer(one[who]) for who in ("base", "tuned"))) for one in run.answers)
    title = f"The answers to the fixed prompts (greedy, {counts['max_new_tokens']} tokens at most)"
    return [Section(title, (), ("prompt", "base", "tuned"), rows, folded=True, private=True)]


def _answer(answer: dict[str, Any]) -> str:
    faults = ", ".join(answer["signs"])
    return f"{f'[{faults}] ' if faults else ''}{answer['text']}{'' if answer['stopped'] else ' …'}"


def _gain(row: dict[str, Any]) -> float:
    return float(row["tuned"] - row["base"])
