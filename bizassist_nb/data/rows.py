"""Rows to learn from: read from any of the accepted sources, checked one by one, and split.

Nothing is dropped silently: a row that cannot be used is listed with its number and the reason.
"""

import contextlib
import dataclasses
import functools
import itertools
import random
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from bizassist_nb.core.errors import DataError, brief, printable
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.formats import BadRowError, row_of
from bizassist_nb.data.formats import Row as Row  # rows are what others come here for
from bizassist_nb.data.sources import Records, Source, comes_at_once, path_of, reader, source_of

_HELD_OUT_SEED: Final = 0
"""Of the order in which rows are held out, so that runs on the same data have the same ones."""
_BEGINNING: Final = 1000
"""Rows of a file that are looked at before a run is started: some 50 ms of Dolly's."""
_SIGNS: Final = re.compile(r"[\W_]+")
"""White space and punctuation."""


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why."""

    number: int
    reason: str


def refused_words(rejected: "Sequence[Rejected]") -> str:
    """A warning about rows of a source that cannot be used."""
    first = rejected[0]
    return (
        f"{len(rejected):,} rows of the data cannot be used; the first is row {first.number}: {first.reason}. Correct "
        "them, or take them out"
    )


@dataclasses.dataclass(frozen=True)
class Table:
    """What a source holds."""

    source: str
    """Where the rows came from, in words."""
    fingerprint: str
    """SHA-256 of the file, or of the rows of a hub data set."""
    usable: int
    rejected: tuple[Rejected, ...]
    rows: tuple[Row, ...] = ()
    """All usable ones, where they were asked for."""


def read_table(data: str, columns: Mapping[str, str] | None = None) -> Table:
    """Read all rows of a source (`Settings.data`), with `Settings.columns` where names are not recognised.

    Raises:
        DataError: if the source is missing, unreachable, empty, of an unknown kind, or holds no usable row.
    """
    rows: list[Row] = []
    table = read_rows(Settings(data=data, columns=columns or {}), rows.append)
    return dataclasses.replace(table, rows=tuple(rows))


def read_rows(settings: Settings, take: Callable[[Row], object]) -> Table:
    """Give each row of a source to `take`, which need not hold them all; the source without its rows.

    Raises:
        DataError: as `read_table`.
    """
    usable = itertools.count()
    source = open_source(settings)
    with _said_of(settings.data):
        rejected = _check(source.words, source.records(None), settings, lambda row: (take(row), next(usable)))
    return Table(source.words, source.fingerprint, next(usable), rejected)


def open_source(settings: Settings) -> Source:
    """The source that `Settings.data` names, with its fingerprint.

    Raises:
        DataError: if it is missing, unreachable, or of an unknown kind.
    """
    with _said_of(settings.data):
        return source_of(settings)


def check_beginning(settings: Settings) -> None:
    """Look at the first 1,000 rows of a file, so that a person is told at once what cannot be used.

    What takes longer is left to the worker: Dolly, what is on the hub, a .json of more than 16 MiB, an .xlsx of one.

    Raises:
        DataError: if the file is missing, cannot be read, has no usable row there, or has too few rows in all.
    """
    with _said_of(settings.data):
        path = None if settings.data.startswith("hf://") else path_of(settings)
        if path is None or not comes_at_once(path):
            return
        keys = _Keys(settings.train_on)
        records = reader(path)(None)
        _check(str(path), itertools.islice(records, _BEGINNING), settings, keys.add)
        if next(records, None) is None:  # that were all
            keys.split(subset=settings.subset, held_out=settings.held_out, seed=settings.seed)


def draw(source: Source, settings: Settings, *, exact: bool = False) -> tuple[Table, list[Row], list[Row]]:
    """(the source without its rows, training rows, held-out rows) of a run: `split`, with only these rows in memory.

    `exact` compares texts with their punctuation, as runs begun before `runs.rows.SPLIT` was 3 do.

    Raises:
        DataError: as `read_table` and `split`.
    """
    keys = _Keys(settings.train_on, exact=exact)
    with _said_of(settings.data):
        rejected = _check(source.words, source.records(None), settings, keys.add)
        places = keys.split(subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
        training, held = ([keys.numbers[place] for place in some] for some in places)
        wanted = {*training, *held}
        records = (each for each in source.records(wanted) if each[0] in wanted)
        rows = {number: row_of(number, record, settings) for number, record in records}
    table = Table(source.words, source.fingerprint, len(keys.numbers), rejected)
    return table, [rows[number] for number in training], [rows[number] for number in held]


def split(
    rows: Sequence[Row], *, subset: int, held_out: int, seed: int, train_on: str = "response"
) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows), the latter drawn first; no training row has a question or context of theirs, nor
    learns their answers among its earlier turns (unless `train_on` = "last").

    Raises:
        DataError: if there are too few rows.
    """
    keys = _Keys(train_on)
    for row in rows:
        keys.add(row)
    training, held = keys.split(subset=subset, held_out=held_out, seed=seed)
    return [rows[place] for place in training], [rows[place] for place in held]


