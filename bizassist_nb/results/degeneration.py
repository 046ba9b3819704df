"""Has a model broken down? Signs that can be read off its answers without knowing what would be right.

A low loss does not show them: a model can predict given answers well and still, left to itself, repeat its prompt
without end.
"""

import re
from collections.abc import Sequence
from importlib import resources
from typing import Final

from bizassist_nb.data.check import SURE, identifier
from bizassist_nb.runs.records import Answer, AnswerCounts, Answers

SIGNS: Final = {
    "repeats": "repeat the prompt",
    "loops": "loop",
    "empty": "are empty",
    "language": "leave the language of the question",
    "endless": "do not stop",
}
"""Each sign of a breakdown, and its words: "answers that …"."""

_REPEATED: Final = 0.3
"""Share of 4-grams of tokens that occurred before, above which an answer loops; of human answers in Dolly 15k, cut at
128 tokens, 0.5 % have more."""
PENALTY: Final = 1.1
"""A light repetition penalty: small models that answer greedily loop without one."""
_ENDLESS: Final = 0.25


def prompts() -> tuple[str, ...]:
    """The business prompts, always the same, that base and tuned answer at the end of a run."""
    text = (resources.files("bizassist_nb.data") / "samples" / "prompts.txt").read_text("utf-8")
    return tuple(text.splitlines())


def signs(prompt: str, answer: str, tokens: Sequence[int]) -> list[str]:
    """The keys of SIGNS that hold for an answer, given as text and as token ids.

    Loops are measured as seq-rep-4 (Welleck et al. 2020, arXiv:1908.04319, section 4.3): the share of 4-grams that are
    not the first of their kind.
    """
    words = _words(answer)
    if not words:
        return ["empty"]
    found = []
    if _repeats(_words(prompt), words):
        found.append("repeats")
    if repetition(tokens) > _REPEATED:
        found.append("loops")
    if _leaves_language(prompt, answer):
        found.append("language")
    return found


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before, from 0 to 1; 0 for fewer than 16 tokens, which can hardly loop."""
    if len(tokens) < 16:
        return 0.0
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams)


def endless(base: Answer, tuned: Answer, learned: float) -> bool:
    """Whether tuned goes on to a limit that is long enough to tell: base has ended before it, and the answers learned
    take a quarter of it at most; `learned` is their mean length as a share of the limit.
    """
    return base.stopped and not tuned.stopped and learned <= _ENDLESS


def counted(answers: Sequence[Answers], max_new_tokens: int) -> AnswerCounts:
    """The signs of the answers, counted, and of those with a light repetition penalty.

    The verdict is "hurt" where tuned is sound on so many fewer prompts that chance alone would do it less than once in
    twenty: a one-sided exact sign test over the prompts on which just one of the two is sound.
    """
    penalised = [
        Answers(prompt=one.prompt, base=one.penalised[0], tuned=one.penalised[1]) for one in answers if one.penalised
    ]
    return _counted(answers, max_new_tokens, _counted(penalised, max_new_tokens) if penalised else None)


def _counted(answers: Sequence[Answers], max_new_tokens: int, penalised: AnswerCounts | None = None) -> AnswerCounts:
    from scipy.stats import binomtest

    sound = [(not one.base.signs, not one.tuned.signs) for one in answers]
    worse, better = sound.count((True, False)), sound.count((False, True))
    telling = worse > better and binomtest(worse, worse + better, alternative="greater").pvalue < 0.05
    return AnswerCounts(
        prompts=len(answers),
        max_new_tokens=max_new_tokens,
        base=_counts([one.base for one in answers]),
        tuned=_counts([one.tuned for one in answers]),
        verdict="hurt" if telling else "no difference",
        penalised=penalised,
    )


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "stopped": sum(answer.stopped for answer in answers),
        **{sign: sum(sign in answer.signs for answer in answers) for sign in SIGNS},
        "sound": sum(not answer.signs for answer in answers),
    }


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _repeats(asked: list[str], answered: list[str]) -> bool:
    """Whether the answer begins with the whole prompt, or consists of it for the most part."""
    if asked and answered[: len(asked)] == asked:
        return True
    known = set(zip(asked, asked[1:], asked[2:], strict=False))
    grams = list(zip(answered, answered[1:], answered[2:], strict=False))
    return bool(grams) and sum(gram in known for gram in grams) > len(grams) / 2


def _leaves_language(prompt: str, answer: str) -> bool:
    (asked, sure), (answered, sure_too) = (identifier().rank(text)[0] for text in (prompt, answer))
    return bool(asked != answered and min(sure, sure_too) > SURE)
