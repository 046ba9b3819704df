"""What the terms of the field mean, in words for people who do not know them; pages show them as tooltips."""

import html
import re
from collections.abc import Mapping
from typing import Final

TERMS: Final[Mapping[str, str]] = {
    "held-out": "rows kept out of training: what is measured on them was learned, not memorised",
    "rows kept out of training": "held-out rows: what is measured on them was learned, not memorised",
    "general questions": "general rows: 50 questions of other kinds, which show what the model has forgotten",
    "fixed prompts": "the business questions that base and tuned answer after training",
    "base": "the model as it was before training",
    "tuned": "the model with what this run has learned",
    "adapter": "the weights that training adds to the model (LoRA); the model's own stay as they are",
    "loss": "how surprising the right answers are to the model, on average; lower is better",
    "perplexity": "e to the power of the loss: how many words the model hesitates between, on average; lower is better",
    "nats": "the unit of loss: 0.1 less means that right answers are about 10 % less surprising",
    "95 % interval": "where the true change lies, as far as so few rows can tell",
    "KL divergence": "how far the probabilities of the next word have moved; 0 is not at all",
    "trainable parameters": "the weights that training changes",
    "checkpointing": "computing some things twice to save memory",
    "how a step is cut": "the fit: how many examples go through the model at once, so that memory suffices",
    "tokens": "pieces of words, as the model reads them",
}
_SKIPPED: Final = r"<(svg|pre|style|details|abbr)\b.*?</\1>|<(?:[^>\"']|\"[^\"]*\"|'[^']*')*>"
_FOUND: Final = re.compile(
    rf"{_SKIPPED}|(?<![\w-])(?P<term>{'|'.join(sorted(map(re.escape, TERMS), key=len, reverse=True))})(?![\w/])",
    re.DOTALL,
)


def explain(page: str) -> str:
    """HTML in which each term has its meaning as a tooltip where it stands first.

    What is drawn, folded away or as it was printed stays as it is.
    """
    explained: set[str] = set()

    def marked(found: re.Match[str]) -> str:
        term = found["term"]
        if term is None or term in explained:
            return found[0]
        explained.add(term)
        return f'<abbr title="{html.escape(TERMS[term])}">{term}</abbr>'

    return _FOUND.sub(marked, page)
