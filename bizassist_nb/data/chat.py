"""Chat messages: the one place that decides what the model reads, in training, scoring and chat alike."""

from collections.abc import Sequence

from bizassist_nb.data.rows import Row

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}, as chat templates take it."""


def question(instruction: str, context: str = "") -> str:
    """The user's turn: the instruction and, where there is one, the context it is about."""
    return f"{instruction}\n\nContext:\n{context}" if context else instruction


def conversation(system: str, history: list[tuple[str, str]], asked: str) -> list[Message]:
    """Messages up to and with the question asked; the answer is the model's to give."""
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in history:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return [*messages, {"role": "user", "content": asked}]


def with_examples(messages: list[Message], rows: Sequence[Row]) -> list[Message]:
    """The messages with those of `rows` as earlier turns, behind the system message."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    earlier = [message for row in rows for message in row_messages(row, "") if message["role"] != "system"]
    return [*system, *earlier, *messages[len(system) :]]


def row_messages(row: Row, system_prompt: str) -> list[Message]:
    """A row's question and the answer to learn."""
    system = system_prompt if row.system is None else row.system
    asked = conversation(system, list(row.history), question(row.instruction, row.context))
    return [*asked, {"role": "assistant", "content": row.response}]
