"""A question with the answers of base and tuned, and how the pair looks."""

import dataclasses
from typing import Any, Final

from bizassist_nb import render

BASE: Final = "base"
TUNED: Final = "tuned"


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """A question and the answers to it."""

    question: str
    base: str | None
    """None if the base was not asked."""
    tuned: str | None
    """None if the tuned model was not asked, or there is none."""
    run: str | None = None
    """Name of the run whose adapter answered."""
    cut: tuple[str, ...] = ()
    """Whose answer had not come to its end when it had max_new_tokens."""
    note: str | None = None
    """What the reader should know about how these answers came to be."""

    @property
    def answers(self) -> dict[str, str]:
        """The answers there are, by who gave them."""
        return {who: text for who, text in ((BASE, self.base), (TUNED, self.tuned)) if text is not None}

    @property
    def heads(self) -> list[str]:
        """What stands above each answer."""
        names = [who if who == BASE or not self.run else f"{who} ({self.run})" for who in self.answers]
        return [
            f"{name}, cut short" if who in self.cut else name for who, name in zip(self.answers, names, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The fields, for a data frame."""
        return dataclasses.asdict(self)

    def __repr__(self) -> str:
        """Question and answers as plain text."""
        answers = zip(self.heads, self.answers.values(), strict=True)
        parts = [f"Question: {self.question}", *(f"--- {head} ---\n{text}" for head, text in answers)]
        return "\n\n".join([*parts, *filter(None, [self.note])])

    def _repr_html_(self) -> str:
        return comparison_html(self, finished=True)


def comparison_html(comparison: Comparison, *, finished: bool) -> str:
    """Answers in adjacent columns: rendered Markdown once finished, the text as it comes until then."""
    shape = render.markdown if finished else render.plain
    note = f"<i>{render.plain(comparison.note)}</i>" if comparison.note else ""
    body = render.columns(comparison.heads, [shape(text) for text in comparison.answers.values()])
    return f"<b>{render.plain(comparison.question)}</b>{body}{note}"
