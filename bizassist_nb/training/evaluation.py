"""The loss of given answers under a model: a run's held-out rows, and general ones."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import DataError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.chat import Message, row_messages, with_examples
from bizassist_nb.data.overlap import group
from bizassist_nb.data.rows import Row, read_table
from bizassist_nb.data.tokens import IGNORED, ChatTokenizer, Example
from bizassist_nb.models.adapters import adapter_folder
from bizassist_nb.results.verdict import Score, assess, judge
from bizassist_nb.runs.records import AnswerCounts, Forgetting, Result
from bizassist_nb.runs.rows import prompt_examples, rows_of, validation_of
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training.scoring import Off, Pair, pairs, score


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the verdict is made from."""

    test: list[Pair]
    general: list[Pair]
    prompted: list[Score]
    """The test rows under base with examples in its prompt; empty where the model cannot read that much."""


class EvaluationSet:
    """What base and tuned are scored on: a run's held-out rows, and general rows of other kinds, which show what was
    forgotten. Those ship with the package and are not cut where training rows are, so all runs have the same.
    """

    def __init__(
        self, chat: ChatTokenizer, settings: Settings, training: Sequence[Row], sides: tuple[list[Row], list[Row]]
    ):
        """`sides` are the validation and the test rows, as `runs.rows.validation_of` gives them.

        Raises:
            DataError: if too few of them can be used.
        """
        system, (validation, test) = settings.system_prompt, sides
        with resources.as_file(resources.files("bizassist_nb.data") / "samples" / "general.jsonl") as path:
            general = read_table(str(path)).rows
            answers = [json.loads(line).get("known") for line in path.read_text("utf-8").splitlines()]
        held_out = {row.number: row for row in [*validation, *test]}
        self.held_out, self.too_long = chat.examples(
            list(held_out.values()), system_prompt=system, max_length=settings.max_length
        )
        self.split = validation != test
        """Whether validation rows are others than the test rows."""
        numbers = [{row.number for row in side} for side in sides]
        self.validation, self.test = ([one for one in self.held_out if one.number in side] for side in numbers)
        if len(self.test) < 2 or not self.validation:
            raise DataError("all held-out rows but one are longer than max_length; raise it, or raise held_out")
        self.general, _ = chat.examples(general, system_prompt=system, max_length=max(1024, settings.max_length))
        self._known = {one.number: _places(chat, one, answers[one.number - 1]) for one in self.general}
        self._rows = prompt_examples(training)
        self._prompted = [
            _prompted(chat, one, row_messages(held_out[one.number], system), self._rows) for one in self.test
        ]
        self._pad_id, self._seed = chat.pad_id, settings.seed
        self._questions = [{row.number: row.instruction for row in some} for some in (test, general)]
        self._groups = {row.number: group(row) for row in test}

    def score(self, model: Any, between: Callable[[], None] = lambda: None) -> list[Score]:
        """Scores of the validation rows, which the curve shows: all held-out rows where nothing is chosen by them."""
        return score(model, self.validation, pad_id=self._pad_id, between=between)

    def compare(self, model: Any, off: Off, between: Callable[[], None] = lambda: None) -> Scores:
        """Test and general rows under base and tuned, and test rows under the prompted base."""
        test, general = (
            pairs(model, off, some, pad_id=self._pad_id, between=between) for some in (self.test, self.general)
        )
        prompted: list[Score] = []
        if max(len(one.input_ids) for one in self._prompted) <= model.config.max_position_embeddings:
            with off():
                prompted = score(model, self._prompted, pad_id=self._pad_id, between=between)
        return Scores(test, general, prompted)

    def result(self, scores: Scores, answers: AnswerCounts | None) -> Result:
        """The verdict."""
        test, general = (
            ([one.base for one in some], [one.tuned for one in some]) for some in (scores.test, scores.general)
        )
        asked, general_asked = self._questions
        on_test = functools.partial(judge, tuned=test[1], seed=self._seed, questions=asked, groups=self._groups)
        prompted = None
        if scores.prompted:
            prompted = on_test(scores.prompted), tuple(row.number for row in self._rows)
        judged = on_test(test[0]), judge(*general, seed=self._seed, questions=general_asked)
        return assess(*judged, answers, prompted, self._forgetting(scores))

    def _forgetting(self, scores: Scores) -> Forgetting:
        """How far tuned has moved, and the questions with one answer that it lost and won.

        Such a question is answered rightly where the model, having read the given answer up to there, would have gone
        on with each of the known words' tokens (LAMBADA's measure: Paperno et al. 2016, arXiv:1606.06031).
        """
        known = [(one, places) for one in scores.general if (places := self._known[one.base.row])]
        right = [tuple(all(side[place] for place in places) for side in one.likeliest) for one, places in known]
        held_out, general = (
            sum(one.divergence for one in some) / sum(one.base.tokens for one in some)
            for some in (scores.test, scores.general)
        )
        return Forgetting(
            kl_held_out=held_out,
            kl_general=general,
            right_to_wrong=right.count((True, False)),
            wrong_to_right=right.count((False, True)),
            questions=len(right),
        )


def evaluate(run: RunDirectory) -> Result:
    """Score base and tuned anew and have both answer the fixed prompts, all with plain transformers; evaluation.json,
    answers.json and the run's model card are written anew, too.

    Raises:
        ModelError: if the run has no adapter.
        DataError: if its rows cannot be read.
        RunError: if they are not those it began with.
    """
    adapter_folder(run)  # what cannot be done is said before anything heavy is loaded
    _, training, held_out = rows_of(run)
    sides = validation_of(run, held_out)

    from bizassist_nb.assistant.decoding import scaled
    from bizassist_nb.results.model_card import write_card
    from bizassist_nb.training.fixed_prompts import answer_run

    loaded = loaded_base(run.model, run.environment.revision)
    adapter = loaded.adapter(run)
    evaluation_set = EvaluationSet(loaded.chat, run.settings, training, sides)
    loaded.use([adapter])
    scores = evaluation_set.compare(loaded.model, lambda: scaled(loaded.model, {}))
    result = evaluation_set.result(scores, answer_run(run))
    write_json(run.path / "evaluation.json", result)
    write_card(run)
    return result


def _prompted(chat: ChatTokenizer, example: Example, messages: list[Message], rows: Sequence[Row]) -> Example:
    """A test row with other rows as earlier turns; what is scored is the same."""
    answer = example.input_ids[len(chat.prompt(messages[:-1])) :]
    prompt = chat.prompt(with_examples(messages[:-1], rows))
    return dataclasses.replace(example, input_ids=prompt + answer, labels=[IGNORED] * len(prompt) + answer)


def _places(chat: ChatTokenizer, example: Example, words: str | None) -> list[int]:
    """The places of these words' tokens among the answer's."""
    if words is None:
        return []
    answer = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
    ends = [len(chat.decode(answer[:count])) for count in range(len(answer) + 1)]
    start = chat.decode(answer).index(words)
    return [place for place in range(len(answer)) if ends[place + 1] > start and ends[place] < start + len(words)]
