"""The assistant: asks base and tuned the same question, in one batch, and gives all answers."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.assistant.conversation import Conversation
from bizassist_nb.assistant.loaded import MOST_ADAPTERS, LoadedBase, loaded_base
from bizassist_nb.core.errors import QuestionError
from bizassist_nb.core.generation import BASE, TUNED, Generation
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.chat import conversation as messages
from bizassist_nb.runs.run import RunDirectory

_GREEDY: Final = Generation()
_NO_RUN: Final = "There is no run yet, so only the base answers; fine-tune one with %%finetune."


@dataclasses.dataclass(frozen=True)
class _Row:
    """One row of the batch: who answers."""

    name: str
    run: RunDirectory | None
    """None for the base."""


class Assistant:
    """Answers questions as the base and as the tuned models of any number of runs, from one copy of the weights.

    Raises:
        QuestionError: if the runs were made on different bases, or are more than there is room for at once.
    """

    def __init__(self, *runs: RunDirectory):
        """The assistant of these runs; without one, the base that `model = "auto"` stands for, alone."""
        self.runs = tuple({run.path: run for run in runs}.values())
        self._settings = runs[0].settings if runs else Settings()
        bases = {run.name: run.model for run in self.runs}
        if len(set(bases.values())) > 1:
            made = ", ".join(f"{name} on {base}" for name, base in bases.items())
            raise QuestionError(f"only runs on the same base can answer together; these are {made}")
        if len(bases) > MOST_ADAPTERS:
            raise QuestionError(f"{len(bases)} runs cannot answer together; ask at most {MOST_ADAPTERS}")
        self._model = next(iter(bases.values()), "auto")

    def ask(
        self,
        question: str,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        conversation: Conversation | None = None,
        **options: Any,
    ) -> Comparison:
        """All answers, whole; as `stream`, with the fields of `Generation` as `options`."""
        return list(self.stream(question, Generation(**options), who=who, conversation=conversation))[-1]

    def stream(
        self,
        question: str,
        generation: Generation = _GREEDY,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        conversation: Conversation | None = None,
    ) -> Iterator[Comparison]:
        """The comparison as it grows, after every token; the last one is whole. May be closed at any time.

        `who` is "base", "tuned" or both. Everyone goes on from what they said themselves in `conversation`, and what
        they answer now is added to it, also if the stream is closed before the end.

        Raises:
            QuestionError: for an empty question, or one that leaves no room for an answer.
            ModelError: if the model or an adapter cannot be loaded.
        """
        if not question.strip():
            raise QuestionError("the question is empty; write it in the cell below %%ask, or after %ask")
        rows = self._rows(who)
        loaded = loaded_base(self._model)
        prompts, dropped = self._prompts(
            loaded, rows, question, conversation or Conversation(), generation.max_new_tokens
        )
        no_run = None if self.runs or TUNED not in who else _NO_RUN
        comparison = begun = Comparison(
            question.strip(),
            dict.fromkeys((row.name for row in rows), ""),
            tuple(run.name for run in self.runs if any(row.run is run for row in rows)),
            generation.strength,
            note=" ".join(filter(None, [no_run, dropped])) or None,
        )
        yield comparison
        try:
            for comparison in self._answers(loaded, rows, prompts, begun, generation):
                yield comparison
        finally:
            if conversation is not None:
                conversation.add(question, comparison.answers)

    def _answers(
        self,
        loaded: LoadedBase,
        rows: list[_Row],
        prompts: list[list[int]],
        begun: Comparison,
        generation: Generation,
    ) -> Iterator[Comparison]:
        import torch

        from bizassist_nb.assistant.decoding import Batch, texts

        adapters = {run: loaded.adapter(run) for run in self.runs if any(row.run is run for row in rows)}
        loaded.use(list(adapters.values()))
        strengths = {
            adapter: [generation.strength if row.run is run else 0.0 for row in rows]
            for run, adapter in adapters.items()
        }
        batch = Batch(prompts, strengths, loaded.chat.stop_ids, loaded.chat.pad_id)
        answers = dict(begun.answers)
        lengths = dict.fromkeys(answers, 0)
        try:
            for number, text in texts(loaded.model, loaded.chat, batch, generation, loaded.prefix_cache):
                name = rows[number].name
                answers[name] += text
                lengths[name] += 1
                yield dataclasses.replace(begun, answers=dict(answers))
        except torch.OutOfMemoryError as error:
            loaded.forget_cache()
            raise QuestionError(
                f"the GPU ran out of memory at {max(map(len, prompts)):,} tokens of question for {len(rows)} answers; "
                "clear the conversation, ask fewer at once, or wait for the training that shares the GPU"
            ) from error
        cut = tuple(name for name, length in lengths.items() if length == generation.max_new_tokens)
        whole = {name: text.strip() for name, text in answers.items()}
        yield dataclasses.replace(begun, answers=whole, cut=cut)

    def _rows(self, who: tuple[str, ...]) -> list[_Row]:
        rows = [_Row(BASE, None)] if BASE in who or not self.runs else []
        if TUNED in who:
            one = len(self.runs) == 1
            rows += [_Row(TUNED if one else f"{TUNED} ({run.name})", run) for run in self.runs]
        return rows

    def _prompts(
        self, loaded: LoadedBase, rows: list[_Row], question: str, conversation: Conversation, max_new_tokens: int
    ) -> tuple[list[list[int]], str | None]:
        """Every row's input ids, and what the reader should know about what was left out of them."""
        prompts, dropped = [], 0
        most = loaded.model.config.max_position_embeddings - max_new_tokens
        for row in rows:
            turns = conversation.turns(row.name)
            prompt = self._prompt(loaded, row, turns, question)
            while len(prompt) > most and turns:
                turns = turns[1:]
                prompt = self._prompt(loaded, row, turns, question)
            if len(prompt) > most:
                raise QuestionError(
                    f"the question has {len(prompt):,} tokens with its template and the model reads "
                    f"{most + max_new_tokens:,} at most, answer included: shorten it, or set max_new_tokens below "
                    f"{max_new_tokens:,}"
                )
            dropped = max(dropped, len(conversation.turns(row.name)) - len(turns))
            prompts.append(prompt)
        if not dropped:
            return prompts, None
        return prompts, (
            f"The conversation has outgrown the {most + max_new_tokens:,} tokens that the model reads: "
            f"{'the first question and its answer were' if dropped == 1 else f'the first {dropped} turns were'} "
            "left out."
        )

    def _prompt(self, loaded: LoadedBase, row: _Row, turns: list[tuple[str, str]], question: str) -> list[int]:
        settings = row.run.settings if row.run else self._settings
        return loaded.chat.prompt(messages(settings.system_prompt, turns, question.strip()))
