"""Tables of a notebook, which a run keeps as a Parquet file."""

from pathlib import Path
from typing import Any

from bizassist_nb.core.errors import DataError, brief
from bizassist_nb.data.sources import check_pyarrow


def write_parquet(path: Path, value: Any) -> Path:
    """Write a pandas or polars DataFrame, a datasets.Dataset to `path`; errors call it by its stem.

    Raises:
        DataError: if it is no table, or a column holds what cannot be stored.
    """
    check_pyarrow()
    import pyarrow
    import pyarrow.parquet

    try:
        pyarrow.parquet.write_table(_arrow(value, path.stem), path)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{path.stem} cannot be stored as a table ({brief(error)}); give each column a name of its own and values "
            'of one kind: df["label"].astype(str)'
        ) from error
    return path


def _arrow(value: Any, name: str) -> Any:
    """The pyarrow.Table in the value, without an index of pandas, and with the names of a Dataset's classes."""
    import pyarrow
    from pyarrow import compute

    # Told by its class's name: a library that is not imported has made no table, and need not be installed.
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(value).__mro__}
    if ("pandas", "DataFrame") in kinds:
        return pyarrow.Table.from_pandas(value, preserve_index=False)
    if ("polars", "DataFrame") in kinds:
        return value.to_arrow()
    if ("datasets", "Dataset") not in kinds:
        raise DataError(
            f"{name} is a {type(value).__name__}, not a table; it can be a DataFrame of pandas or polars, or one split "
            "of a datasets.Dataset (pandas.DataFrame(rows) makes a table of a list of rows)"
        )
    table = value.with_format("arrow")[:]
    for place, (column, feature) in enumerate(value.features.items()):
        if type(feature).__name__ == "ClassLabel":  # stored as places among the names; -1 is none
            places = compute.if_else(compute.less(table[column], 0), None, table[column])
            table = table.set_column(place, column, compute.take(pyarrow.array(feature.names), places))
    return table
