"""Has a model broken down? Signs that can be read off its answers without knowing what would be right.

A low loss does not show them: a model can predict given answers well and still, left to itself, repeat its prompt
without end.
"""

import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Final

SIGNS: Final = {
    "repeats": "repeat the prompt",
    "loops": "loop",
    "empty": "are empty",
    "language": "leave the language of the question",
}
"""Each sign of a breakdown, and its words: "answers that …"."""

_REPEATED: Final = 0.3
"""Share of 4-grams of tokens that occurred before, above which an answer loops; of human answers in Dolly 15k, cut at
128 tokens, 0.5 % have more."""
_SURE: Final = 0.9
"""Probability from which a language counts as known."""


@cache
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


def counted(answers: Sequence[dict[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """The answers' signs, counted: for "base" and "tuned" those that "stopped" by themselves, have each of SIGNS, and
    are "sound" (have none).

    `answers` have a "prompt", and for "base" and "tuned" a "text", whether it "stopped", and its "signs". "verdict" is
    "hurt" where tuned is sound on so many fewer prompts that chance alone would do it less than once in forty (a sign
    test over the prompts on which just one of the two is sound), else "no difference" or, the other way, "helped".
    """
    from scipy.stats import binomtest

    sound = [[not answer[who]["signs"] for who in ("base", "tuned")] for answer in answers]
    worse = sum(base and not tuned for base, tuned in sound)
    better = sum(tuned and not base for base, tuned in sound)
    telling = worse != better and binomtest(worse, worse + better).pvalue < 0.05
    return {
        "prompts": len(answers),
        "max_new_tokens": max_new_tokens,
        **{who: _counts([answer[who] for answer in answers]) for who in ("base", "tuned")},
        "verdict": ("hurt" if worse > better else "helped") if telling else "no difference",
    }


def _counts(answers: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {
        "stopped": sum(answer["stopped"] for answer in answers),
        **{sign: sum(sign in answer["signs"] for answer in answers) for sign in SIGNS},
        "sound": sum(not answer["signs"] for answer in answers),
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
    (asked, sure), (answered, sure_too) = (_identifier().rank(text)[0] for text in (prompt, answer))
    return bool(asked != answered and min(sure, sure_too) > _SURE)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # the module's own gives no probabilities
