"""The rows of a run, drawn from its data anew."""

import dataclasses
import random
from collections.abc import Sequence
from typing import Final

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.overlap import validation_split
from bizassist_nb.data.rows import Row, Table, draw, open_source, read_table
from bizassist_nb.data.sources import KEPT, VARIABLE
from bizassist_nb.runs.run import RunDirectory

SPLIT: Final = 3
"""Which way rows are split, as a run's environment.json has it: 1 as in 0.1.0; 2 compared texts with their punctuation,
had no validation rows, and learned last answers alone."""

_EXAMPLES: Final = 3
"""Training rows in the prompt that fine-tuning is held against."""


def rows_of(run: RunDirectory) -> tuple[Table, list[Row], list[Row]]:
    """(its data, training rows, held-out rows) of a run.

    Raises:
        DataError: if they cannot be read.
        RunError: if the data is not what the run began with.
    """
    settings, known = dataclasses.replace(run.settings, train_on=train_on(run)), run.environment
    if VARIABLE.fullmatch(settings.data):
        settings = dataclasses.replace(settings, data=str(run.path / KEPT))
    source = open_source(settings)
    if known.fingerprint not in ("", source.fingerprint):
        raise RunError(
            f"the data of run {run.name!r} has changed since it began ({source.words}); bring the old data back, "
            "or start a new run"
        )
    if known.fingerprint and known.split < 2:
        table = read_table(settings.data, settings.columns)
        return table, *_split_before(table.rows, settings)
    return draw(source, settings, exact=bool(known.fingerprint) and known.split < SPLIT)


def validation_of(run: RunDirectory, held_out: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(validation rows, test rows) of a run's held-out ones: all of them twice where nothing is chosen by any.

    Raises:
        DataError: if too few are left for the test.
    """
    old = run.environment.fingerprint and run.environment.split < SPLIT
    return validation_split(held_out) if run.settings.validates and not old else (list(held_out), list(held_out))


def prompt_examples(training: Sequence[Row]) -> list[Row]:
    """Training rows for a prompt: the first three, as drawn by the seed, of those no longer than the median."""

    def size(row: Row) -> int:
        return len(row.instruction) + len(row.context) + len(row.response)

    median = sorted(map(size, training))[len(training) // 2]
    return [row for row in training if size(row) <= median][:_EXAMPLES]


def train_on(run: RunDirectory) -> str:
    """`Settings.train_on` as the run began with it: earlier answers were not learned once."""
    before = run.environment.fingerprint and run.environment.split < 3
    return "last" if before and run.settings.train_on == "response" else run.settings.train_on


def _split_before(rows: Sequence[Row], settings: Settings) -> tuple[list[Row], list[Row]]:
    """(training rows, held-out rows) as version 0.1.0 drew them; a run that it began goes on with the same."""
    shuffled = list(rows)
    random.Random(settings.seed).shuffle(shuffled)
    training = shuffled[: settings.subset]
    asked = {" ".join(row.instruction.split()).casefold() for row in training}
    others = [row for row in shuffled[settings.subset :] if " ".join(row.instruction.split()).casefold() not in asked]
    return training, others[: settings.held_out]
