"""The assistant: asks base and tuned the same question, in one batch, and gives all answers."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.assistant.conversation import Conversation
from bizassist_nb.assistant.loaded import MOST_ADAPTERS, LoadedBase, loaded_base
from bizassist_nb.core.errors import BizassistError
from bizassist_nb.core.generation import BASE, TUNED
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.chat import conversation as messages
from bizassist_nb.runs.run import RunDirectory

if TYPE_CHECKING:
    from bizassist_nb.assistant.decoding import Sampling

STRONGEST: Final = 1.5
"""Strength of an adapter at most; far beyond 1 a model only babbles."""

_NO_RUN: Final = "There is no run yet, so only the base answers; fine-tune one with %%finetune."


class QuestionError(BizassistError):
    """A question that cannot be answered as it is."""


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

    def ask(self, question: str, **options: Any) -> Comparison:
        """All answers, whole; options as for `stream`."""
        return list(self.stream(question, **options))[-1]

    def stream(
        self,
        question: str,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        strength: float = 1.0,
        conversation: Conversation | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Comparison]:
        """The comparison as it grows, after every token; the last one is whole. May be closed at any time.

        `who` is "base", "tuned" or both. `strength`, from 0 to 1.5, is what the tuned rows' adapters are multiplied by:
        0 is exactly the base, 1 exactly what was trained. Everyone goes on from what they said themselves in
        `conversation`, and what they answer now is added to it, also if the stream is closed before the end.

        Raises:
            QuestionError: for an empty question, one that leaves no room for an answer, or settings out of range.
            ModelError: if the model or an adapter cannot be loaded.
        """
        from bizassist_nb.assistant.decoding import Sampling

        sampling = Sampling(
            temperature=temperature, top_p=top_p, top_k=top_k, repetition_penalty=repetition_penalty, seed=seed
        )
        _check(question, max_new_tokens, strength, sampling)
        rows = self._rows(who)
        loaded = loaded_base(self._model)
        prompts, dropped = self._prompts(loaded, rows, question, conversation or Conversation(), max_new_tokens)
        no_run = None if self.runs or TUNED not in who else _NO_RUN
        comparison = begun = Comparison(
            question.strip(),
            dict.fromkeys((row.name for row in rows), ""),
            tuple(run.name for run in self.runs if any(row.run is run for row in rows)),
            strength,
            note=" ".join(filter(None, [no_run, dropped])) or None,
        )
        yield comparison
        try:
            for comparison in self._answers(loaded, rows, prompts, begun, max_new_tokens, sampling):
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
        max_new_tokens: int,
        sampling: "Sampling",
    ) -> Iterator[Comparison]:
        import torch

        from bizassist_nb.assistant.decoding import texts

        adapters = {run: loaded.adapter(run) for run in self.runs if any(row.run is run for row in rows)}
        loaded.use(list(adapters.values()))
        strengths = {
            adapter: [begun.strength if row.run is run else 0.0 for row in rows] for run, adapter in adapters.items()
        }
        answers = dict(begun.answers)
        lengths = dict.fromkeys(answers, 0)
        try:
            for number, text in texts(
                loaded.model,
                loaded.chat,
                prompts,
                strengths=strengths,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                prefix=loaded.prefix_cache,
            ):
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
        cut = tuple(name for name, length in lengths.items() if length == max_new_tokens)
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


def _check(question: str, max_new_tokens: int, strength: float, sampling: "Sampling") -> None:
    if not question.strip():
        raise QuestionError("the question is empty; write it in the cell below %%ask, or after %ask")
    for name, value, least, most, meaning in (
        ("max_new_tokens", max_new_tokens, 1, 100_000, ""),
        ("strength", strength, 0, STRONGEST, " (0 is the base, 1 as trained)"),
        ("temperature", sampling.temperature, 0, 5, " (0 takes the likeliest token each time)"),
        ("top_p", sampling.top_p, 0.01, 1, " (1 leaves no token out)"),
        ("top_k", sampling.top_k, 0, 1_000_000, " (0 leaves no token out)"),
        ("repetition_penalty", sampling.repetition_penalty, 0.1, 5, " (1 is none)"),
        ("seed", sampling.seed, 0, 2**63 - 1, ""),
    ):
        if not least <= value <= most:
            raise QuestionError(f"{name} = {value}: has to be from {least:g} to {most:,g}{meaning}")
