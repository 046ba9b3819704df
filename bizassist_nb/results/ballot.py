"""A blind ballot on two answers, and what a run's votes come to."""

import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any, Final, Literal, cast

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.generation import BASE, TUNED
from bizassist_nb.core.rendering import Section
from bizassist_nb.data.chat import Message, conversation
from bizassist_nb.runs.run import RunDirectory
from bizassist_nb.runs.votes import Vote, VoteError, append, read_votes, votes

Choice = Literal["left", "right", "tie", "bad"]


CHOICES: Final[dict[Choice, str]] = {
    "left": "Left is better",
    "right": "Right is better",
    "tie": "Tie",
    "bad": "Both bad",
}
"""What can be voted, and the words on its button."""


KEYS: Final[dict[str, Choice]] = {"1": "left", "2": "right", "3": "tie", "4": "bad"}
"""Keys that vote; the choice's first letter does, too."""


KEYS_IN_WORDS: Final = " · ".join(f"{key} {choice}" for key, choice in KEYS.items())


@dataclasses.dataclass(frozen=True)
class Tally:
    """What a run's votes come to."""

    wins: int
    """Votes for tuned."""
    losses: int
    """Votes for base."""
    ties: int
    bad: int
    """Votes that both answers are bad."""
    unread: int = 0
    """Lines of votes.jsonl that cannot be read."""

    @property
    def decided(self) -> int:
        """Votes for either."""
        return self.wins + self.losses

    @property
    def win_rate(self) -> float | None:
        """Share of the decided votes that are for tuned; None without any."""
        return self.wins / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the win rate, exact as the sign test is (Clopper & Pearson 1934)."""
        if not self.decided:
            return None
        found = self._test().proportion_ci(0.95, method="exact")
        return float(found.low), float(found.high)

    @property
    def p_value(self) -> float | None:
        """Of the two-sided sign test: how likely so uneven votes are if neither is better; None where none decided."""
        return float(self._test().pvalue) if self.decided else None

    @property
    def sentence(self) -> str:
        """The tally in words."""
        lost = f" {self.unread} lines of votes.jsonl cannot be read and are not counted." if self.unread else ""
        if self.win_rate is None or self.interval is None or self.p_value is None:
            return f"No vote has decided for base or tuned yet ({self.ties} ties, {self.bad} times both bad).{lost}"
        low, high = self.interval
        telling = "tuned is preferred" if low > 0.5 else "base is preferred" if high < 0.5 else "nothing is shown yet"
        return (
            f"Tuned won {self.wins} of {self.decided} decided blind votes, {self.win_rate:.0%} (95 % interval "
            f"{low:.0%} to {high:.0%}; sign test p = {self.p_value:.2g}): {telling}. "
            f"{self.ties} ties, {self.bad} times both bad.{lost}"
        )

    def _test(self) -> Any:
        from scipy.stats import binomtest

        return binomtest(self.wins, self.decided)


class Ballot:
    """Two answers in random order without names, to be voted on once; then whose they are is revealed.

    Raises:
        VoteError: if the comparison lacks one of the two answers, or its run, or is not of the run as it was trained.
    """

    def __init__(self, run: RunDirectory | None, comparison: Comparison, order: tuple[str, str] | None = None):
        """`order` is who stands on the left and who on the right, where that has been drawn already."""
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
        """As plain text; names only once it has been cast."""
        answers = zip(self._heads(), self._texts(), strict=True)
        parts = [f"Question: {self.comparison.question}", *(f"--- {head} ---\n{text}" for head, text in answers)]
        return printable("\n\n".join([*parts, self._foot()]))

    def _repr_html_(self) -> str:
        return self.html()

    def html(self) -> str:
        """Both answers side by side, without names until it has been cast."""
        body = rendering.columns(self._heads(), [rendering.markdown(text) for text in self._texts()])
        return f"<b>{rendering.plain(self.comparison.question)}</b>{body}<i>{rendering.plain(self._foot())}</i>"

    def _heads(self) -> list[str]:
        sides = ["left", "right"]
        if self.vote:
            names = {BASE: BASE, TUNED: f"{TUNED} ({self.run.name})"}
            sides = [f"{side}: {names[who]}" for side, who in zip(sides, self.order, strict=True)]
        return [
            f"{side}, cut short" if who in self.comparison.cut else side
            for side, who in zip(sides, self.order, strict=True)
        ]

    def _texts(self) -> list[str]:
        return [self.comparison.answers[who] for who in self.order]

    def _foot(self) -> str:
        if self.vote is None:
            return "Which is better? It is said whose they are once you have voted."
        chosen = self.vote.winner
        words = {"tie": "a tie", "bad": "both bad"}.get(chosen, f"{chosen} is better")
        return f"You voted: {words}. {tally(self.run).sentence}"


def blind_html(comparison: Comparison, order: tuple[str, str]) -> str:
    """Two answers as they grow, in that order and without names."""
    return rendering.columns(["left", "right"], [rendering.plain(comparison.answers[who]) for who in order])


def choice_of(key: str) -> Choice | None:
    """What a key that was typed votes for, if anything."""
    typed = key.strip().lower()[:1]
    return KEYS.get(typed) or next((choice for choice in CHOICES if choice[0] == typed), None)


def draw_order() -> tuple[str, str]:
    """(who stands on the left, who on the right), by the system's randomness: no seed of the user's gives it away."""
    left, right = random.SystemRandom().sample([BASE, TUNED], 2)
    return left, right


def tally(run: RunDirectory) -> Tally:
    """The run's votes, counted."""
    found = read_votes(run)
    winners = [vote.winner for vote in found if vote is not None]
    wins, losses, ties, bad = (winners.count(who) for who in ("tuned", "base", "tie", "bad"))
    return Tally(wins, losses, ties, bad, unread=found.count(None))


def sections(run: RunDirectory) -> list[Section]:
    """The tally for the run's report; empty before the first vote."""
    found = tally(run)
    return [Section("Blind votes", (found.sentence,), (), ())] if found != Tally(0, 0, 0, 0) else []


def preference_pairs(run: RunDirectory) -> list[dict[str, list[Message]]]:
    """The decided votes as TRL's DPO trainer takes them: "prompt", "chosen" and "rejected", each a list of messages."""
    system = run.settings.system_prompt
    pairs = []
    for vote in votes(run):
        if vote.winner in (BASE, TUNED):
            chosen, rejected = (vote.base, vote.tuned) if vote.winner == BASE else (vote.tuned, vote.base)
            pairs.append(
                {
                    "prompt": conversation(system, [], vote.question),
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
    return pairs


def export_preferences(run: RunDirectory, path: Path) -> int:
    """Write the preference pairs as JSON lines; how many there are.

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
