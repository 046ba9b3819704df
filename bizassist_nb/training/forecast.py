"""Forecasts what a run of some settings would read and need, before it is started, a slice of rows at a time."""

import contextlib
import dataclasses
import functools
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from bizassist_nb.assistant import loaded
from bizassist_nb.core.errors import DataError
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.data.chat import row_messages
from bizassist_nb.data.check import Check, Finding
from bizassist_nb.data.overlap import validation_split
from bizassist_nb.data.rows import Row, Table, draw, open_source, refused_words
from bizassist_nb.data.tokens import IGNORED, ChatTokenizer, Example, too_long_words
from bizassist_nb.models import base as models
from bizassist_nb.results.power import power
from bizassist_nb.results.summary import phases
from bizassist_nb.runs.records import Engine, Fit, Power, Preflight
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.training import engines, preflight
from bizassist_nb.training.distributed import launcher

_SLICE: Final = 50
"""Rows tokenised between two checks whether the forecast is still wanted: some 50 ms."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What training would read; counts are over the rows tokenised so far."""

    settings: Settings
    base: models.Base
    chat: ChatTokenizer
    table: Table
    training: Sequence[Row]
    """The rows drawn, in the order of the first epoch."""
    lengths: Sequence[tuple[int, int]]
    """(tokens of the question, tokens of the whole row) of the training rows tokenised."""
    fit: Fit | None = None
    learning_rate: float | str = "auto"
    """The peak learning rate; a number once every row has been counted."""
    expected: Preflight | None = None
    """What an epoch will need on this machine, once every row has been counted."""
    power: Power | None = None
    """Which change of held-out loss will be seen, once every row has been counted."""
    findings: Sequence[Finding] | None = None
    """What the data check found among the training rows; it comes last."""

    @property
    def finished(self) -> bool:
        """Whether every training row has been counted."""
        return self.expected is not None

    @functools.cached_property
    def used(self) -> list[int]:
        """Input tokens of each row that will be used."""
        most = self.settings.max_length
        return [min(whole, most) for question, whole in self.lengths if question < most]

    @property
    def too_long(self) -> int:
        """Rows whose question alone fills max_length."""
        return len(self.lengths) - len(self.used)

    @property
    def rows(self) -> int:
        """Training rows that will be used, as far as is known."""
        return len(self.training) - self.too_long

    @property
    def epoch_tokens(self) -> float:
        """Input tokens an epoch; until all rows are counted, what those counted come to for all."""
        return sum(self.used) * len(self.training) / len(self.lengths)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.rows * self.settings.epochs / self.settings.batch_size)

    @property
    def truncated_share(self) -> float:
        """Share of the rows whose answer is cut, from 0 to 1."""
        most = self.settings.max_length
        return sum(question < most < whole for question, whole in self.lengths) / max(1, len(self.used))

    @property
    def warnings(self) -> list[str]:
        """What a person should know of rows that are not used, and what to do, before a run is started."""
        found = [refused_words(self.table.rejected)] if self.table.rejected else []
        if self.too_long:
            needed = max(whole for question, whole in self.lengths if question >= self.settings.max_length)
            found.append(too_long_words(self.too_long, len(self.lengths), self.settings.max_length, needed))
        return found

    def example(self, row: Row) -> Example:
        """One row as training would read it; a row that is too long for an answer has nothing learned in it."""
        s = self.settings
        ids, labels, cut = self.chat.example(
            row_messages(row, s.system_prompt), max_length=s.max_length, train_on=s.train_on
        )
        return Example(row.number, ids, labels, cut, row.category)


def forecast(settings: Settings) -> Iterator[Forecast]:
    """The forecast after every slice of rows; the last one is finished. May be closed at any time.

    Raises:
        DataError: if the rows cannot be read, are too few, or too long all of them.
        EngineError: if the engine asked for cannot run here.
        RunError: if the folder of runs cannot be read.
        SettingsError: if there are fewer GPUs than asked for, or their configuration cannot be used.
        ModelError: if the model or its tokenizer cannot be had.
    """
    processes = launcher.processes(settings)
    engine = engines.choose(settings.engine, sharded=processes.sharded)
    changed = None
    with contextlib.suppress(OSError, ValueError):  # of a name that is no file's
        changed = user_path(settings.data).stat().st_mtime_ns
    drawn = Settings(**{name: getattr(settings, name) for name in _ROWS}).to_toml()
    table, training, held_out = _drawn(drawn, changed)
    base = models.resolve(settings.model, loaded.reclaimable())  # which is given back before a run is started
    chat = _tokenizer(base.source)
    lengths: list[tuple[int, int]] = []
    for start in range(0, len(training), _SLICE):
        lengths += [
            _lengths(chat, row, settings.system_prompt, settings.train_on) for row in training[start : start + _SLICE]
        ]
        found = Forecast(settings, base, chat, table, training, tuple(lengths))
        yield found
    test = validation_split(held_out)[1] if settings.validates else held_out
    scored = 0
    for number, row in enumerate(test):
        scored += _lengths(chat, row, settings.system_prompt, "last")[0] < settings.max_length
        if number % _SLICE == 0:
            yield found
    found = _finished(found, engine, processes, power(settings, base.name, scored))
    yield found
    yield dataclasses.replace(found, findings=_checked(drawn, changed, found.lengths, settings.max_length))


