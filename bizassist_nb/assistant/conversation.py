"""What was said so far: base and tuned each remember the answers that were their own."""

from collections.abc import Mapping

Turn = tuple[str, str]
"""A question and the answer to it."""


class Conversation:
    """The histories of everyone who answers, by the name an answer has in `Comparison.answers`."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._said: list[tuple[str, dict[str, str]]] = []

    def turns(self, name: str) -> list[Turn]:
        """What this one was asked and said, oldest first; a question it did not answer is not among them."""
        return [(question, answers[name]) for question, answers in self._said if answers.get(name)]

    def add(self, question: str, answers: Mapping[str, str]) -> None:
        """Remember a question with the answer each gave."""
        self._said.append((question.strip(), {name: answer.strip() for name, answer in answers.items()}))

    def forget_last(self) -> None:
        """Take the last question and its answers back, to ask it again."""
        del self._said[-1:]

    def clear(self) -> None:
        """Begin anew."""
        self._said.clear()