@contextlib.contextmanager
def _said_of(data: str) -> Iterator[None]:
    """Raise a DataError for what the system will not read."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or brief(error)
        raise DataError(f"{data} cannot be read ({reason}); check that it is there and that you may read it") from error


def _check(words: str, records: Records, settings: Settings, take: Callable[[Row], object]) -> tuple[Rejected, ...]:
    """Give each usable row to `take`; those that cannot be used."""
    usable, rejected = 0, []
    for number, record in records:
        try:
            take(row_of(number, record, settings))
            usable += 1
        except BadRowError as problem:
            rejected.append(Rejected(number, printable(str(problem))))  # names in it may hold half characters
    if not usable and not rejected:
        raise DataError(f"{words} holds no rows")
    if not usable:
        reasons = {bad.reason: bad.number for bad in reversed(rejected)}  # each with the first row that has it
        first = "; ".join(f"row {number}: {reason}" for reason, number in list(reversed(reasons.items()))[:3])
        raise DataError(f"{words} holds no usable row among {len(rejected):,}: {first}")
    return tuple(rejected)


class _Keys:
    """What decides how rows are split, in some 32 bytes a row: hashes of what two sides may not share."""

    def __init__(self, train_on: str, *, exact: bool = False):
        self._folded = functools.partial(folded, exact=exact)
        self.numbers = array("q")
        self._asked, self._contexts, self._turns = array("q"), array("q"), array("q")
        self._earlier: dict[int, list[int]] | None = {} if train_on != "last" else None

    def add(self, row: Row) -> None:
        """Add a row behind those there are."""
        instruction, context = self._folded(row.instruction), self._folded(row.context)
        history = tuple((self._folded(question), self._folded(answer)) for question, answer in row.history)
        if self._earlier is not None and history:
            self._earlier[len(self.numbers)] = [hash(turn) for turn in history]
        self.numbers.append(row.number)
        self._asked.append(hash((instruction, context, history)))
        self._contexts.append(hash(context) if context else 0)
        self._turns.append(hash((instruction, self._folded(row.response))))

    def split(self, *, subset: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
        """(places of training rows, of held-out rows)."""
        count = len(self.numbers)
        order = random.Random(_HELD_OUT_SEED).sample(range(count), count)
        held = order[:held_out]
        taken = {key for place in held for key in self._taken(place)}
        shuffled = list(range(count))
        random.Random(seed).shuffle(shuffled)
        free = (place for place in shuffled if taken.isdisjoint(self._needed(place)))
        training = list(itertools.islice(free, subset))
        if len(training) < subset or len(held) < held_out:
            raise self._too_few(order, subset, held_out)
        return training, held

    def _taken(self, place: int) -> Iterator[int]:
        """What no training row may have beside this held-out one: its question as asked, its context, its answer."""
        yield from self._both(place)
        yield self._turns[place]

    def _needed(self, place: int) -> Iterator[int]:
        """What no held-out row may have beside this training one, of which earlier turns may be learned, too."""
        yield from self._both(place)
        yield from (self._earlier or {}).get(place, ())

    def _both(self, place: int) -> Iterator[int]:
        yield self._asked[place]
        if context := self._contexts[place]:
            yield context

    def _too_few(self, order: Sequence[int], subset: int, held_out: int) -> DataError:
        """The error for data that lacks rows; `order` is that in which they are held out."""
        first: dict[int, int] = {}
        for turn, place in enumerate(order):
            for key in self._taken(place):
                first.setdefault(key, turn)
        # A row can be trained on beside the first n held-out rows if what it shares with any first occurs behind them.
        count = len(order)
        behind = sorted((min(first.get(key, count) for key in self._needed(place)) for place in order), reverse=True)

        def free(held: int) -> int:
            return sum(turn >= held for turn in behind)

        most = behind[subset - 1] if subset <= count else 0
        advice = [f"subset to at most {free(held_out):,}"] if free(held_out) else []
        advice += [f"held_out to at most {most:,}"] if most > 1 else []
        if not advice:  # neither alone helps
            fewer = [few for few in (count // 5, 2) if few > 1 and free(few)]
            advice = [f"held_out to {few:,} and subset to at most {free(few):,}" for few in fewer[:1]]
        return DataError(
            f"the data has {count:,} usable rows; beside held_out = {held_out:,} of them there are "
            f"{free(held_out):,} with another question and context to train on, and subset = {subset:,}: "
            + (f"set {', or '.join(advice)}" if advice else "add rows; a context of all rows belongs in system_prompt")
        )


def folded(text: str, *, exact: bool = False) -> str:
    """A text as rows are compared by: without case, white space and (unless `exact`) punctuation."""
    plain = " ".join(text.split()).casefold()
    return plain if exact else " ".join(_SIGNS.sub(" ", plain).split()) or plain