def _finished(found: Forecast, engine: Engine, processes: launcher.Processes, telling: Power) -> Forecast:
    """The forecast of all rows, with what an epoch of them takes here."""
    settings, used, count = found.settings, found.used, processes.count
    if not used:
        raise DataError(f"in all rows the question alone has max_length = {settings.max_length} tokens; raise it")
    steps = [used[start : start + settings.batch_size] for start in range(0, len(used), settings.batch_size)]
    on = preflight.device()
    on = dataclasses.replace(on, free=on.free + loaded.reclaimable(), sharing=count if processes.sharded else 1)
    shape = preflight.shape(found.base.source)
    place = preflight.Placement(shape, settings.rank, engine, on, count)
    fit, expected = preflight.estimate(place, dataclasses.replace(settings, epochs=1), steps)
    rate = shape.learning_rate if isinstance(settings.learning_rate, str) else settings.learning_rate
    return dataclasses.replace(found, fit=fit, learning_rate=rate, expected=expected, power=telling)


# Cached, so that only what a change of the settings touches is done again: reading a large file takes seconds, loading
# a tokenizer a second, and tokenising a millisecond a row.


_ROWS: Final = (
    "data", "config", "split", "revision", "columns", "template", "subset", "held_out", "seed", "train_on",
)  # fmt: skip
"""Settings that decide which rows are drawn."""


@functools.lru_cache(maxsize=2)
def _drawn(settings: str, _changed: int | None) -> tuple[Table, list[Row], list[Row]]:
    """(the data, training rows, held-out rows) of settings as TOML; `_changed` is when the file was changed."""
    wanted = Settings.from_toml(settings)
    return draw(open_source(wanted), wanted)


@functools.lru_cache(maxsize=2)
def _checked(drawn: str, changed: int | None, lengths: Sequence[tuple[int, int]], max_length: int) -> list[Finding]:
    """What the data check finds among the rows that `_drawn` gives for the same arguments."""
    table, training, _ = _drawn(drawn, changed)
    check = Check(max_length, [whole for _, whole in lengths])
    for row in training:
        check.add(row)
    return check.findings(table.rejected)


_tokenizer: Final = functools.lru_cache(maxsize=2)(models.load_tokenizer)


@functools.lru_cache(maxsize=20_000)
def _lengths(chat: ChatTokenizer, row: Row, system_prompt: str, train_on: str) -> tuple[int, int]:
    """(tokens up to the first answer that is learned, tokens of the whole row)."""
    answers = "last" if train_on == "last" else "response"
    _, labels, _ = chat.example(row_messages(row, system_prompt), max_length=sys.maxsize, train_on=answers)
    return next(place for place, label in enumerate(labels) if label != IGNORED), len(labels)


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


class Past(NamedTuple):
    """What an earlier run of the same model took on this machine."""

    run: str
    """Its name."""
    speed: float
    """Tokens a second in training."""
    beside: float | None
    """Seconds besides: loading, scoring, answering and saving; None if it has not finished."""


def past(runs: Sequence[RunDirectory], model: str) -> Past | None:
    """The newest of the runs (oldest first) that trained that model, one that has finished if there is one."""
    trained = [run for run in reversed(runs) if run.model == model and run.steps]
    if not trained:
        return None
    finished = next((run for run in trained if run.status == "finished"), None)
    run = finished or trained[0]
    speed = sum(step.tokens for step in run.steps) / max(1e-9, sum(step.seconds for step in run.steps))
    return Past(run.name, speed, sum(phases(run).values()) if finished else None)


class ForecastThread:
    """Forecasts a run of the newest settings, on a thread for each change of them, one after the other."""

    def __init__(self) -> None:
        """Nothing to forecast yet."""
        self._wanted: Settings | None = None
        self._newest: tuple[Settings | None, Forecast | Exception | None] = (None, None)
        self._working = threading.Lock()

    def want(self, settings: Settings | None) -> None:
        """Forecast a run of these from now on; what was found about others is forgotten. None to stop."""
        if settings == self._wanted:
            return
        self._wanted = settings
        if settings:
            threading.Thread(target=self._work, args=(settings,), name="bizassist-forecast", daemon=True).start()

    def _known(self) -> Forecast | Exception | None:
        settings, known = self._newest
        return known if settings is self._wanted else None

    @property
    def found(self) -> Forecast | None:
        """What is known about the settings wanted; None as long as nothing is."""
        return known if isinstance(known := self._known(), Forecast) else None

    @property
    def problem(self) -> Exception | None:
        """Why there is no forecast."""
        return known if isinstance(known := self._known(), Exception) else None

    @property
    def busy(self) -> bool:
        """Whether there is more to come."""
        known = self._known()
        return self._wanted is not None and (known is None or (isinstance(known, Forecast) and not known.finished))

    def _work(self, wanted: Settings) -> None:
        with self._working:
            try:
                slices = forecast(wanted)
                while self._wanted is wanted and (found := next(slices, None)):
                    self._newest = wanted, found
            except Exception as error:  # noqa: BLE001 - it is shown, where the thread would end without a word
                self._newest = wanted, error
