"""The fixed prompts, answered by base and tuned, and looked at for signs of a breakdown.

Run as `python -m bizassist_nb.training.fixed_prompts RUN_DIRECTORY` it is a process of its own: where Unsloth has
patched the worker's libraries, base and tuned cannot answer there in one batch (its decoding wants one adapter strength
for all rows), and what is to be judged is what the user's chat will say, which comes from plain transformers.
"""

import gc
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
from bizassist_nb.data.chat import conversation
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models import base as models
from bizassist_nb.results.degeneration import counted, prompts, signs
from bizassist_nb.runs.run import RunDirectory

_WHO: Final = ("base", "tuned")


def answer_run(run: RunDirectory) -> dict[str, Any]:
    """Have a run's base and tuned answer, with the models of this process, and write answers.json; the signs, counted.

    Raises:
        ModelError: if the run has no adapter, or a model cannot be loaded.
    """
    from bizassist_nb.assistant.loaded import loaded_base

    loaded = loaded_base(run.model)
    adapter = loaded.adapter(run)
    loaded.use([adapter])
    answers = answer(run, loaded.model, loaded.chat, adapter)
    write_json(run.path / "answers.json", answers)
    return counted(answers, max_new_tokens())


def answer_apart(run: RunDirectory) -> dict[str, Any]:
    """The same in a fresh process, once this one has let go of its model.

    Raises:
        RunError: if that process fails; what it printed is in the worker's log.
    """
    import torch

    gc.collect()  # a trainer and its callbacks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    command = [sys.executable, "-m", "bizassist_nb.training.fixed_prompts", str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:  # noqa: S603 - no shell, our own module
        status = process.wait()
    if status:
        raise RunError(
            f"the fixed prompts could not be answered (status {status}; the reason stands at the end of the "
            f"run's worker.log). Try again with: bizassist evaluate {run.name}"
        )
    return counted(run.answers, max_new_tokens())


def answer(
    run: RunDirectory, model: Any, chat: ChatTokenizer, adapter: str, between: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Answer greedily, all prompts as base and as tuned in one batch; what answers.json holds.

    `model` is a plain PEFT model, on which only `adapter` is active. `between` is called between tokens; what it raises
    ends the answering.
    """
    from bizassist_nb.assistant.decoding import Batch, decode

    asked = prompts()
    ids = [chat.prompt(conversation(run.settings.system_prompt, [], prompt)) for prompt in asked]
    limit = max_new_tokens()
    strengths = {adapter: [0.0] * len(ids) + [1.0] * len(ids)}
    batch = Batch(ids + ids, strengths, chat.stop_ids, chat.pad_id)
    training = model.training
    model.eval()
    given: list[list[int]] = [[] for _ in range(2 * len(ids))]
    try:
        for row, token in decode(model, batch, Generation(max_new_tokens=limit)):
            given[row].append(token)
            between()
    finally:
        model.train(training)
    return [
        {
            "prompt": prompt,
            **{
                who: _answer(chat, prompt, given[place + len(asked) * number], limit) for number, who in enumerate(_WHO)
            },
        }
        for place, prompt in enumerate(asked)
    ]


def max_new_tokens() -> int:
    """Length of an answer at most: short enough to cost little beside training, long enough for a loop to show."""
    return 64 if models.device() == "cpu" else 160


def _answer(chat: ChatTokenizer, prompt: str, tokens: list[int], limit: int) -> dict[str, Any]:
    text = str(chat.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return {"text": text, "stopped": len(tokens) < limit, "signs": signs(prompt, text, tokens)}


def _end_with_the_worker() -> None:
    """The worker holds the other end of this pipe; where it is killed, nobody is left to answer for."""
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_worker, daemon=True).start()
    answer_run(RunDirectory(Path(sys.argv[1])))
