"""The bases that have names of their own; named.toml has them, and says what its fields are."""

import tomllib
from pathlib import Path
from typing import Any, Final, NamedTuple


class Named(NamedTuple):
    """A base that is worth taking, and why."""

    hub: str
    licence: str
    why: str
    tested: bool
    numbers: dict[str, Any]


NAMED: Final = {
    name: Named(**fields)
    for name, fields in tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8")).items()
}
