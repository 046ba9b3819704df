"""Blind votes: which of two answers is better, cast before it is known whose they are; and their tally.

votes.jsonl in the run directory has one vote a line, appended and synced to disk before anything else happens.
"""

import collections
import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any, Final, cast

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import BizassistError, brief, printable
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.generation import BASE, TUNED
from bizassist_nb.data.chat import Message, conversation
from bizassist_nb.runs.journal import append_lines, json_line
from bizassist_nb.runs.records import Vote, decode
from bizassist_nb.runs.run import RunDirectory

CHOICES: Final = {"left": "Left is better", "right": "Right is better", "tie": "Tie", "bad": "Both bad"}
"""The possible votes, and the words on their buttons."""
KEYS: Final = {str(number): choice for number, choice in enumerate(CHOICES, 1)}
"""Keys that vote; the choice's first letter does, too."""


_ENOUGH: Final = math.log(20)
"""Evidence against a share from which on it is left out of the 95 % interval (Ville's inequality)."""
_MOST: Final = 10_000
"""Decided votes up to which it is looked for how many are needed."""


class VoteError(BizassistError):
    """A vote that cannot be cast or read."""


def append(run: RunDirectory, vote: Vote) -> None:
    """Write the vote at the end of the run's votes.jsonl, and have it on the disk before returning."""
    append_lines(run.path / "votes.jsonl", json_line(vote), sync=True)


def read_votes(run: RunDirectory) -> tuple[list[Vote], int]:
    """(the run's votes, oldest first; how many lines cannot be read, as a crash leaves them)."""
    path = run.path / "votes.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise VoteError(f"{path} cannot be read ({brief(error)}); put it back from a copy") from error
    votes, unread = [], 0
    for line in filter(bytes.strip, lines):
        try:
            votes.append(decode(line, Vote))
        except ValueError:
            unread += 1
    return votes, unread


