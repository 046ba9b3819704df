"""The assistant: asks base and tuned the same question, in one batch, and gives all answers."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bizassist_nb.assistant.comparison import Comparison, Conversation
from bizassist_nb.assistant.loaded import MOST_ADAPTERS, LoadedBase, check_room, loaded_base
from bizassist_nb.core.errors import QuestionError, cut, without_locals
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED, Generation
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.chat import conversation as messages
from bizassist_nb.data.chat import question as user_turn
from bizassist_nb.runs.rows import prompt_examples, rows_of
from bizassist_nb.runs.run import RunDirectory

_GREEDY: Final = Generation()
_NO_RUN: Final = "There is no tuned model yet, so only the base answers; fine-tune one with %%finetune."
_MODULES_ROWS: Final = 16
"""Answers at once through the model's own modules, as on a CPU: all their keys and values are in memory."""
_Rows = dict[str, RunDirectory | None]
"""Who answers, by name, in the order of the batch's rows; None for the base."""
_Asked = tuple[Comparison, Sequence[list[int]]]
"""A comparison without answers yet, and the input ids of each of its rows."""


class Assistant:
    """Answers questions as the base and as the tuned models of any number of runs, from one copy of the weights.

    Raises:
        QuestionError: if the runs were made on different bases, or are more than there is room for at once.
    """

    def __init__(self, *runs: RunDirectory, base: Settings | None = None, anyway: bool = False):
        """The assistant of these runs; without one, the base alone that `base`, else the default settings, name.

        With `anyway` it takes GPU memory that a run in training may need.
        """
        self._anyway = anyway
        self.runs = tuple({run.path.resolve(): run for run in runs}.values())
        self._settings = runs[0].settings if runs else base or Settings()
        names = [run.name for run in self.runs]
        self._named = {run.name if names.count(run.name) == 1 else str(run.path): run for run in self.runs}
        bases = {run.model for run in self.runs}
        revisions = {run.environment.revision for run in self.runs} - {""}
        if len(bases) > 1 or len(revisions) > 1:
            made = (f"{name} on {run.model} {run.environment.revision}".rstrip() for name, run in self._named.items())
            raise QuestionError(f"only runs on the same base can answer together; these are {', '.join(made)}")
        if len(self.runs) > MOST_ADAPTERS:
            raise QuestionError(f"{len(self.runs)} runs cannot answer together; ask at most {MOST_ADAPTERS}")
        self.model, self._revision = next(iter(bases), self._settings.model), next(iter(revisions), "")
        """Name of the base, and the revision that the runs were made on."""

    def load(self) -> LoadedBase:
        """The base, loaded if it is not in memory yet.

        Raises:
            ModelError: if it cannot be loaded, is no longer what the runs were made on, or a run in training is
                expected to need the memory.
        """
        if not self._anyway:
            check_room(self.model, self._revision)
        return loaded_base(self.model, self._revision)

    def ask(
        self,
        question: str,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Comparison:
        """All answers, whole; as `stream`, with the fields of `Generation` as `options`."""
        stream = self.stream(question, Generation(**options), who=who, conversation=conversation)
        return deque(stream, maxlen=1).pop()

    def stream(
        self,
        question: str,
        generation: Generation = _GREEDY,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        conversation: Conversation | None = None,
    ) -> Iterator[Comparison]:
        """The comparison as it grows, after every token; the last one is whole. May be closed at any time.

        `who` is any of "base", "tuned" and "prompted" (base with examples). Each continues its own answers in
        `conversation`; the new answers are added to it, even if the stream is closed before the end.

        Raises:
            QuestionError: for an empty question, or one that leaves no room for an answer.
            ModelError: if the model or an adapter cannot be loaded.
        """
        with without_locals():
            yield from self._stream(question, generation, who, Conversation() if conversation is None else conversation)

    def _stream(
        self, question: str, generation: Generation, who: tuple[str, ...], conversation: Conversation
    ) -> Iterator[Comparison]:
        _check(question)
        rows, loaded = self._rows(who), self.load()
        begun = comparison, _ = self._begun(loaded, who, question, generation, conversation)
        yield comparison
        try:
            for (comparison,) in self._answers(loaded, rows, [begun], generation):
                yield comparison
        finally:
            conversation.add(question, comparison.answers)

    def each(
        self, questions: Sequence[str], generation: Generation = _GREEDY, *, who: tuple[str, ...] = (BASE, TUNED)
    ) -> Iterator[tuple[list[Comparison], list[Comparison]]]:
        """Several questions that have nothing to do with each other, as many in a batch as there is room for.

        After every token: those answered, and those being answered. It raises what `stream` raises.
        """
        from bizassist_nb.assistant.cuda import decode_graph

        with without_locals():
            for one in questions:
                _check(one)
            rows, loaded, answered = self._rows(who), self.load(), list[Comparison]()
            asked = [self._begun(loaded, who, one, generation, Conversation()) for one in questions]
            longest = max(len(prompt) for _, prompts in asked for prompt in prompts) + generation.max_new_tokens
            together = max(1, (decode_graph.most_rows(loaded.model, longest) or _MODULES_ROWS) // len(rows))
            for start in range(0, len(asked), together):
                found: list[Comparison] = []
                for found in self._answers(loaded, rows, asked[start : start + together], generation):
                    yield answered, found
                answered = [*answered, *found]
                yield answered, []

    def _begun(
        self,
        loaded: LoadedBase,
        who: tuple[str, ...],
        question: str,
        generation: Generation,
        conversation: Conversation,
    ) -> _Asked:
        """A question, asked in that conversation."""
        rows = self._rows(who)
        said = {name: conversation.turns(name) for name in rows}
        if PROMPTED in rows:
            said[PROMPTED] = [*self._examples(), *said[PROMPTED]]
        fitted = [self._fitted(loaded, run, said[name], question, generation) for name, run in rows.items()]
        prompts, dropped = zip(*fitted, strict=True)
        notes = [] if self.runs or TUNED not in who else [_NO_RUN]
        if generation.system is not None:
            notes.append(f'System prompt: "{cut(generation.system)}".' if generation.system else "No system prompt.")
        if most := max(dropped):
            turns = "the first question and its answer were" if most == 1 else f"the first {most} turns were"
            room = f"the {loaded.model.config.max_position_embeddings:,} tokens that the model reads"
            notes.append(f"The conversation has outgrown {room}: {turns} left out.")
        comparison = Comparison(
            question.strip(),
            dict.fromkeys(rows, ""),
            tuple(run.name for run in rows.values() if run),
            generation.strength,
            note=" ".join(notes) or None,
            model=loaded.base.name,
            limit=generation.max_new_tokens,
        )
        return comparison, prompts

    def _answers(
        self, loaded: LoadedBase, rows: _Rows, asked: Sequence[_Asked], generation: Generation
    ) -> Iterator[list[Comparison]]:
        """The comparisons as they grow, after every token, all in one batch: a question's rows are neighbours."""
        import torch

        from bizassist_nb.assistant.decoding import Batch, texts

        strengths = {
            loaded.adapter(run): [generation.strength if each is run else 0.0 for each in rows.values()] * len(asked)
            for run in filter(None, rows.values())
        }
        found, prompts = [begun for begun, _ in asked], [prompt for _, each in asked for prompt in each]
        batch, since = Batch(prompts, strengths, loaded.chat.stop_ids, loaded.chat.pad_id), time.monotonic()
        names, lengths, context = list(rows), [0] * len(prompts), loaded.model.config.max_position_embeddings
        prefix = loaded.prefix_cache if len(asked) == 1 else None  # it is for what the next question begins with
        try:
            for row, text in texts(loaded.model, loaded.chat, batch, generation, prefix):
                place, name = row // len(names), names[row % len(names)]
                whole = found[place].answers[name] + text
                ends = [whole.index(stop) for stop in generation.stop if stop in whole]
                if ends:
                    batch.over.add(row)
                lengths[row] += 1
                answers = {**found[place].answers, name: whole[: min(ends, default=None)]}
                used = f"{len(prompts[row]) + lengths[row]:,} of the {context:,} tokens that the model reads"
                speed = lengths[row] / max(1e-9, time.monotonic() - since)
                figures = {**found[place].figures, name: f"{lengths[row]:,} tokens, {speed:.1f} a second; {used}"}
                found[place] = dataclasses.replace(found[place], answers=answers, figures=figures)
                yield found
        except torch.OutOfMemoryError as error:
            loaded.forget_cache()
            raise QuestionError(
                f"the GPU ran out of memory at {max(map(len, prompts)):,} tokens of question for {len(prompts)} "
                "answers; clear the conversation, ask fewer at once, or wait for the training that shares the GPU"
            ) from error
        limited = [length == generation.max_new_tokens and row not in batch.over for row, length in enumerate(lengths)]
        yield [_whole(each, limited[place * len(names) :]) for place, each in enumerate(found)]

    def _rows(self, who: tuple[str, ...]) -> _Rows:
        rows: _Rows = {BASE: None} if BASE in who or not self.runs else {}
        tuned = self._named if TUNED in who else {}
        rows |= {TUNED if len(tuned) == 1 else f"{TUNED} ({name})": run for name, run in tuned.items()}
        return rows | ({PROMPTED: None} if PROMPTED in who else {})

    def _examples(self) -> list[tuple[str, str]]:
        """Earlier turns of the prompted base: the training rows that the first run's verdict is held against."""
        if not self.runs:
            raise QuestionError("a prompt takes its examples from the rows of a run; make one with %%finetune")
        rows = prompt_examples(rows_of(self.runs[0])[1])
        return [
            turn for row in rows for turn in (*row.history, (user_turn(row.instruction, row.context), row.response))
        ]

    def _fitted(
        self,
        loaded: LoadedBase,
        run: RunDirectory | None,
        turns: list[tuple[str, str]],
        question: str,
        generation: Generation,
    ) -> tuple[list[int], int]:
        """A row's input ids, and how many turns were left out, from the oldest on, so that the answer has room."""
        settings, context = run.settings if run else self._settings, loaded.model.config.max_position_embeddings
        system = settings.system_prompt if generation.system is None else generation.system
        for dropped in range(len(turns) + 1):
            prompt = loaded.chat.prompt(messages(system, turns[dropped:], question.strip()))
            if len(prompt) <= context - generation.max_new_tokens:
                return prompt, dropped
        raise QuestionError(
            f"the question has {len(prompt):,} tokens with its template and the model reads {context:,} at most, "
            f"answer included: shorten it, or set max_new_tokens below {generation.max_new_tokens:,}"
        )


def _whole(comparison: Comparison, limited: Sequence[bool]) -> Comparison:
    """The comparison at its end; which of its answers were stopped at the limit of their length."""
    answers = {name: text.strip() for name, text in comparison.answers.items()}
    return dataclasses.replace(comparison, answers=answers, cut=tuple(itertools.compress(answers, limited)))


def _check(question: str) -> None:
    if not question.strip():
        raise QuestionError("the question is empty; write it in the cell below %%ask, or after %ask")
