"""A question with the answers of base and tuned, how they look, and a conversation of several."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bizassist_nb.assistant.differences import LEGEND, marked
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A question and the answers to it."""

    question: str
    answers: dict[str, str]
    """By who gave them, in the order of the columns: "base", "tuned", "prompted"; "tuned (NAME)" with several runs."""
    runs: tuple[str, ...] = ()
    """Names of the runs whose adapters answered."""
    strength: float = 1.0
    """What the tuned answers' adapters were multiplied by."""
    cut: tuple[str, ...] = ()
    """Names of those whose answer was cut off at the limit."""
    note: str | None = None
    """What the reader should know about how these answers came to be."""
    model: str = ""
    """Name of the base."""
    limit: int = 0
    """Tokens that an answer could have."""
    figures: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
    """Of each answer its length, its speed, and how full the context is, in words."""

    @property
    def base(self) -> str | None:
        """The base's answer; None if it was not asked."""
        return self.answers.get(BASE)

    @property
    def tuned(self) -> str | None:
        """The (first) tuned model's answer; None if none was asked, or there is none."""
        return next((text for name, text in self.answers.items() if name not in (BASE, PROMPTED)), None)

    @property
    def heads(self) -> list[str]:
        """What stands above each answer."""
        return [", ".join(filter(None, [self.head(name), self.end(name)])) for name in self.answers]

    def head(self, name: str) -> str:
        """Who that is, with the base's name (of a folder its last part), or the run and the strength."""
        head = f"{name} ({self.runs[0]})" if name == TUNED and self.runs else name
        if name == BASE and self.model:
            head += f" ({self.model.rpartition('/')[2]})"
        if name not in (BASE, PROMPTED) and self.strength != 1:
            head += f", strength {self.strength:g}"
        return head

    def end(self, name: str) -> str:
        """Why the answer ended, unless the model ended it."""
        return f"stopped at the limit of {self.limit:,} tokens" if name in self.cut else ""

    def unfinished(self) -> "Comparison":
        """The same with a note that these answers were interrupted."""
        notes = filter(None, [self.note, "Interrupted: these answers are not complete."])
        return dataclasses.replace(self, note=" ".join(notes))

    def to_dict(self) -> dict[str, Any]:
        """Question, each answer, and how they came to be, in one flat record: a row of a data frame."""
        record = {"question": self.question, **self.answers}
        return record | {"runs": list(self.runs), "strength": self.strength, "cut": list(self.cut), "note": self.note}

    def __repr__(self) -> str:
        answers = zip(self.heads, self.answers.values(), strict=True)
        parts = [f"Question: {self.question}", *(f"--- {head} ---\n{text}" for head, text in answers)]
        return printable("\n\n".join([*parts, *filter(None, [self.note])]))

    def _repr_html_(self) -> str:
        return comparison_html(self, finished=True)

    def _repr_markdown_(self) -> str:
        """For documents: question and answers as blocks of plain text, in which no Markdown of theirs takes effect."""
        answers = zip(self.heads, self.answers.values(), strict=True)
        parts = [f"**{rendering.plain_markdown(head)}**\n\n{_block(text)}" for head, text in answers]
        note = [rendering.plain_markdown(self.note)] if self.note else []
        return "\n\n".join([_block(self.question), *parts, *note])


class Comparisons(tuple[Comparison, ...]):
    """Answers to several questions, one row each."""

    __slots__ = ()

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by name, as `pandas.DataFrame` takes them."""
        records = [comparison.to_dict() for comparison in self]
        return {key: [record[key] for record in records] for key in (records[0] if records else ())}

    def __repr__(self) -> str:
        return "\n\n".join(map(repr, self))

    def page(self, *, finished: bool) -> str:
        """A table; once they are finished the differing words can be unfolded."""
        heads = ["question", *(self[0].head(name) for name in self[0].answers)] if self else ["question"]
        rows = list(map(_cells, self))
        return rendering.untypeset(_columns(heads, rows, 1) if finished else rendering.grid(heads, *rows))

    def _repr_html_(self) -> str:
        return self.page(finished=True)


def comparison_html(comparison: Comparison, *, finished: bool) -> str:
    """Answers in adjacent columns, with the differing words to be unfolded once they are finished."""
    note = f"<i>{rendering.plain(comparison.note)}</i>" if comparison.note else ""
    bodies = [*map(rendering.markdown, comparison.answers.values())]
    body = _columns(comparison.heads, [bodies]) if finished else rendering.grid(comparison.heads, bodies)
    return rendering.untypeset(f"<b>{rendering.plain(comparison.question)}</b>{body}{note}")


def _columns(heads: Sequence[str], rows: list[list[str]], first: int = 0) -> str:
    """Columns and, where words differ between those from `first` on, the same with marks, which a reader unfolds."""
    grid, words = rendering.grid(heads, *rows), [[*row[:first], *_marked(row[first:])] for row in rows]
    if words == rows:
        return grid
    # Marks that a style switches would not do: JupyterLab takes styles out of a notebook that it does not trust.
    return grid + rendering.folded("show which words differ", LEGEND + rendering.grid(heads, *words))


def _cells(comparison: Comparison) -> list[str]:
    """The question with what there is to say of the answers, and the answers."""
    ends = [f"{name} {comparison.end(name)}" for name in comparison.cut]
    notes = "".join(f"<br><i>{rendering.plain(note)}</i>" for note in (*ends, comparison.note) if note)
    asked = f"<b>{rendering.plain(comparison.question)}</b>{notes}"
    return [asked, *map(rendering.markdown, comparison.answers.values())]


def _marked(bodies: list[str]) -> list[str]:
    """The answers with the words marked in which they differ: all others from the first, the first from an only one."""
    if len(bodies) < 2:
        return bodies
    pairs = [marked(bodies[0], body) for body in bodies[1:]]
    first = pairs[0][0] if len(pairs) == 1 else bodies[0]  # with more there is no one other whose words it could lack
    return [first, *(other for _, other in pairs)]


def _block(text: str) -> str:
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


class Conversation(list[tuple[str, dict[str, str]]]):
    """The questions so far, each with the answers to it, by the names that they have in `Comparison.answers`."""

    def turns(self, name: str) -> list[tuple[str, str]]:
        """(question, answer) of every question that this one answered, oldest first."""
        return [(question, answers[name]) for question, answers in self if answers.get(name)]

    def add(self, question: str, answers: Mapping[str, str]) -> None:
        """Remember a question with the answer each gave."""
        self.append((question.strip(), {name: answer.strip() for name, answer in answers.items()}))
