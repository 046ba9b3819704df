"""The assistant: asks base and tuned the same question, in one batch, and gives both answers."""

from collections.abc import Iterator
from typing import Any

from bizassist_nb.assistant.bases import LoadedBase, loaded_base
from bizassist_nb.assistant.comparison import BASE, TUNED, Comparison
from bizassist_nb.data.chat import conversation
from bizassist_nb.errors import BizassistError
from bizassist_nb.runs import Run
from bizassist_nb.settings import Settings


class QuestionError(BizassistError):
    """A question that cannot be answered as it is."""


class Assistant:
    """Answers questions as the base and as a run's tuned model, from one copy of the weights.

    Raises:
        ModelError: if the base or the run's adapter cannot be loaded.
    """

    def __init__(self, run: Run | None = None):
        """The assistant of a run; without one, the base that `model = "auto"` stands for, alone."""
        self.run = run
        self._settings = run.settings if run else Settings()
        self._loaded: LoadedBase | None = None

    def ask(self, question: str, **options: Any) -> Comparison:
        """Both answers, whole; options as for `stream`."""
        return list(self.stream(question, **options))[-1]

    def stream(
        self,
        question: str,
        *,
        who: tuple[str, ...] = (BASE, TUNED),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Comparison]:
        """The comparison as it grows, after every step of both; the last one is whole. May be closed at any time.

        Raises:
            QuestionError: for an empty question, or one that leaves no room for an answer.
            ModelError: if the model or the adapter cannot be loaded.
        """
        from tokenizers.decoders import DecodeStream

        from bizassist_nb.assistant.decoding import Sampling, decode

        _check(question, max_new_tokens, temperature)
        loaded = self._load()
        if self.run is None:
            who = (BASE,)
        adapter = loaded.adapter(self.run) if self.run and TUNED in who else None
        loaded.use([adapter] if adapter else [])
        prompt = loaded.chat.prompt(conversation(self._settings.system_prompt, [], question.strip()))
        room = loaded.model.config.max_position_embeddings - len(prompt)
        if room < max_new_tokens:
            raise QuestionError(
                f"the question has {len(prompt):,} tokens with its template and the model reads "
                f"{loaded.model.config.max_position_embeddings:,} at most, answer included: shorten it, or set "
                f"max_new_tokens below {max_new_tokens:,}"
            )
        texts = dict.fromkeys(who, "")
        streams = [DecodeStream(skip_special_tokens=True) for _ in who]  # gives whole characters only
        backend = loaded.chat.tokenizer.backend_tokenizer
        tokens = decode(
            loaded.model,
            [prompt] * len(who),
            strengths={adapter: [float(name == TUNED) for name in who]} if adapter else {},
            stop_ids=loaded.chat.stop_ids,
            pad_id=loaded.chat.pad_id,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, seed=seed),
        )
        yield self._comparison(question, texts)
        lengths = dict.fromkeys(who, 0)
        for row, token in tokens:
            texts[who[row]] += streams[row].step(backend, token) or ""
            lengths[who[row]] += 1
            yield self._comparison(question, texts)
        cut = tuple(name for name, length in lengths.items() if length == max_new_tokens)
        yield self._comparison(question, {name: text.strip() for name, text in texts.items()}, cut)

    def _load(self) -> LoadedBase:
        if self._loaded is None:
            self._loaded = loaded_base(self.run.environment.get("model", self._settings.model) if self.run else "auto")
        return self._loaded

    def _comparison(self, question: str, texts: dict[str, str], cut: tuple[str, ...] = ()) -> Comparison:
        note = None if self.run else "There is no run yet, so only the base answers; fine-tune one with %%finetune."
        run = self.run.name if self.run else None
        return Comparison(question.strip(), texts.get(BASE), texts.get(TUNED), run, cut, note)


def _check(question: str, max_new_tokens: int, temperature: float) -> None:
    if not question.strip():
        raise QuestionError("the question is empty; write it in the cell below %%ask, or after %ask")
    if max_new_tokens < 1:
        raise QuestionError(f"max_new_tokens = {max_new_tokens}: has to be 1 or more")
    if not 0 <= temperature <= 5:
        raise QuestionError(f"temperature = {temperature}: has to be from 0 (the likeliest token each time) to 5")
