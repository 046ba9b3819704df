"""The verdict card: sections made from evaluation.json; a notebook, a terminal and a model card all show them."""

from collections.abc import Sequence
from typing import Final

from bizassist_nb.core.errors import cut
from bizassist_nb.core.rendering import Section, losses
from bizassist_nb.results.ballot import tally
from bizassist_nb.results.degeneration import SIGNS
from bizassist_nb.results.verdict_figure import opening
from bizassist_nb.runs import records
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
    rows = sorted(found.rows, key=lambda row: row.tuned - row.base)
    card = [
        _summary(run, found),
        _categories("By category", found.categories),
        _rows("improved", [row for row in rows if row.tuned < row.base]),
        _rows("damaged", [row for row in reversed(rows) if row.tuned > row.base]),
        _categories("General questions, by kind", found.general.categories),
        *_answers(run, found.answers),
    ]
    return [section for section in card if section.rows]


def rising(run: RunDirectory) -> str | None:
    """A sentence if held-out loss rises in training, or if the run has saved the best adapter; None otherwise."""
    if best := run.last(records.Kept):
        return f"The adapter saved is that of step {best.step}, the best on the held-out rows."
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


def _summary(run: RunDirectory, found: records.Result) -> Section:
    lines = [found.sentence, *found.notes]
    if words := rising(run):
        lines.append(words)
    if found.answers is None and (missing := run.last(records.Unanswered)):
        lines.append(missing.reason)
    if (votes := tally(run)).cast:
        lines.append(votes.sentence)
    rows = [*_loss_rows("held-out", found), *_loss_rows("general", found.general)]
    if found.prompted:
        rows += _loss_rows(f"base with {len(found.examples)} examples in its prompt: held-out", found.prompted)[:1]
    if votes.decided:
        low, high = votes.interval
        rows.append(("blind votes won", str(votes.losses), str(votes.wins), f"{low:.0%} to {high:.0%} for tuned"))
    if answers := found.answers:
        of = answers.prompts
        kinds = {"sound": "are sound", "stopped": f"stop within {answers.max_new_tokens} tokens", **SIGNS}
        rows += [
            (f"answers that {words}", *(f"{each.get(kind, 0)} of {of}" for each in (answers.base, answers.tuned)), "")
            for kind, words in kinds.items()
        ]
    return Section("Did it help?", lines, ("", "base", "tuned", "change"), rows, opening=opening(found))


def _loss_rows(kind: str, found: records.Judged) -> list[tuple[str, ...]]:
    base, tuned, change = losses(found.base.loss, found.tuned.loss)
    low, high = found.interval
    before, after = found.base.perplexity, found.tuned.perplexity
    return [
        (f"{kind} loss, nats a token ({found.base.rows} rows)", base, tuned, f"{change} ({low:+.3f} to {high:+.3f})"),
        (f"{kind} perplexity", f"{before:.4g}", f"{after:.4g}", f"× {after / before:.3g}"),
        (f"{kind} rows", "", "", found.by_row),
    ]


def _categories(title: str, found: Sequence[records.Category]) -> Section:
    rows = [
        (one.category or "(none)", str(one.base.rows), *losses(one.base.loss, one.tuned.loss), one.by_row)
        for one in sorted(found, key=lambda one: one.difference)
    ]
    return Section(title, (), ("category", "rows", "base", "tuned", "change", "by row"), rows, folded=True)


def _rows(which: str, found: Sequence[records.RowLosses]) -> Section:
    rows = [(str(row.row), cut(row.question, _EXCERPT), *losses(row.base, row.tuned)) for row in found[:_EXTREMES]]
    head = ("row", "question", "base", "tuned", "change")
    return Section(f"The {len(rows)} most {which} rows", (), head, rows, folded=True, private=True)


def _answers(run: RunDirectory, counts: records.AnswerCounts | None) -> list[Section]:
    if counts is None:
        return []
    rows = [(one.prompt, _answer(one.base), _answer(one.tuned)) for one in run.answers]
    title = f"The answers to the fixed prompts (greedy, {counts.max_new_tokens} tokens at most)"
    return [Section(title, (), ("prompt", "base", "tuned"), rows, folded=True, private=True)]


def _answer(answer: records.Answer) -> str:
    faults = ", ".join(answer.signs)
    return f"{f'[{faults}] ' if faults else ''}{answer.text}{'' if answer.stopped else ' …'}"
