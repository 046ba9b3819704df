"""Base and tuned in one batch against one after the other, greedy, and what a conversation's turns wait for.

Usage: pair.py RUN_DIRECTORY

Four questions, all asked of both together, then all of the base, then all of tuned, three times over; the least time of
each question counts. System prompt and template are shared with the question before, whichever way is taken. At first
every answer goes on for 64 tokens, beyond its end; then a conversation of eight such turns, seconds to the first token
of each, with what is kept of the turn before and without. Last, each answer ends where it ends, at 64 tokens at most,
and the longer one is alone in the batch from there on.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from bizassist_nb import Assistant
from bizassist_nb.api import Run
from bizassist_nb.assistant.comparison import Conversation
from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.generation import Generation
from bizassist_nb.data.tokens import ChatTokenizer

QUESTIONS = [
    "Suggest three concrete ways to use machine learning in predictive maintenance for production lines.",
    "How should we price a new feature?",
    "List two risks of entering the Brazilian market.",
    "Should a factory of 40 people buy cameras for quality control, and what should it measure first?",
]
TURNS = 8

run = Run(Path(sys.argv[1]))
assistant, loaded = Assistant(run), loaded_base(run.model)


def ask(question: str, *who: str) -> tuple[float, int]:
    """Seconds, and tokens of all answers."""
    start = time.perf_counter()
    updates = sum(1 for _ in assistant.stream(question, Generation(max_new_tokens=64), who=who))
    return time.perf_counter() - start, updates - 2  # one before the first token, one after the last


def each_question() -> dict[str, object]:
    ways = [("base", "tuned"), ("base",), ("tuned",)]
    turns = [{who: [ask(question, *who) for question in QUESTIONS] for who in ways} for _ in range(3)]
    pair, base, tuned = ([min(turn[who][i] for turn in turns) for i in range(len(QUESTIONS))] for who in ways)
    sequence = [b[0] + t[0] for b, t in zip(base, tuned, strict=True)]
    tokens = [(b[1], t[1]) for b, t in zip(base, tuned, strict=True)]
    return {
        "pair_s": sum(seconds for seconds, _ in pair),
        "one_after_the_other_s": sum(sequence),
        "ratio": sum(seconds for seconds, _ in pair) / sum(sequence),
        "ratio_of_steps": sum(map(max, tokens)) / sum(map(sum, tokens)),
        "ratios": [p[0] / s for p, s in zip(pair, sequence, strict=True)],
        "tokens": tokens,
    }


def conversation(before: Callable[[], None]) -> list[float]:
    """Seconds to the first token of each turn."""
    talk, seconds = Conversation(), []
    loaded.forget_cache()
    for turn in range(TURNS):
        before()
        start = time.perf_counter()
        stream = assistant.stream(QUESTIONS[turn % len(QUESTIONS)], Generation(max_new_tokens=64), conversation=talk)
        next(stream), next(stream)
        seconds.append(time.perf_counter() - start)
        list(stream)
    return seconds


ask(QUESTIONS[0], "base", "tuned")  # loads the adapter
with patch.object(ChatTokenizer, "stop_ids", frozenset()):
    found = {"64_tokens_each": each_question()}
    times = [(conversation(lambda: None), conversation(loaded.forget_cache)) for _ in range(2)]
kept, forgotten = ([min(turn) for turn in zip(*way, strict=True)] for way in zip(*times, strict=True))
found |= {"to_their_ends": each_question(), "first_token_s": kept, "first_token_without_s": forgotten}
print(json.dumps(found))
