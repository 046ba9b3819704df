"""What was said so far: base and tuned each remember the answers that were their own."""

from collections.abc import Mapping

Turn = tuple[str, str]
"""A question and the answer to it."""


class Conversation:
    """The histories of everyone who answers, by the name an answer has in `Comparison.answers`."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._turns: dict[str, list[Turn]] = {}

    def turns(self, name: str) -> list[Turn]:
        """What this one was asked and said, oldest first."""
        return list(self._turns.get(name, []))

    def add(self, question: str, answers: Mapping[str, str]) -> None:
        """Remember a question with the answer each gave; one that gave none does not remember it."""
        for name, answer in answers.items():
            if answer.strip():
                self._turns.setdefault(name, []).append((question.strip(), answer.strip()))

    def forget_last(self) -> None:
        """Take the last question and its answers back, to ask it again."""
        for turns in self._turns.values():
            if turns:
                turns.pop()

    def clear(self) -> None:
        """Begin anew."""
        self._turns.clear()
