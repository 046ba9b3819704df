"""From chat messages to input ids and labels, through the tokenizer's own chat template.

What people type must never become a control token, so the rendered template is not tokenised as one string: only
control tokens that the template itself wrote are looked up, everything else is tokenised as plain text.
"""

import dataclasses
import functools
import html
import itertools
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Final

import jinja2

from bizassist_nb.core.errors import DataError, ModelError, printable
from bizassist_nb.data.chat import Message, row_messages
from bizassist_nb.data.rows import Rejected, Row

IGNORED: Final = -100
"""The label of a token that is not learned (torch's cross-entropy leaves it out)."""

# Stands for a message's content while the template is rendered; no template trims letters and digits.
_MARK: Final = "QzContent{}Qz"
# Never merges with a neighbour in a SentencePiece vocabulary: bytes below 0x20 are tokens of their own there.
_FENCE: Final = "\x01"
_Piece = tuple[str, str]
"""(text, the role of the message that it is; "" for what the template wrote)."""


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
class TooLong(Rejected):
    """A row whose question alone fills max_length."""

    tokens: int
    """Of the question and its answer."""


def too_long_words(count: int, total: int, max_length: int, needed: int) -> str:
    """A warning about rows that are too long; `needed` tokens is the longest of them."""
    return (
        f"{count:,} of {total:,} rows are not used: their question alone has max_length = {max_length} tokens or more. "
        f"With max_length = {needed} all are used whole"
    )


