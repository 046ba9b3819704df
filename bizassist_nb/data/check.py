"""The data check: what is odd about the rows of a source, with their numbers and what to do. It drops nothing."""

import re
import statistics
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final, NamedTuple

from bizassist_nb.core.errors import cut
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.overlap import near_duplicates
from bizassist_nb.data.rows import Rejected, Row, folded, read_rows

SURE: Final = 0.9
"""Probability from which a text is taken to be in the language found."""
_NAMED: Final = 5
"""Rows named of each finding."""
_COMPARED: Final = 10_000
"""The first rows, which are compared with each other and whose languages are found; that takes some 1 ms a row."""
_LETTERS: Final = 4
"""Letters a token, as in English; the panel counts tokens."""
_TELLING: Final = 60
"""Letters from which a language is told."""
_LABELS: Final = 30
"""Most different answers that are taken for labels, if ten times as many rows share them."""

_EMAIL: Final = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_PHONE: Final = re.compile(
    r"(?<![\w.])(?:\+\d[\d ()./-]{7,15}\d|\(?0[1-9]\d{1,3}\)?[ /-]\d[\d -]{4,9}\d|\(?\d{3}\)?[ .-]\d{3}[.-]\d{4})"
    r"(?![\w-])"
)
_REMEDIES: Final = {
    "repeat an earlier row": "leave them out, or they are learned twice",
    "nearly repeat another row": "leave one of each pair out",
    "are cut": "raise max_length, or shorten them",
    "have an answer at least eight times as long as most": "shorten it, if answers are not to be as long",
    "have an answer of one or two words, where most are long": "complete it, or leave the row out",
    "have an answer that repeats the question": "write the answer alone",
    "hold an e-mail address": "put another in its place: the model may repeat it to anyone",
    "hold a phone number": "put another in its place: the model may repeat it to anyone",
    "are in another language than most": "leave them out, if the model is not to answer in it",
}


class Finding(NamedTuple):
    """Rows with something in common that a person should know of."""

    what: str
    total: int
    named: tuple[int, ...]
    """The numbers of the first of them."""
    remedy: str

    def cells(self) -> tuple[str, str, str, str]:
        """As a line of a table."""
        rows = ", ".join(map(str, self.named)) + (", …" if self.total > len(self.named) else "")
        return f"{self.total:,}", self.what, f"rows {rows}", self.remedy


def check_source(settings: Settings) -> tuple[str, list[Finding]]:
    """(what was read, what was found) of all rows that the settings name, a row at a time.

    Raises:
        DataError: as `read_table`.
    """
    check = Check(settings.max_length)
    table = read_rows(settings, check.add)
    return f"{table.source}: {table.usable:,} rows can be used", check.findings(table.rejected)


class Check:
    """Finds what is odd about rows added one by one; some 150 bytes a row stay in memory, and the first rows."""

    def __init__(self, max_length: int, tokens: Sequence[int] | None = None):
        """`tokens` are those of each row to be added, if they are known; else they are estimated."""
        self._most, self._tokens = max_length, tokens
        self._found: dict[str, array[int]] = defaultdict(lambda: array("q"))
        self._seen: set[int] = set()
        self._numbers, self._words = array("q"), array("q")
        self._labels: Counter[str] | None = Counter()
        self._rarest: dict[str, int] = {}
        self._first: list[Row] = []

    def add(self, row: Row) -> None:
        """Look at a row."""
        asked, answer = folded(row.instruction), folded(row.response)
        key = hash((asked, folded(row.context), row.history, answer))
        text = f"{row.instruction}\n{row.context}\n{row.response}"
        length = len(text) / _LETTERS if self._tokens is None else self._tokens[len(self._numbers)]
        self._note("repeat an earlier row", row, key in self._seen)
        self._note("are cut", row, length > self._most)
        self._note("have an answer that repeats the question", row, answer.startswith(asked) and asked.count(" ") > 2)
        self._note("hold an e-mail address", row, bool(_EMAIL.search(text)))
        self._note("hold a phone number", row, bool(_PHONE.search(text)))
        self._seen.add(key)
        self._numbers.append(row.number)
        self._words.append(row.response.count(" ") + 1)
        if self._labels is not None:
            self._labels[row.response] += 1
            self._rarest.setdefault(row.response, row.number)
            if len(self._labels) > _LABELS:
                self._labels = None
        if len(self._first) < _COMPARED:
            self._first.append(row)

    def _note(self, what: str, row: Row, found: bool) -> None:
        if found:
            self._found[what].append(row.number)

    def findings(self, rejected: Iterable[Rejected] = ()) -> list[Finding]:
        """What was found of the rows added, and of those that cannot be used."""
        self._compare()
        reasons = defaultdict[str, list[int]](list)
        for bad in rejected:
            reasons[bad.reason].append(bad.number)
        found = []
        for reason, rows in reasons.items():
            problem, _, remedy = reason.partition("; ")
            found.append(_finding(f"cannot be used: {problem}", rows, remedy or "correct them"))
        for what, remedy in _REMEDIES.items():
            if numbers := self._found.get(what):
                found.append(_finding(what, numbers, remedy))
        return found + self._balance()

    def _compare(self) -> None:
        """Find what takes others to see it."""
        languages = {row.number: language(f"{row.instruction}\n{row.response}") for row in self._first}
        usual = Counter(filter(None, languages.values())).most_common(1)
        for row in self._first:
            found = languages[row.number]
            self._note("are in another language than most", row, found is not None and found != usual[0][0])
        exact = set(self._found["repeat an earlier row"])
        contexts = {row.number: folded(row.context) for row in self._first}
        near = {
            max(one, other)
            for one, other in near_duplicates(self._first, self._first)
            if one != other and (contexts[one] != contexts[other] or not contexts[one])  # else two questions on a text
        }
        self._found["nearly repeat another row"].extend(sorted(near - exact))
        typical = statistics.median(self._words) if self._words else 0
        for number, words in zip(self._numbers, self._words, strict=True):
            if words > max(8 * typical, 100):
                self._found["have an answer at least eight times as long as most"].append(number)
            elif words <= 2 and typical >= 10:
                self._found["have an answer of one or two words, where most are long"].append(number)

    def _balance(self) -> list[Finding]:
        """How often each label is the answer, if answers are labels."""
        labels = self._labels or Counter()
        if not 1 < len(labels) <= len(self._numbers) / 10:
            return []
        shares = ", ".join(f"{cut(label, 30)} {count:,}" for label, count in labels.most_common())
        (_, most), (rarest, least) = labels.most_common()[0], labels.most_common()[-1]
        remedy = (
            "add rows of the rare ones, or leave out some of the others" if most > 4 * least else "they are balanced"
        )
        return [Finding(f"answers are labels: {shares}", len(self._numbers), (self._rarest[rarest],), remedy)]


def language(text: str) -> str | None:
    """The language of a text, by py3langid; None for one too short to tell, or of several."""
    found, sure = identifier().rank(text[:1000])[0]
    return str(found) if sure > SURE and len(text) >= _TELLING else None


@cache
def identifier() -> Any:
    """py3langid's identifier of languages, with probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)  # the module's own gives no probabilities


def _finding(what: str, rows: Sequence[int], remedy: str) -> Finding:
    return Finding(what, len(rows), tuple(rows[:_NAMED]), remedy)
