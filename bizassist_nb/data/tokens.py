"""From chat messages to input ids and labels, through the tokenizer's own chat template.

What people type must never become a control token, so the rendered template is not tokenised as one string: only
control tokens that the template itself wrote are looked up, everything else is tokenised as plain text.
"""

import dataclasses
import html
import re
import statistics
from collections.abc import Sequence
from typing import Any, Final

import jinja2

from bizassist_nb.core.errors import DataError, ModelError, printable
from bizassist_nb.data.chat import Message, row_messages
from bizassist_nb.data.rows import Rejected, Row

IGNORED: Final = -100
"""The label of a token that is not learned (torch's cross-entropy leaves it out)."""

# Stands for a message's content while the template is rendered. Letters only, so that no template can trim it.
_MARK: Final = "QzContent{}Qz"
# Never merges with a neighbour in a SentencePiece vocabulary: bytes below 0x20 are tokens of their own there.
_FENCE: Final = "\x01"


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised row."""

    number: int
    """The row's number in its source."""
    input_ids: list[int]
    labels: list[int]
    """As long as input_ids; IGNORED where nothing is learned."""
    truncated: bool
    category: str = ""

    @property
    def trained_tokens(self) -> int:
        """How many tokens the loss is taken over."""
        return sum(label != IGNORED for label in self.labels)


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What tokenising did to a set of rows."""

    rows: int
    tokens: int
    trained_tokens: int
    median: int
    longest: int
    truncated: int
    """Rows whose answer was cut at max_length."""


class ChatTokenizer:
    """A tokenizer with its chat template, its end token and its padding worked out.

    Raises:
        ModelError: for a tokenizer without a chat template, or one that cannot be followed.
    """

    def __init__(self, tokenizer: Any):
        """Study the template of a fast transformers tokenizer, and give it a pad token that is not its end token."""
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it is not known how it marks "
                "questions and answers; take an instruct (chat) model"
            )
        self.tokenizer = tokenizer
        self._controls = {
            str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        if not self._controls:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no control tokens, so nothing tells where an answer "
                "ends; take an instruct (chat) model"
            )
        self._control_pattern = re.compile(
            "|".join(re.escape(text) for text in sorted(self._controls, key=len, reverse=True))
        )
        self._dummy_prefix = tokenizer.tokenize("a")[0].startswith("▁")
        self.system_place = self._system_place()
        asked: list[Message] = [{"role": "user", "content": "a"}]
        _, answer = self._parts([*asked, {"role": "assistant", "content": "a"}])
        self.end_id: int = next((part for part in answer if isinstance(part, int)), tokenizer.eos_token_id)
        """The token after an answer in the template (mostly the tokenizer's eos)."""
        if tokenizer.pad_token_id in (None, self.end_id, tokenizer.eos_token_id):
            tokenizer.pad_token = self._spare_token()
        self.pad_id: int = tokenizer.pad_token_id

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer is over."""
        return frozenset({self.end_id, self.tokenizer.eos_token_id} - {None})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Input ids up to where the assistant's answer begins; `messages` end with the user's."""
        return self._ids(self._split(self.rendered(messages, answer_next=True)))

    def example(
        self, messages: Sequence[Message], *, max_length: int, train_on: str = "response"
    ) -> tuple[list[int], list[int], bool]:
        """(input ids, labels, whether the answer was cut at max_length); `messages` end with the assistant's.

        The answer's part ends with the end token, which is learned. With train_on = "all", every token is.
        """
        asked, answer = self._parts(messages)
        prompt = self._ids(asked)
        learned = self._ids(answer)
        # What a template writes after the end token (ChatML: a line break) is not the answer; some write no end token.
        learned = [*learned, self.end_id]
        learned = learned[: learned.index(self.end_id) + 1]
        ids = prompt + learned
        labels = list(ids) if train_on == "all" else [IGNORED] * len(prompt) + learned
        return ids[:max_length], labels[:max_length], len(ids) > max_length

    def examples(
        self, rows: Sequence[Row], *, system_prompt: str, max_length: int, train_on: str = "response"
    ) -> tuple[list[Example], list[Rejected]]:
        """All rows tokenised, and those whose question alone fills max_length.

        Raises:
            DataError: if no row is left.
        """
        examples: list[Example] = []
        rejected: list[Rejected] = []
        for row in rows:
            ids, labels, truncated = self.example(
                row_messages(row, system_prompt), max_length=max_length, train_on="response"
            )
            if all(label == IGNORED for label in labels):
                rejected.append(
                    Rejected(row.number, f"the question alone has {max_length} tokens or more (max_length)")
                )
                continue
            examples.append(Example(row.number, ids, ids if train_on == "all" else labels, truncated, row.category))
        if not examples:
            raise DataError(
                f"in all {len(rejected)} rows the question alone has max_length = {max_length} tokens or more, "
                "which leaves no answer to learn; raise max_length"
            )
        return examples, rejected

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def show(self, example: Example) -> "MaskedText":
        """The row as the model sees it, with what is learned marked."""
        runs: list[tuple[str, bool]] = []
        start = 0
        for i in range(1, len(example.labels) + 1):
            learned = example.labels[start] != IGNORED
            if i == len(example.labels) or (example.labels[i] != IGNORED) != learned:
                runs.append((self.decode(example.input_ids[start:i]), learned))
                start = i
        return MaskedText(tuple(runs))

    # How a rendered template becomes ids: it is cut into control tokens (ints) and runs of plain text (strs).

    def _parts(self, messages: Sequence[Message]) -> tuple[list[int | str], list[int | str]]:
        """(the prompt's parts, the answer's parts)."""
        prompt = self.rendered(messages[:-1], answer_next=True)
        whole = self.rendered(messages, answer_next=False)
        if whole[: len(prompt)] == prompt:
            return self._split(prompt), self._split(whole[len(prompt) :])
        joined = "".join(text for text, _ in prompt)
        text, ours = whole[len(prompt) - 1]
        if whole[: len(prompt) - 1] == prompt[:-1] and ours and text.startswith(prompt[-1][0]):
            rest = [(text[len(prompt[-1][0]) :], ours), *whole[len(prompt) :]]
            return self._split(prompt), self._split(rest)
        raise ModelError(
            f"the chat template of {self.tokenizer.name_or_path} writes a question differently once it is answered, so "
            f"there is no telling where the answer begins (the prompt ends {joined[-60:]!r}); take another model"
        )

    def rendered(self, messages: Sequence[Message], *, answer_next: bool) -> list[tuple[str, bool]]:
        """The rendered template as (text, whether the template wrote it) pieces: it sees marks, never the contents."""
        if self.system_place != "own" and messages[0]["role"] == "system":
            system, *messages = messages
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            place = users[0 if self.system_place == "first" else -1]
            question = {"role": "user", "content": f"{system['content']}\n\n{messages[place]['content']}"}
            messages = [*messages[:place], question, *messages[place + 1 :]]
        marked = [{**message, "content": _MARK.format(_letters(i))} for i, message in enumerate(messages)]
        text = self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=answer_next)
        contents = {mark["content"]: message["content"] for mark, message in zip(marked, messages, strict=True)}
        pieces = re.split("(" + "|".join(contents) + ")", text)
        if not contents.keys() <= set(pieces):
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} leaves out or changes what is said; "
                "take another model"
            )
        return [(contents.get(piece, piece), piece not in contents) for piece in pieces if piece]

    def _split(self, pieces: Sequence[tuple[str, bool]]) -> list[int | str]:
        parts: list[int | str] = []
        for text, ours in pieces:
            if not ours:
                _append_text(parts, text)
                continue
            start = 0
            for match in self._control_pattern.finditer(text):
                _append_text(parts, text[start : match.start()])
                parts.append(self._controls[match.group()])
                start = match.end()
            _append_text(parts, text[start:])
        return parts

    def _ids(self, parts: Sequence[int | str]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._plain(part)
        return ids

    def _plain(self, text: str) -> list[int]:
        """Ids of text that follows a control token, with nothing in it taken for one."""

        def encode(text: str) -> list[int]:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

        if not self._dummy_prefix:
            return encode(text)
        # SentencePiece puts a space before the text it is given; within a conversation the template has written
        # its own. So the text is encoded behind a fence, and the fence is taken off again.
        fence = encode(_FENCE)
        return encode(_FENCE + text)[len(fence) :]

    def _system_place(self) -> str:
        """Where a system message goes: "own" place, or into the "first" or the "last" question.

        Some templates refuse it or leave it out. Mistral v0.3's writes it into the last question, and only while that
        is not answered yet, so for a row with its answer it is put there beforehand.
        """
        roles = {role: _MARK.format(role) for role in ("system", "user", "assistant")}
        marked = [{"role": role, "content": mark} for role, mark in roles.items()]
        try:
            asked = self.tokenizer.apply_chat_template(marked[:2], tokenize=False, add_generation_prompt=True)
            answered = self.tokenizer.apply_chat_template(marked, tokenize=False)
        except jinja2.TemplateError:
            return "first"
        if roles["system"] not in asked:
            return "first"
        return "own" if roles["system"] in answered else "last"

    def _spare_token(self) -> str:
        """A token to pad with that no answer can contain or end with."""
        taken = {self.tokenizer.eos_token, self.tokenizer.bos_token, self.tokenizer.convert_ids_to_tokens(self.end_id)}
        spare = [text for text in (self.tokenizer.unk_token, *reversed(self._controls)) if text and text not in taken]
        if not spare:
            raise ModelError(
                f"the tokenizer of {self.tokenizer.name_or_path} has no token to pad with besides its end token; "
                "set its pad_token"
            )
        return str(spare[0])


@dataclasses.dataclass(frozen=True)
class MaskedText:
    """A tokenised row as text, in runs of (text, whether it is learned); in a notebook, learned text is marked."""

    runs: tuple[tuple[str, bool], ...]

    def __repr__(self) -> str:
        """Learned text stands between ⟦ and ⟧."""
        return printable("".join(f"⟦{text}⟧" if learned else text for text, learned in self.runs))

    def _repr_html_(self) -> str:
        body = "".join(
            f"<mark>{html.escape(text)}</mark>" if learned else html.escape(text) for text, learned in self.runs
        )
        return f'<pre style="white-space: pre-wrap">{body}</pre>'


def lengths(examples: Sequence[Example]) -> Lengths:
    """Count rows and tokens."""
    sizes = [len(example.input_ids) for example in examples]
    return Lengths(
        rows=len(examples),
        tokens=sum(sizes),
        trained_tokens=sum(example.trained_tokens for example in examples),
        median=int(statistics.median(sizes)),
        longest=max(sizes),
        truncated=sum(example.truncated for example in examples),
    )


def _append_text(parts: list[int | str], text: str) -> None:
    """Join text to text: what stands between two control tokens is tokenised in one go."""
    if text and parts and isinstance(parts[-1], str):
        parts[-1] += text
    elif text:
        parts.append(text)


def _letters(number: int) -> str:
    """The number in letters, so that a mark never ends in a digit that another mark goes on with."""
    return "".join(chr(ord("a") + int(digit)) for digit in str(number))
