"""What a run would learn from with some settings, found out before it is started, a slice of rows at a time."""

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from bizassist_nb.assistant import loaded
from bizassist_nb.core.errors import DataError
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.data.chat import row_messages
from bizassist_nb.data.rows import Rejected, Row, Table, read_table, split
from bizassist_nb.data.tokens import ChatTokenizer, Example
from bizassist_nb.models import base as models
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.distributed import launcher
from bizassist_nb.training.distributed.rank import Rank

_SLICE: Final = 50
"""Rows tokenised between two looks at whether the forecast is still wanted: some 50 ms."""
_WHOLE: Final = 1 << 40
"""A max_length that cuts nothing."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What training would read; counts are over the rows tokenised so far."""

    settings: Settings
    base: models.Base
    chat: ChatTokenizer
    source: str
    training: Sequence[Row]
    """The rows drawn, in the order of the first epoch."""
    unusable: tuple[Rejected, ...]
    """Rows of the source that cannot be used."""
    counted: int = 0
    """Training rows tokenised."""
    tokens: int = 0
    """Input tokens an epoch."""
    truncated: int = 0
    too_long: tuple[Rejected, ...] = ()
    """Rows whose question alone fills max_length."""
    expected: preflight.Estimate | None = None
    """What an epoch will need on this machine, once every row has been counted."""

    @property
    def finished(self) -> bool:
        """Whether every training row has been counted."""
        return self.expected is not None

    @property
    def rows(self) -> int:
        """Training rows that will be used, as far as is known."""
        return len(self.training) - len(self.too_long)

    @property
    def epoch_tokens(self) -> float:
        """Input tokens an epoch; until all rows are counted, what those counted come to for all."""
        return self.tokens * len(self.training) / self.counted if self.counted else 0.0

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.rows * self.settings.epochs / self.settings.batch_size)

    @property
    def truncated_share(self) -> float:
        """Share of the rows whose answer is cut, from 0 to 1."""
        used = self.counted - len(self.too_long)
        return self.truncated / used if used else 0.0

    def example(self, row: Row) -> Example:
        """One row as training would read it; a row that is too long for an answer has nothing learned in it."""
        s = self.settings
        ids, labels, cut = self.chat.example(
            row_messages(row, s.system_prompt), max_length=s.max_length, train_on=s.train_on
        )
        return Example(row.number, ids, labels, cut, row.category)


