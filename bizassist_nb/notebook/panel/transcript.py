"""What is said in the chat, and how the panes of base and tuned show it."""

import html
from typing import Final

import ipywidgets as w

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.core import rendering
from bizassist_nb.core.generation import BASE, TUNED
from bizassist_nb.runs.votes import Vote

_CURSOR: Final = '<span class="bn-cursor" aria-hidden="true">▍</span>'


class Turn:
    """A question with what has been answered so far."""

    def __init__(self, question: str, run: str | None, order: tuple[str, str] | None = None):
        """Nothing is answered yet; of a blind question, `order` is whose answer stands on the left and on the right."""
        self.question, self.run, self.order = question, run, order
        self.vote: Vote | None = None
        self.comparison: Comparison | None = None
        self.ended = False
        self.remark = ""

    def end(self, remark: str) -> None:
        """Nothing more is to come; `remark` says why, if it is not plain."""
        self.ended, self.remark = True, remark

    @property
    def votable(self) -> bool:
        """Whether it is a blind one that has been answered and not been voted on."""
        return self.order is not None and self.ended and not self.remark and self.vote is None

    def who(self, pane: str) -> str:
        """Whose answer stands in that one's pane."""
        return self.order[pane == TUNED] if self.order else pane

    def whose(self, pane: str, *, named: bool) -> str:
        """What is said above an answer: its strength; whose it is where the pane does not say it; the vote on it."""
        if self.order and self.vote is None:
            return ""
        who, said = self.who(pane), []
        if self.vote or not named:
            said.append(who if who == BASE else f"{who} ({self.run})")
        if self.vote:
            said += {who: ["your vote"], "tie": ["a tie"], "bad": ["both bad"]}.get(self.vote.winner, [])
        if who == TUNED and self.comparison and self.comparison.strength != 1:
            said.append(f"strength {self.comparison.strength:g}")
        return f'<div class="bn-muted">{html.escape(" · ".join(said))}</div>' if said else ""

    def answer(self, who: str) -> str | None:
        """The answer of base or tuned so far; None if it is not asked."""
        return self.comparison.answers.get(who) if self.comparison else ""

    def html(self, pane: str, *, named: bool) -> str:
        """The turn as that one's pane shows it; `named` says whether the pane's head has a name."""
        asked = f'<div class="bn-asked">{rendering.plain(self.question)}</div>{self.whose(pane, named=named)}'
        who = self.who(pane)
        answer = self.answer(who)
        if answer is None:
            return f'{asked}<div class="bn-muted">not asked</div>'
        body = rendering.markdown(answer) if self.ended else rendering.plain(answer)
        cut = self.comparison is not None and who in self.comparison.cut
        remarks = ["cut short at max new tokens" if self.ended and cut else self.remark]
        if self.comparison and self.comparison.note:
            remarks.append(self.comparison.note)
        notes = "".join(f'<div class="bn-muted">{html.escape(remark)}</div>' for remark in remarks if remark)
        return f'{asked}<div class="bn-answer">{body}{"" if self.ended else _CURSOR}</div>{notes}'


class Pane:
    """The conversation as one of the two sees it: what is finished is written once, only the last answer anew."""

    def __init__(self, who: str):
        """An empty pane."""
        self.empty = "Ask a question below, or take one of those suggested."
        self._who = who
        self._head, self._past, self._live = w.HTML(), w.HTML(), w.HTML()
        talk = w.VBox([self._past, self._live])
        scroll = w.Box([talk])
        scroll.add_class("bn-talk")
        self.view = w.VBox([self._head, scroll])
        self.view.add_class("bn-pane")
        self.view.add_class(f"bn-{who}")
        self._written: tuple[object, ...] = ()

    def show(self, turns: list[Turn]) -> None:
        """Show these turns."""
        past = [turn for turn in turns if turn.ended]
        blind = any(turn.order for turn in turns)
        run = next((turn.run for turn in reversed(turns) if turn.run), None)
        name = f"{self._who} ({run})" if run and self._who == TUNED else self._who
        if blind:
            name = "left" if self._who == BASE else "right"
        self._head.value = f"<h4>{html.escape(name)}</h4>"
        written = (blind, *((turn, turn.vote) for turn in past))
        if written != self._written:
            self._written = written
            self._past.value = "".join(turn.html(self._who, named=not blind) for turn in past)
        live = turns[-1].html(self._who, named=not blind) if turns and not turns[-1].ended else ""
        self._live.value = live if turns else f'<div class="bn-muted">{html.escape(self.empty)}</div>'
