"""The rows of a run, drawn from its data anew."""

from bizassist_nb.core.errors import RunError
from bizassist_nb.data.rows import Row, Table, read_table, split
from bizassist_nb.runs.run import RunDirectory


def rows_of(run: RunDirectory) -> tuple[Table, list[Row], list[Row]]:
    """(its data, training rows, held-out rows) of a run.

    Raises:
        DataError: if they cannot be read.
        RunError: if the data is not what the run began with.
    """
    settings = run.settings
    table = read_table(settings.data, settings.columns)
    if run.environment.get("fingerprint", table.fingerprint) != table.fingerprint:
        raise RunError(
            f"the data of run {run.name!r} has changed since it began ({table.source}); bring the old data back, "
            "or start a new run"
        )
    return table, *split(table.rows, subset=settings.subset, held_out=settings.held_out, seed=settings.seed)
