"""Blind votes: which of two answers is better, cast before it is known whose they are.

votes.jsonl in the run directory has one vote a line, appended and synced to disk before anything else happens.
"""

import dataclasses
import json
import os
from typing import IO, Literal

from bizassist_nb.core.errors import BizassistError, brief
from bizassist_nb.runs.records import VOTE, misfit
from bizassist_nb.runs.run import RunDirectory


class VoteError(BizassistError):
    """A vote that cannot be cast or read."""


@dataclasses.dataclass(frozen=True)
class Vote:
    """One vote."""

    time: float
    """Seconds since 1970."""
    question: str
    base: str
    """The base's answer."""
    tuned: str
    """The tuned model's answer."""
    winner: Literal["base", "tuned", "tie", "bad"]
    left: Literal["base", "tuned"]
    """Whose answer stood on the left: a habit of the hand can be told from a preference."""


def append(run: RunDirectory, vote: Vote) -> None:
    """Write the vote at the end of the run's votes.jsonl, and have it on the disk before returning."""
    line = json.dumps(dataclasses.asdict(vote), ensure_ascii=False)
    with (run.path / "votes.jsonl").open("ab+") as file:
        torn = _ends_torn(file)
        file.write(b"\n" * torn + line.encode("utf-8", "replace") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def votes(run: RunDirectory) -> list[Vote]:
    """The run's votes, oldest first; lines that cannot be read, as a crash leaves them, are passed over."""
    return [vote for vote in read_votes(run) if vote is not None]


def _ends_torn(file: IO[bytes]) -> bool:
    """Whether the last line has no end, as a crash leaves it."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_votes(run: RunDirectory) -> list[Vote | None]:
    """The votes, and None for each line that is none."""
    try:
        lines = (run.path / "votes.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise VoteError(
            f"{run.path / 'votes.jsonl'} cannot be read ({brief(error)}); put it back from a copy"
        ) from error
    return [_parse(line) for line in lines if line.strip()]


def _parse(line: bytes) -> Vote | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return None if misfit(found, VOTE) else Vote(**{name: found[name] for name in VOTE})