@dataclasses.dataclass(frozen=True)
class Tally:
    """A run's votes for tuned (wins), for base (losses), for neither, and that both are bad; and lines that cannot be
    read.
    """

    wins: int
    losses: int
    ties: int
    bad: int
    unread: int = 0

    @property
    def cast(self) -> bool:
        """Whether there are any votes, or lines that cannot be read."""
        return any(dataclasses.astuple(self))

    @property
    def decided(self) -> int:
        """Votes for either."""
        return self.wins + self.losses

    @property
    def win_rate(self) -> float | None:
        """Share of the decided votes that are for tuned; None without any."""
        return self.wins / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of decided votes that are for tuned; it holds whenever people stop voting.

        Of all sets of votes to come, 95 % leave the truth within at every vote: a confidence sequence (Robbins 1970;
        Howard et al. 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences").
        """
        import numpy as np

        shares = (np.arange(10_000) + 0.5) / 10_000
        within = shares[_evidence(self.wins, self.losses, shares) < _ENOUGH]
        return float(within[0]), float(within[-1])

    @property
    def needed(self) -> int | None:
        """About how many more decided votes would tell, if they go on as they have; None for thousands."""
        import numpy as np

        decided = np.arange(self.decided, _MOST)
        wins = np.round(decided * (1.0 if self.win_rate is None else self.win_rate))
        telling = np.flatnonzero(_evidence(wins, decided - wins, 0.5) >= _ENOUGH)
        return int(telling[0]) if telling.size else None

    @property
    def sentence(self) -> str:
        """The tally in words."""
        lost = f" {self.unread} lines of votes.jsonl cannot be read and are not counted." if self.unread else ""
        others = f"{self.ties} ties, {self.bad} times both bad"
        more = "thousands more votes" if self.needed is None else f"about {self.needed} more votes like these"
        if self.win_rate is None:
            return f"No vote has decided for base or tuned yet ({others}); at least {self.needed} are needed.{lost}"
        low, high = self.interval
        telling = "tuned is preferred" if low > 0.5 else "base is preferred" if high < 0.5 else f"{more} would tell"
        return (
            f"Tuned won {self.wins} of {self.decided} decided blind votes, {self.win_rate:.0%} (95 % interval "
            f"{low:.0%} to {high:.0%}, whenever voting stops): {telling}. {others}.{lost}"
        )


def _evidence(wins: Any, losses: Any, share: Any) -> Any:
    """Logarithm of how much likelier such votes are if any share is as likely as another (a Beta(1, 1) mixture).

    If that share is the true one, its exponential is a martingale that begins at 1.
    """
    from scipy.special import betaln, xlog1py, xlogy

    return betaln(wins + 1, losses + 1) - xlogy(wins, share) - xlog1py(losses, -share)


class Ballot:
    """Two answers in random order, without names until its one vote has been cast.

    Raises:
        VoteError: if the comparison lacks one of the two answers, or its run, or is not of the run as it was trained.
    """

    def __init__(self, run: RunDirectory | None, comparison: Comparison, order: tuple[str, str] | None = None):
        """`order` is (left, right), if it has been drawn already."""
        if run is None or not {BASE, TUNED} <= comparison.answers.keys():
            raise VoteError("a blind vote needs a base and a tuned answer; train a run first, and ask both")
        if comparison.strength != 1:
            raise VoteError(f"a blind vote is on the run as it was trained, not at strength {comparison.strength:g}")
        self.run, self.comparison = run, comparison
        self.order = order or draw_order()
        self.vote: Vote | None = None

    def cast(self, choice: str) -> Vote:
        """Vote "left", "right", "tie" or "bad"; the vote is on disk when this returns.

        Raises:
            VoteError: for any other choice, or if this ballot has been cast.
        """
        if choice not in CHOICES:
            raise VoteError(f"{choice!r} cannot be voted; it is one of {', '.join(CHOICES)}")
        if self.vote is not None:
            raise VoteError("this ballot has been cast; ask again for another")
        left, right = self.order
        winner = {"left": left, "right": right}.get(choice, choice)
        vote = Vote(
            time=time.time(),
            question=self.comparison.question,
            base=self.comparison.answers[BASE],
            tuned=self.comparison.answers[TUNED],
            winner=cast("Any", winner),
            left=cast("Any", left),
        )
        append(self.run, vote)
        self.vote = vote
        return vote

    def __repr__(self) -> str:
        """As plain text, with names once it has been cast."""
        answers = [f"--- {head} ---\n{text}" for head, text in self._sides()]
        return printable("\n\n".join([f"Question: {self.comparison.question}", *answers, self._foot()]))

    def _repr_html_(self) -> str:
        heads, texts = zip(*self._sides(), strict=True)
        body = rendering.grid(heads, [rendering.markdown(text) for text in texts])
        asked, foot = rendering.plain(self.comparison.question), rendering.plain(self._foot())
        return rendering.untypeset(f"<b>{asked}</b>{body}<i>{foot}</i>")

    def _sides(self) -> list[tuple[str, str]]:
        """(head, answer) of left and right."""
        heads = {who: side for side, who in zip(("left", "right"), self.order, strict=True)}
        if self.vote:
            heads = {who: f"{side}: {self.comparison.head(who)}" for who, side in heads.items()}
        heads |= {who: f"{heads[who]}, {self.comparison.end(who)}" for who in self.comparison.cut}
        return [(head, self.comparison.answers[who]) for who, head in heads.items()]

    def _foot(self) -> str:
        if self.vote is None:
            return "Which is better? The names are shown once you have voted."
        chosen = self.vote.winner
        words = {"tie": "a tie", "bad": "both bad"}.get(chosen, f"{chosen} is better")
        return f"You voted: {words}. {tally(self.run).sentence}"


def blind_html(comparison: Comparison, order: tuple[str, str]) -> str:
    """Two growing answers in that order, without names."""
    return rendering.grid(["left", "right"], [rendering.plain(comparison.answers[who]) for who in order])


def choice_of(key: str) -> str | None:
    """The vote that a typed key stands for, if any."""
    typed = key.strip().lower()[:1]
    return KEYS.get(typed) or next((choice for choice in CHOICES if choice[0] == typed), None)


def draw_order() -> tuple[str, str]:
    """(left, right), drawn from the system's randomness, which no seed of the user's determines."""
    left, right = random.SystemRandom().sample([BASE, TUNED], 2)
    return left, right


def tally(run: RunDirectory) -> Tally:
    """The run's votes, counted."""
    votes, unread = read_votes(run)
    counts = collections.Counter(vote.winner for vote in votes)
    return Tally(counts["tuned"], counts["base"], counts["tie"], counts["bad"], unread)


def preference_pairs(run: RunDirectory) -> list[dict[str, list[Message]]]:
    """The decided votes in TRL's DPO format: "prompt", "chosen" and "rejected", each a list of messages."""
    return [
        {
            "prompt": conversation(run.settings.system_prompt, [], vote.question),
            "chosen": [{"role": "assistant", "content": vote.base if vote.winner == BASE else vote.tuned}],
            "rejected": [{"role": "assistant", "content": vote.tuned if vote.winner == BASE else vote.base}],
        }
        for vote in read_votes(run)[0]
        if vote.winner in (BASE, TUNED)
    ]


def export_preferences(run: RunDirectory, path: Path) -> int:
    """Write the preference pairs as JSON lines and return their number.

    Raises:
        VoteError: if no vote has decided for either answer, or the file cannot be written.
    """
    pairs = preference_pairs(run)
    if not pairs:
        raise VoteError(f"the run {run.name!r} has no decided votes to export; vote with %%ask --blind")
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    try:
        write_atomic(path, lambda part: part.write_text(text, "utf-8"))
    except OSError as error:
        raise VoteError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from error
    return len(pairs)
