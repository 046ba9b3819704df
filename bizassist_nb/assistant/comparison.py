"""A question with the answers of base and tuned, and how they look."""

import dataclasses
import re
from typing import Any

from bizassist_nb.assistant.differences import marked
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.generation import BASE, TUNED


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A question and the answers to it."""

    question: str
    answers: dict[str, str]
    """By who gave them, in the order of the columns: "base", "tuned"; with several runs "base", "tuned (NAME)" each."""
    runs: tuple[str, ...] = ()
    """Names of the runs whose adapters answered."""
    strength: float = 1.0
    """What the tuned answers' adapters were multiplied by."""
    cut: tuple[str, ...] = ()
    """Whose answer had not come to its end when it had max_new_tokens."""
    note: str | None = None
    """What the reader should know about how these answers came to be."""

    @property
    def base(self) -> str | None:
        """The base's answer; None if it was not asked."""
        return self.answers.get(BASE)

    @property
    def tuned(self) -> str | None:
        """The (first) tuned model's answer; None if none was asked, or there is none."""
        return next((text for name, text in self.answers.items() if name != BASE), None)

    @property
    def heads(self) -> list[str]:
        """What stands above each answer."""
        return [f"{self.head(name)}, cut short" if name in self.cut else self.head(name) for name in self.answers]

    def head(self, name: str) -> str:
        """Who that is, with the run and the strength."""
        head = f"{name} ({self.runs[0]})" if name == TUNED and self.runs else name
        if name != BASE and self.strength != 1:
            head += f", strength {self.strength:g}"
        return head

    def to_dict(self) -> dict[str, Any]:
        """Question, each answer, and how they came to be, in one flat record: a row of a data frame."""
        record = {"question": self.question, **self.answers}
        return record | {"runs": list(self.runs), "strength": self.strength, "cut": list(self.cut), "note": self.note}

    def __repr__(self) -> str:
        """Question and answers as plain text."""
        answers = zip(self.heads, self.answers.values(), strict=True)
        parts = [f"Question: {self.question}", *(f"--- {head} ---\n{text}" for head, text in answers)]
        return printable("\n\n".join([*parts, *filter(None, [self.note])]))

    def _repr_html_(self) -> str:
        return comparison_html(self, finished=True)

    def _repr_markdown_(self) -> str:
        """For documents: question and answers as blocks of plain text, in which no Markdown of theirs takes effect."""
        answers = zip(self.heads, self.answers.values(), strict=True)
        return "\n\n".join(
            [
                _block(self.question),
                *(f"**{rendering.plain_markdown(head)}**\n\n{_block(text)}" for head, text in answers),
                *([rendering.plain_markdown(self.note)] if self.note else []),
            ]
        )


class Comparisons(tuple[Comparison, ...]):
    """Answers to several questions, one row each."""

    __slots__ = ()

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns by name, as `pandas.DataFrame` takes them."""
        records = [comparison.to_dict() for comparison in self]
        return {key: [record[key] for record in records] for key in (records[0] if records else ())}

    def __repr__(self) -> str:
        """All of them as plain text."""
        return "\n\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        heads = [self[0].head(name) for name in self[0].answers] if self else []
        return rendering.grid(["question", *heads], [_cells(each) for each in self])


def comparison_html(comparison: Comparison, *, finished: bool) -> str:
    """Answers in adjacent columns: the text as it comes; once finished rendered, with the differing words marked."""
    note = f"<i>{rendering.plain(comparison.note)}</i>" if comparison.note else ""
    body = rendering.columns(comparison.heads, _bodies(comparison, finished=finished))
    return f"<b>{rendering.plain(comparison.question)}</b>{body}{note}"


def _cells(comparison: Comparison) -> list[str]:
    """Question and answers with what there is to say of each."""
    asked = f"<b>{rendering.plain(comparison.question)}</b>"
    note = f"<br><i>{rendering.plain(comparison.note)}</i>" if comparison.note else ""
    bodies = zip(comparison.answers, _bodies(comparison, finished=True), strict=True)
    return [asked + note, *(f"{body}<i>cut short</i>" if name in comparison.cut else body for name, body in bodies)]


def _bodies(comparison: Comparison, *, finished: bool) -> list[str]:
    shape = rendering.markdown if finished else rendering.plain
    bodies = [shape(text) for text in comparison.answers.values()]
    if not finished or len(bodies) < 2:
        return bodies
    first = bodies[0]
    if len(bodies) == 2:  # with more there is no one other whose words the first could lack
        first, _ = marked(bodies[0], bodies[1])
    return [first, *(marked(bodies[0], body)[1] for body in bodies[1:])]


def _block(text: str) -> str:
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def lines(text: str) -> list[str]:
    """The questions of a text that has one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]