class ChatTokenizer:
    """A tokenizer with its chat template, end token and pad token.

    Raises:
        ModelError: for a tokenizer without a chat template, or with one that leaves out or changes messages.
    """

    def __init__(self, tokenizer: Any, stops: Iterable[int] = ()):
        """Analyse the template of a fast transformers tokenizer; set a pad token that is not its end token.

        `stops` are further tokens at which the base ends an answer.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no chat template, so it is not known how it marks "
                "questions and answers; take an instruct (chat) model"
            )
        self.tokenizer = tokenizer
        self.controls = {
            str(token): int(number) for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        """The ids of the control tokens, by their texts."""
        if not self.controls:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} has no control tokens, so nothing tells where an answer "
                "ends; take an instruct (chat) model"
            )
        self._control_pattern = re.compile(
            "(" + "|".join(re.escape(text) for text in sorted(self.controls, key=len, reverse=True)) + ")"
        )
        self._dummy_prefix = tokenizer.tokenize("a")[0].startswith("▁")
        self._options: dict[str, bool] = {}
        self.system_place = self._system_place()
        self.thinking_off = self._turn_thinking_off()
        """Whether the template can have the model think before it answers, and is told not to."""
        self.end_id = self._end()
        """The first control token that the template writes after an answer (mostly the tokenizer's eos)."""
        if tokenizer.pad_token_id in (None, self.end_id, tokenizer.eos_token_id):
            tokenizer.pad_token = self._spare_token()
        self.pad_id: int = tokenizer.pad_token_id
        self._stops = frozenset(stops)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens at which an answer is over."""
        return self._stops | frozenset({self.end_id, self.tokenizer.eos_token_id} - {None})

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Input ids up to where the assistant's answer begins; `messages` end with the user's."""
        return self._ids(self.asked(messages))

    def asked(self, messages: Sequence[Message]) -> list[_Piece]:
        """All that the template writes before the answer; `messages` end with the user's."""
        return self._parts([*messages, {"role": "assistant", "content": "a"}])[0]

    def example(
        self, messages: Sequence[Message], *, max_length: int, train_on: str = "last"
    ) -> tuple[list[int], list[int], bool]:
        """(input ids, labels, whether the answer was cut at max_length); `messages` end with the assistant's.

        The answer's part ends with the end token, which is learned. With train_on = "response", earlier answers are
        learned, too, and with "all" every token.

        Raises:
            ModelError: where the template does not end earlier answers as the last, and they are to be learned.
        """
        asked, answer = self._parts(messages)
        prompt, earlier = self._labelled(asked) if train_on == "response" else (self._ids(asked), [])
        # What a template writes after the end token (ChatML: a line break) is not the answer; some write no end token.
        learned = [*self._ids(answer), self.end_id]
        learned = learned[: learned.index(self.end_id) + 1]
        ids = prompt + learned
        labels = list(ids) if train_on == "all" else (earlier or [IGNORED] * len(prompt)) + learned
        return ids[:max_length], labels[:max_length], len(ids) > max_length

    def examples(
        self, rows: Sequence[Row], *, system_prompt: str, max_length: int, train_on: str = "last"
    ) -> tuple[list[Example], list[TooLong]]:
        """All rows tokenised, and those whose question alone fills max_length, with what they take whole.

        Raises:
            DataError: if no row is left.
        """
        examples: list[Example] = []
        rejected: list[TooLong] = []
        for row in rows:
            messages, answers = row_messages(row, system_prompt), "response" if train_on == "all" else train_on
            ids, labels, truncated = self.example(messages, max_length=max_length, train_on=answers)
            if labels.count(IGNORED) == len(labels):
                reason = f"the question alone has {max_length} tokens or more (max_length)"
                whole, _, _ = self.example(messages, max_length=sys.maxsize)
                rejected.append(TooLong(row.number, reason, len(whole)))
            else:
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
        """The row's text as the model reads it, with the learned text marked."""
        tokens = zip(example.input_ids, example.labels, strict=True)
        runs = itertools.groupby(tokens, key=lambda token: token[1] != IGNORED)
        return MaskedText(tuple((self.decode([token for token, _ in run]), learned) for learned, run in runs))

    # How a rendered template becomes ids: it is cut into control tokens (ints) and plain text (strs).

    def _parts(self, messages: Sequence[Message]) -> tuple[list[_Piece], list[_Piece]]:
        """(the prompt's pieces, the answer's pieces: its content, after a space as the case may be, and what follows).

        What the template opens an answer with (a channel, an empty thought) is a part of the prompt.
        """
        prompt, answer = self._cut(messages)
        place = next(place for place, (_, role) in enumerate(answer) if role)
        opening = "".join(text for text, _ in answer[:place])
        space = opening[len(opening.rstrip(" ")) :]  # SentencePiece has tokens for a space with the word after it
        before = opening[: len(opening) - len(space)]
        prompt += [(before, "")] if before else []
        return prompt, [(space, ""), answer[place], ("".join(text for text, _ in answer[place + 1 :]), "")]

    def _cut(self, messages: Sequence[Message]) -> tuple[list[_Piece], list[_Piece]]:
        """The rendered pieces up to where the template asks for an answer, and those after it."""
        prompt = self.rendered(messages[:-1], answer_next=True)
        whole = self.rendered(messages, answer_next=False)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        joined = "".join(text for text, _ in prompt)
        text, role = whole[len(prompt) - 1]
        if whole[: len(prompt) - 1] == prompt[:-1] and not role and text.startswith(prompt[-1][0]):
            return prompt, [(text[len(prompt[-1][0]) :], role), *whole[len(prompt) :]]
        raise ModelError(
            f"the chat template of {self.tokenizer.name_or_path} writes a question differently once it is answered, so "
            f"there is no telling where the answer begins (the prompt ends {joined[-60:]!r}); take another model"
        )

    def rendered(self, messages: Sequence[Message], *, answer_next: bool) -> list[_Piece]:
        """The rendered template in pieces: it sees marks, never the contents."""
        if self.system_place != "own" and messages[0]["role"] == "system":
            system, *messages = messages
            users = [i for i, message in enumerate(messages) if message["role"] == "user"]
            place = users[0 if self.system_place == "first" else -1]
            question = {"role": "user", "content": f"{system['content']}\n\n{messages[place]['content']}"}
            messages = [*messages[:place], question, *messages[place + 1 :]]
        marked = [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)]
        text = self._render(marked, answer_next=answer_next)
        contents = {
            mark["content"]: (message["content"], message["role"])
            for mark, message in zip(marked, messages, strict=True)
        }
        pieces = re.split("(" + "|".join(contents) + ")", text)
        if not contents.keys() <= set(pieces):
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} leaves out or changes what is said; "
                "take another model"
            )
        return [contents.get(piece, (piece, "")) for piece in pieces if piece]

    def _render(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **self._options
            )
        )

    def _turn_thinking_off(self) -> bool:
        """Tell a template that knows `enable_thinking` that it is off: rows have no thoughts to learn, and a base that
        thinks would reach the token limit where tuned has long answered.
        """
        asked: list[Message] = [{"role": "user", "content": "a"}]
        plain = self._render(asked, answer_next=True)
        self._options = {"enable_thinking": False}
        try:
            found = self._render(asked, answer_next=True) != plain
            self._cut([*asked, {"role": "assistant", "content": "a"}])
        except ModelError:  # an answer is written otherwise then: better as the template does by itself
            found = False
        self._options = {"enable_thinking": False} if found else {}
        return found

    def _end(self) -> int:
        _, (*_, after) = self._parts([{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}])
        end = next((part for part, _ in self._split([after]) if isinstance(part, int)), self.tokenizer.eos_token_id)
        if end is None:
            raise ModelError(
                f"the chat template of {self.tokenizer.name_or_path} writes no control token after an answer, and its "
                "tokenizer has no end token, so nothing tells where an answer ends; take an instruct (chat) model"
            )
        return int(end)

    def _split(self, pieces: Sequence[_Piece]) -> list[tuple[int | str, int | None]]:
        """Control tokens and the text between them, joined: it is tokenised in one go. With each, where in the text an
        answer begins, if one does; -1 where another message follows it there.
        """
        parts: list[tuple[int | str, int | None]] = []
        for text, role in pieces:
            for part in [text] if role else self._control_pattern.split(text):
                if not role and part in self.controls:
                    parts.append((self.controls[part], None))
                elif part:
                    last, begins = parts.pop() if parts and isinstance(parts[-1][0], str) else ("", None)
                    if role and begins is not None:
                        begins = -1
                    elif role == "assistant":
                        begins = len(str(last).rstrip(" "))  # SentencePiece has tokens for a space with the word
                    parts.append((f"{last}{part}", begins))
        return parts

    def _ids(self, pieces: Sequence[_Piece]) -> list[int]:
        ids: list[int] = []
        for part, _ in self._split(pieces):
            ids += [part] if isinstance(part, int) else self._plain(part)
        return ids

    def _labelled(self, pieces: Sequence[_Piece]) -> tuple[list[int], list[int]]:
        """(ids, labels) of a prompt whose earlier answers are learned, each with the end token behind it."""
        ids: list[int] = []
        labels: list[int] = []
        answered = False
        for part, begins in self._split(pieces):
            new = [part] if isinstance(part, int) else self._plain(part)
            if begins == -1 or (answered and new[0] not in self.stop_ids):
                raise ModelError(
                    f"the chat template of {self.tokenizer.name_or_path} does not end earlier answers as it does the "
                    'last, which alone can be learned: set train_on = "last", or take another model'
                )
            first = 0 if answered else len(new)
            if isinstance(part, str) and begins is not None:
                # A token that has the end of the template's text and the beginning of the answer is learned.
                alike = zip(new, self._plain(part[:begins]), strict=False)
                first = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], alike))
            ids += new
            labels += [IGNORED] * first + new[first:]
            answered = begins is not None
        return ids, labels

    def _plain(self, text: str) -> list[int]:
        """Ids of text that follows a control token; control tokens in the text are tokenised as text."""
        encode = functools.partial(self.tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
        if not self._dummy_prefix:
            return list(encode(text))
        # SentencePiece puts a space before the text it is given; within a conversation the template has written
        # its own. So the text is encoded behind a fence, and the fence is taken off again.
        return list(encode(_FENCE + text)[len(encode(_FENCE)) :])

    def _system_place(self) -> str:
        """Where a system message goes: "own" place, or into the "first" or the "last" question.

        Some templates refuse it or leave it out. Mistral v0.3's writes it into the last question, and only while that
        is not answered yet, so for a row with its answer it is put there beforehand.
        """
        roles = {role: _MARK.format(role) for role in ("system", "user", "assistant")}
        marked = [{"role": role, "content": mark} for role, mark in roles.items()]
        try:
            asked = self._render(marked[:2], answer_next=True)
            answered = self._render(marked, answer_next=False)
        except jinja2.TemplateError:
            return "first"
        if roles["system"] not in asked:
            return "first"
        return "own" if roles["system"] in answered else "last"

    def _spare_token(self) -> str:
        """A token to pad with that no answer can contain or end with."""
        taken = {self.tokenizer.eos_token, self.tokenizer.bos_token, self.tokenizer.convert_ids_to_tokens(self.end_id)}
        spare = [text for text in (self.tokenizer.unk_token, *reversed(self.controls)) if text and text not in taken]
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


def lengths(examples: Sequence[Example]) -> dict[str, int]:
    """Count rows and tokens; "truncated" are rows whose answer was cut at max_length."""
    sizes = [len(example.input_ids) for example in examples]
    return {
        "rows": len(examples),
        "tokens": sum(sizes),
        "trained_tokens": sum(example.trained_tokens for example in examples),
        "median": int(statistics.median(sizes)),
        "longest": max(sizes),
        "truncated": sum(example.truncated for example in examples),
    }