def forecast(settings: Settings) -> Iterator[Forecast]:
    """What the settings lead to, again after every slice of rows; the last one is finished. May be closed at any time.

    Raises:
        DataError: if the rows cannot be read, are too few, or too long all of them.
        EngineError: if the engine asked for cannot run here.
        SettingsError: if there are fewer GPUs than asked for, or their configuration cannot be used.
        ModelError: if the model or its tokenizer cannot be had.
    """
    processes = launcher.processes(settings)
    count, sharded = processes.count, processes.sharded
    engine = engines.choose(settings.engine, processes=count, sharded=sharded)
    table = _table(settings.data, tuple(sorted(settings.columns.items())), _state_of(settings.data))
    training, _ = split(table.rows, subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
    base = models.resolve(settings.model, loaded.held())  # which is given back before a run is started
    chat = _tokenizer(base.source)
    found = Forecast(settings, base, chat, table.source, training, table.rejected)
    lengths = _lengths(base.source, table.fingerprint, settings.system_prompt)
    while found.counted < len(training):
        found = _counted(found, training[found.counted : found.counted + _SLICE], lengths)
        yield found
    if not found.rows:
        raise DataError(f"in all rows the question alone has max_length = {settings.max_length} tokens; raise it")
    unused = {bad.number for bad in found.too_long}
    order = [min(lengths[row.number][1], settings.max_length) for row in training if row.number not in unused]
    steps = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
    shares = [Rank(count=count).longest(step) for step in steps]
    on = preflight.device()
    on = dataclasses.replace(on, free=on.free + loaded.held(), sharing=count if sharded else 1)
    yield dataclasses.replace(found, expected=preflight.estimate(settings.share(count), engine, base, shares, on))


def tokens(chat: ChatTokenizer, example: Example) -> list[tuple[str, bool]]:
    """(text, whether it is learned) of every token; tokens that make one character only together are joined."""
    found: list[tuple[str, bool]] = []
    start = 0
    for i, label in enumerate(example.labels):
        text = chat.decode(example.input_ids[start : i + 1])
        if "\ufffd" in text and i - start < 3 and i + 1 < len(example.labels):  # part of a character: UTF-8 has up to 4
            continue
        found.append((text, label >= 0))
        start = i + 1
    return found


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a run went."""

    tokens_per_second: float
    run: str


def past_speed(runs: Sequence[RunDirectory], model: str) -> Speed | None:
    """The speed of the newest of the runs (oldest first) that trained that model; None if none did."""
    for run in reversed(runs):
        if run.model == model and (steps := run.steps):
            return Speed(sum(step.tokens for step in steps) / max(1e-9, sum(step.seconds for step in steps)), run.name)
    return None


_Lengths = dict[int, tuple[int, int]]
"""By row number: (tokens of the question, tokens of the whole row)."""


def _counted(found: Forecast, rows: Sequence[Row], lengths: _Lengths) -> Forecast:
    most = found.settings.max_length
    tokens, truncated = found.tokens, found.truncated
    too_long = list(found.too_long)
    for row in rows:
        if row.number not in lengths:
            ids, labels, _ = found.chat.example(row_messages(row, found.settings.system_prompt), max_length=_WHOLE)
            lengths[row.number] = (sum(label < 0 for label in labels), len(ids))
        question, whole = lengths[row.number]
        if question >= most:
            too_long.append(Rejected(row.number, f"the question alone has {question:,} tokens"))
            continue
        tokens += min(whole, most)
        truncated += whole > most
    return dataclasses.replace(
        found,
        counted=found.counted + len(rows),
        tokens=tokens,
        truncated=truncated,
        too_long=tuple(too_long),
    )


# Kept between forecasts, so that only what a change touches is done again.


@lru_cache(maxsize=2)
def _table(data: str, columns: tuple[tuple[str, str], ...], _state: Any) -> Table:
    return read_table(data, dict(columns))


def _state_of(data: str) -> tuple[float, int] | None:
    """Changes when a file does."""
    path = Path(user_path(data))
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state.st_mtime, state.st_size


@lru_cache(maxsize=2)
def _tokenizer(source: str) -> ChatTokenizer:
    return models.load_tokenizer(source)


@lru_cache(maxsize=4)
def _lengths(_source: str, _fingerprint: str, _system_prompt: str) -> _Lengths:
    return {}


class ForecastThread:
    """Forecasts a run of the newest settings on a thread of its own, which writes nothing but `found`."""

    def __init__(self) -> None:
        """Nothing to forecast yet."""
        self.found: Forecast | None = None
        """What is known about the settings wanted; None as long as nothing is."""
        self.problem: Exception | None = None
        """Why there is no forecast."""
        self._wanted: Settings | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def want(self, settings: Settings | None) -> None:
        """Forecast a run of these from now on; what was found about others is forgotten. None to stop."""
        with self._changed:
            if settings == self._wanted:
                return
            self._wanted, self.found, self.problem = settings, None, None
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="bizassist-forecast", daemon=True)
                self._thread.start()
            self._changed.notify()

    @property
    def busy(self) -> bool:
        """Whether there is more to come."""
        found = self.found
        return self._wanted is not None and self.problem is None and not (found and found.finished)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self.busy:
                    self._changed.wait()
                wanted = self._wanted
            assert wanted is not None
            self._forecast(wanted)

    def _forecast(self, wanted: Settings) -> None:
        try:
            for found in forecast(wanted):
                with self._changed:
                    if self._wanted is not wanted:
                        return
                    self.found = found
        except Exception as error:  # noqa: BLE001 - it is shown; a thread that ended would leave the panel waiting
            with self._changed:
                if self._wanted is wanted:
                    self.problem = error
