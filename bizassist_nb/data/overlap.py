"""Rows that belong together, and rows that nearly repeat each other."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from bizassist_nb.core.errors import DataError
from bizassist_nb.data.rows import Row, folded

NEAR: Final = 0.5
"""Share of three-word pieces from which two rows nearly repeat each other."""
VALIDATION: Final = 3
"""One held-out row in so many is a validation row, where there are any."""


def group(row: Row) -> str:
    """What a row has in common with others of its group: its context, else its question."""
    return folded(row.context) or folded(row.instruction)


def validation_split(held_out: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(validation rows, test rows) of the held-out ones, in the order given; no group is on both sides.

    Raises:
        DataError: if the rows of one context leave fewer than two for the test.
    """
    groups = defaultdict[str, list[Row]](list)
    for row in held_out:
        groups[group(row)].append(row)
    room = max(1, len(held_out) // VALIDATION)
    chosen: set[int] = set()
    for rows in groups.values():  # in the order drawn
        if len(chosen) + len(rows) <= room:
            chosen |= {row.number for row in rows}
    chosen = chosen or {row.number for row in min(groups.values(), key=len)}
    sides = [row for row in held_out if row.number in chosen], [row for row in held_out if row.number not in chosen]
    if len(sides[1]) < 2:
        raise DataError(
            f"the {len(held_out)} held-out rows leave no two for the test that share no context with validation rows; "
            'raise held_out, or do without keep = "best" and stop_early'
        )
    return sides


def near_duplicates(rows: Iterable[Row], others: Sequence[Row]) -> list[tuple[int, int]]:
    """(number of a row, number of the other) of those that nearly repeat each other.

    Their sets of hashed three-word pieces have a Jaccard similarity of at least NEAR (Broder 1997, "On the resemblance
    and containment of documents"). Two such sets of sizes a and b share one of the a - ceil(NEAR a) + 1 rarest pieces
    of the first with as many of the second (Chaudhuri et al. 2006, the prefix filter), so only those are looked up.
    """
    pieces = [_pieces(row) for row in others]
    counts = Counter(itertools.chain.from_iterable(pieces))
    holders = defaultdict[int, list[int]](list)
    for place, each in enumerate(pieces):
        for piece in _prefix(each, counts):
            holders[piece].append(place)
    found: list[tuple[int, int]] = []
    for row in rows:
        ours = _pieces(row)
        near = sorted(set(itertools.chain.from_iterable(holders.get(piece, ()) for piece in _prefix(ours, counts))))
        alike = (place for place in near if len(ours & pieces[place]) >= NEAR * len(ours | pieces[place]))
        found += [(row.number, others[place].number) for place in alike]
    return found


def near_words(pairs: Sequence[tuple[int, int]]) -> str:
    """A warning about training rows that nearly repeat held-out ones, the first three named."""
    named = ", ".join(f"{row} and {other}" for row, other in pairs[:3]) + (", …" if len(pairs) > 3 else "")
    return (
        f"{len({row for row, _ in pairs}):,} training rows nearly repeat a held-out row (rows {named}), which flatters "
        "the run a little; leave one of each pair out"
    )


def _pieces(row: Row) -> frozenset[int]:
    words = folded(f"{row.instruction} {row.context} {row.response}").split()
    return frozenset(map(hash, zip(words, words[1:], words[2:], strict=False))) or frozenset([hash(" ".join(words))])


def _prefix(pieces: frozenset[int], counts: Mapping[int, int]) -> list[int]:
    return sorted(pieces, key=lambda piece: (counts.get(piece, 0), piece))[
        : len(pieces) - math.ceil(NEAR * len(pieces)) + 1
    ]
