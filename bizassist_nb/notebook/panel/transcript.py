"""The turns of the chat, and how the panes show them, one for each who answers."""

import dataclasses
import html
from typing import Final

import ipywidgets as w

from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.core import rendering
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED
from bizassist_nb.notebook.views import copy_button
from bizassist_nb.runs.records import Vote

_CURSOR: Final = '<span class="bn-cursor" aria-hidden="true">▍</span>'


@dataclasses.dataclass(eq=False)
class Turn:
    """A question with its answers so far."""

    question: str
    runs: tuple[str, ...] = ()
    """Names of the runs that were asked."""
    order: tuple[str, str] | None = None
    """Of a blind question: who answers on the left and on the right."""
    vote: Vote | None = None
    comparison: Comparison | None = None
    ended: bool = False
    remark: str = ""

    def end(self, remark: str) -> None:
        """The answers have ended; `remark` says why, if they were not finished."""
        self.ended, self.remark = True, remark

    @property
    def votable(self) -> bool:
        """Whether it is blind, answered, and has no vote yet."""
        return self.order is not None and self.ended and not self.remark and self.vote is None

    def head(self, who: str) -> str:
        """Who that is, with the name of the base, once it is known, or of the only run."""
        if who == BASE and self.comparison:
            return self.comparison.head(who)
        return f"{who} ({self.runs[0]})" if who == TUNED and self.runs else who

    def _about(self, who: str, *, named: bool) -> str:
        """The line above an answer: who gave it, unless the pane is named; the vote on it; its strength."""
        if self.order and self.vote is None:
            return ""
        said = []
        if self.vote or not named:
            said.append(self.head(who))
        if self.vote:
            said += {who: ["your vote"], "tie": ["a tie"], "bad": ["both bad"]}.get(self.vote.winner, [])
        if who not in (BASE, PROMPTED) and self.comparison and self.comparison.strength != 1:
            said.append(f"strength {self.comparison.strength:g}")
        return _muted(" · ".join(said)) if said else ""

    def html(self, pane: str, *, named: bool) -> str:
        """The turn as that pane shows it; `named` is whether the pane's head says who answers in it."""
        who = self.order[pane == TUNED] if self.order else pane
        asked = f'<div class="bn-asked">{rendering.plain(self.question)}</div>{self._about(who, named=named)}'
        answer = self.comparison.answers.get(who) if self.comparison else ""
        if answer is None:
            return asked + _muted("not asked")
        body = rendering.markdown(answer)
        remarks = [self.remark]
        if self.comparison:
            remarks += [self.comparison.end(who), self.comparison.note or "", self.comparison.figures.get(who, "")]
        notes = "".join(map(_muted, filter(None, remarks)))
        copy = copy_button(".bn-turn", ".bn-answer", answer) if answer and self.ended else ""
        shown = f'{asked}<div class="bn-answer">{body}{"" if self.ended else _CURSOR}</div>{notes}{copy}'
        return f'<div class="bn-turn">{shown}</div>'


class Pane:
    """The conversation with one who answers: finished turns are written once, only the last answer again and again.

    The newest finished turn has an element of its own, which screen readers read out when it changes.
    """

    def __init__(self, who: str):
        self._who = who
        self._head, self._past, self._newest, self._live = w.HTML(), w.HTML(), w.HTML(), w.HTML()
        talk = w.VBox([self._past, self._newest.add_class("bn-newest"), self._live])
        scroll = w.Box([talk]).add_class("bn-talk")
        self.view = w.VBox([self._head, scroll]).add_class("bn-pane").add_class(f"bn-{who.partition(' ')[0]}")
        self._written: tuple[object, ...] = ()

    def show(self, turns: list[Turn], empty: str = "") -> None:
        """Show these turns; `empty` is what stands there without one."""
        past = [turn for turn in turns if turn.ended]
        blind = any(turn.order for turn in turns)
        heads = [turn.head(self._who) for turn in reversed(turns)]
        name = next((head for head in heads if head != self._who), self._who)
        if blind:
            name = "left" if self._who == BASE else "right"
        self._head.value = f"<h4>{html.escape(name)}</h4>"
        written = (blind, *((turn, turn.vote) for turn in past))
        if written != self._written:
            self._written = written
            *before, newest = ["", *(turn.html(self._who, named=not blind) for turn in past)]
            self._past.value, self._newest.value = "".join(before), newest
        live = turns[-1].html(self._who, named=not blind) if turns and not turns[-1].ended else ""
        self._live.value = live if turns else _muted(empty)


def _muted(text: str) -> str:
    return f'<div class="bn-muted">{html.escape(text)}</div>'
