"""The fixed prompts, answered by base and tuned, and looked at for signs of a breakdown.

Run as `python -m bizassist_nb.training.fixed_prompts RUN_DIRECTORY` it is a process of its own: where Unsloth has
patched the worker's libraries, base and tuned cannot answer there in one batch (its decoding wants one adapter strength
for all rows), and what is to be judged is what the user's chat will say, which comes from plain transformers.
"""

import gc
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.chat import conversation, row_messages
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models import base as models
from bizassist_nb.results.degeneration import PENALTY, counted, endless, prompts, signs
from bizassist_nb.runs.records import Answer, AnswerCounts, Answers, Data
from bizassist_nb.runs.rows import rows_of, validation_of
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training.distributed.rank import Rank, this_rank
from bizassist_nb.training.memory import in_halves

_PROMPTS: Final = 40
_LONGEST: Final = 512
"""Tokens of a test row's question that is among the prompts."""


def answer_run(run: RunDirectory) -> AnswerCounts:
    """Have a run's base and tuned answer, with the models of this process, and write answers.json; the signs, counted.

    Raises:
        ModelError: if the run has no adapter, or a model cannot be loaded.
    """
    from bizassist_nb.assistant.loaded import loaded_base

    loaded = loaded_base(run.model, run.environment.revision)
    adapter = loaded.adapter(run)
    loaded.use([adapter])
    answers = answer(run, loaded.model, loaded.chat, adapter)
    write_json(run.path / "answers.json", answers)
    return counted(answers, max_new_tokens())


def answer_apart(run: RunDirectory) -> list[Answers]:
    """The same in a fresh process, once this one has let go of its model.

    Raises:
        RunError: if that process fails; what it printed is in the worker's log.
    """
    import torch

    gc.collect()  # a trainer and its callbacks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [sys.executable, "-m", "bizassist_nb.training.fixed_prompts", str(run.path)]
    alone = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}  # see `this_rank`
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=alone) as process:  # noqa: S603 - no shell, our own module
        status = process.wait()
    if status:
        raise RunError(
            f"their process ended with status {status} (the reason stands at the end of the run's worker.log); "
            f"try again with: bizassist evaluate {run.name}"
        )
    return run.answers


def answer(
    run: RunDirectory, model: Any, chat: ChatTokenizer, adapter: str, between: Callable[[], None] = lambda: None
) -> list[Answers]:
    """Answer greedily, all prompts as base and as tuned in one batch, and each again with a light repetition penalty:
    fewer at once where memory runs out. Of several ranks with whole bases each answers its share, and all have all.

    `model` is a plain PEFT model, on which only `adapter` is active. `between` is called between tokens; what it raises
    ends the answering.
    """
    from bizassist_nb.assistant.cuda import decode_graph
    from bizassist_nb.assistant.decoding import Batch, decode

    limit = max_new_tokens()
    questions, ids = zip(*_asked(run, chat), strict=True)
    most = decode_graph.most_rows(model, max(map(len, ids)) + limit)
    size = most // 4 or len(ids)  # more rows would go through the modules, which take longer than several such batches

    def tokens(ids: list[list[int]]) -> list[tuple[list[int], ...]]:
        """Tokens of four answers to each prompt: base's and tuned's, and both again with a light repetition penalty."""
        count = len(ids)
        strengths = ([0.0] * count + [1.0] * count) * 2
        penalties = [1.0] * 2 * count + [PENALTY] * 2 * count
        batch = Batch(ids * 4, {adapter: strengths}, chat.stop_ids, chat.pad_id, penalties)
        given: list[list[int]] = [[] for _ in batch.prompts]
        for row, token in decode(model, batch, Generation(max_new_tokens=limit)):
            given[row].append(token)
            between()
        return list(zip(*(given[start : start + count] for start in range(0, 4 * count, count)), strict=True))

    def in_batches(ids: list[list[int]]) -> list[tuple[list[int], ...]]:
        return [each for s in range(0, len(ids), size) for each in in_halves(tokens, ids[s : s + size])]

    model.eval()
    if not (sharded := this_rank().sharded):
        models.unpack(model)
    rank = Rank() if sharded else this_rank()  # a pass of a sharded base takes all ranks
    given = rank.shared(list(ids), in_batches)
    data = run.last(Data)
    learned = data.training.trained_tokens / max(1, data.training.rows) if data else limit
    return [_answers(chat, prompt, each, learned) for prompt, each in zip(questions, given, strict=True)]


def _answers(chat: ChatTokenizer, prompt: str, given: tuple[list[int], ...], learned: float) -> Answers:
    """The four answers; `learned` is the mean length of those trained on, in tokens."""
    limit = max_new_tokens()
    found = []
    for ids in given:
        text = str(chat.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        found.append(Answer(text=text, stopped=len(ids) < limit, signs=signs(prompt, text, ids)))
    for base, tuned in (found[:2], found[2:]):
        if endless(base, tuned, learned / limit):
            tuned.signs.append("endless")
    return Answers(prompt=prompt, base=found[0], tuned=found[1], penalised=(found[2], found[3]))


def _asked(run: RunDirectory, chat: ChatTokenizer) -> list[tuple[str, list[int]]]:
    """The prompts, each with its ids: the fixed ones, on a GPU with questions of test rows up to 40 in all."""
    system = run.settings.system_prompt
    asked = [(each, chat.prompt(conversation(system, [], each))) for each in prompts()]
    if models.device() == "cpu":  # where more of them would take minutes
        return asked
    _, test = validation_of(run, rows_of(run)[2])
    more = ((row.instruction, chat.prompt(row_messages(row, system)[:-1])) for row in test)
    return [*asked, *itertools.islice((each for each in more if len(each[1]) <= _LONGEST), _PROMPTS - len(asked))]


def max_new_tokens() -> int:
    """Length of an answer at most: short enough to cost little beside training, long enough for a loop to show."""
    return 64 if models.device() == "cpu" else 160


if __name__ == "__main__":
    # The worker holds the other end of this pipe; where it is killed, nobody is left to answer for.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    answer_run(RunDirectory(Path(sys.argv[1])))
