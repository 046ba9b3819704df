"""The Chat tab: one question box, and the answers of base and tuned streaming into adjacent panes."""

import dataclasses
import functools
import html
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import ipywidgets as w

from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.assistant.conversation import Conversation
from bizassist_nb.assistant.loaded import active_answers, loaded_base
from bizassist_nb.core.errors import BizassistError
from bizassist_nb.core.generation import BASE, TUNED, Generation
from bizassist_nb.notebook.panel.controls import fold, tip
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.transcript import Pane, Turn
from bizassist_nb.notebook.panel.update_loop import UpdateLoop, clicked
from bizassist_nb.results.ballot import CHOICES, KEYS_IN_WORDS, Ballot, choice_of, draw_order, tally

_SLICE: Final = 0.1
"""Seconds of answering before the panes are written again: smooth to the eye, and the kernel's messages get a turn."""
_QUIET: Final = 0.3
"""Seconds without a change after Enter: the front end may send the text after the Enter itself."""
_LATE: Final = 10.0
"""Seconds for which text is waited for after an Enter: a front end holds it back while it thinks the kernel busy."""

SUGGESTED: Final = (
    "How should we price a new feature?",
    "What should we ask in the first ten customer interviews?",
    "Which three metrics show that a product is worth keeping?",
    "Should we use AI to answer support requests?",
)
_NONE: Final = "base only"


class Chat:
    """The conversation, the question box, and how answers are drawn."""

    title = "Chat"

    def __init__(self, state: State, update_loop: UpdateLoop):
        """Build the widgets."""
        self._state = state
        self._turns: list[Turn] = []
        self._conversation = Conversation()
        self._answering: Answering | None = None
        self._entered: tuple[float, str] | None = None
        self._awaited = 0.0  # deadline for text that the browser sends after its Enter
        self._picked: str | None = None
        self._newest: str | None = None
        self._notice = ""
        active_answers.add(self)

        self._run = w.Dropdown(
            options=[_NONE], description="tuned model", **tip("the run whose adapter answers on the right")
        )
        self._run.add_class("bn-wide")
        self._panes = {who: Pane(who) for who in (BASE, TUNED)}
        panes = w.Box([pane.view for pane in self._panes.values()])
        panes.add_class("bn-panes")
        self._suggested = w.Box([self._suggestion(text, update_loop) for text in SUGGESTED])
        self._suggested.add_class("bn-chips")
        ask = self._question_row(update_loop)
        self._long = w.Textarea(description="long question", rows=6, **tip("a question of several lines"))
        send_long = w.Button(description="Send", button_style="primary", icon="paper-plane")
        clicked(send_long, update_loop, lambda: self._take(self._long))
        self._options = Options()
        self._blind = w.Checkbox(
            description="blind", indent=False, **tip("hide whose answer is whose until you have voted")
        )
        self._ballot = VoteRow(update_loop, self._vote)
        folded = [
            fold("A longer question", self._long, send_long),
            fold("Generation settings", self._options.view),
        ]
        self._status = w.HTML()
        self._status.add_class("bn-status")
        run = w.Box([self._run, self._blind])
        run.add_class("bn-row")
        self.view = w.VBox([run, panes, self._ballot.view, self._suggested, ask, self._status, *folded])

    def _question_row(self, update_loop: UpdateLoop) -> Any:
        """The question box and its buttons."""
        self._question = w.Text(
            description="question",
            placeholder="Ask both, then press Enter",
            continuous_update=False,  # the whole text in one message, not one a letter
            **tip("Enter sends it"),
        )
        self._question.observe(lambda _: self._on_late_text(update_loop), "value")
        self._question.on_msg(lambda _w, content, _b: self._on_key(content, update_loop))
        self._send = w.Button(description="Send", button_style="primary", icon="paper-plane")
        self._stop = w.Button(description="Stop generating", icon="stop")
        self._again = w.Button(description="Regenerate", icon="refresh", tooltip="answer the last question anew")
        self._clear = w.Button(description="Clear", icon="trash", tooltip="forget the conversation")
        clicked(self._send, update_loop, lambda: self._take(self._question))
        clicked(self._stop, update_loop, self.halt)
        clicked(self._again, update_loop, self._regenerate)
        clicked(self._clear, update_loop, self._forget)
        ask = w.Box([self._question, self._send, self._stop, self._again, self._clear])
        ask.add_class("bn-ask")
        return ask

    def _suggestion(self, text: str, update_loop: UpdateLoop) -> Any:
        button = w.Button(description=text, tooltip="ask this")
        clicked(button, update_loop, lambda: self._ask(text))
        return button

    def _on_key(self, content: Any, update_loop: UpdateLoop) -> None:
        if content.get("event") == "submit":
            update_loop.post(self._on_enter)

    def _on_late_text(self, update_loop: UpdateLoop) -> None:
        if self._question.value.strip() and time.monotonic() < self._awaited:
            update_loop.post(self._on_enter)

    # What the buttons do.

    def _on_enter(self) -> None:
        self._entered, self._awaited = (time.monotonic(), self._question.value), 0.0

    def _take(self, box: Any) -> None:
        """Ask what stands in the box, and empty it."""
        question = box.value.strip()
        if question and not self._answering:
            box.value = ""
            self._ask(question)

    def _ask(self, question: str) -> None:
        if self._answering:
            return
        self._notice = ""
        run = self._state.runs.get(self._picked or "")
        assistant = Assistant(*filter(None, [run]))
        who = (BASE, TUNED) if run else (BASE,)
        order = draw_order() if run and self._blind.value else None
        generation, conversation = self._options.generation(), self._conversation
        if order:  # what is voted on is the run as trained, and its answer to this question alone
            generation, conversation = dataclasses.replace(generation, strength=1.0), Conversation()
        stream = assistant.stream(question, generation, who=who, conversation=conversation)
        self._answering = Answering(assistant, stream)
        self._turns.append(Turn(question, run.name if run else None, order))

    def halt(self) -> None:
        """End the answer that is being written, if one is."""
        if self._answering:
            self._answering.close()
            self._answering = None
            self._turns[-1].end("stopped")

    def _regenerate(self) -> None:
        if self._turns and not self._answering:
            if self._options.greedy:
                self._notice = (
                    "With temperature 0 the answer is the same each time; raise it under Generation settings."
                )
            else:
                self._options.next_seed()
            last = self._turns.pop()
            if last.comparison and last.order is None:  # a blind one was never part of the conversation
                self._conversation.forget_last()
            notice = self._notice
            self._ask(last.question)
            self._notice = notice

    def _vote(self, choice: str) -> None:
        turn = self._turns[-1] if self._turns else None
        if turn and turn.votable and turn.comparison:
            ballot = Ballot(self._state.runs.get(turn.run or ""), turn.comparison, turn.order)
            turn.vote = ballot.cast(choice)
            self._notice = tally(ballot.run).sentence

    def _forget(self) -> None:
        self.halt()
        self._turns.clear()
        self._conversation.clear()
        self._notice = ""

    # What the pump calls.

    def update(self) -> None:
        """Go on answering for a moment, and show what there is."""
        self._choose()
        if self._entered:
            since, text = self._entered
            if text != self._question.value:
                self._entered = (time.monotonic(), self._question.value)
            elif time.monotonic() - since >= _QUIET:
                self._entered = None
                self._awaited = 0.0 if text.strip() else time.monotonic() + _LATE
                self._take(self._question)
        if self._answering:
            self._go_on(self._answering)
        for pane in self._panes.values():
            pane.show(self._turns)
        self._panes[TUNED].empty = (
            "The tuned model answers here." if self._picked else "No tuned model yet: train one on the Train tab."
        )
        self._state.working = self._answering is not None or self._entered is not None
        self._ballot.show(bool(self._turns) and self._turns[-1].votable)
        busy = self._answering is not None
        self._stop.disabled = not busy
        self._send.disabled = busy
        self._again.disabled = busy or not self._turns
        self._clear.disabled = not self._turns
        self._suggested.layout.display = None if not self._turns else "none"
        words = self._answering.words if self._answering else self._notice
        self._status.value = f'<span role="status">{html.escape(words)}</span>'

    def _choose(self) -> None:
        """List the runs that can be asked. The newest is taken when it becomes one, but not in mid-conversation."""
        names = self._state.tuned
        chosen = self._run.value
        talked_with = next((turn.run for turn in reversed(self._turns) if turn.run), None)
        if chosen != (self._picked or _NONE):
            self._picked = chosen if chosen in names else None
        newest = names[0] if names else None
        if newest != self._newest:
            self._newest = newest
            self._picked = self._picked if talked_with else newest
        if list(self._run.options) != [_NONE, *names]:
            self._run.options = [_NONE, *names]
        if self._picked not in names:
            self._picked = None
        self._run.value = self._picked or _NONE
        if talked_with and self._picked and self._picked != talked_with:  # it would go on from another's answers
            self._forget()
            self._notice = f"A new conversation, since tuned is now {self._picked}."

    def _go_on(self, answering: "Answering") -> None:
        turn = self._turns[-1]
        try:
            going = answering.step(turn)
        except BaseException:  # an interrupt, too, must leave no answer that seems to go on
            self._answering = None
            turn.end("not answered")
            raise
        if not going:
            self._answering = None
            turn.end("")


class VoteRow:
    """Four buttons to vote with, and a field in which one key votes."""

    def __init__(self, update_loop: UpdateLoop, vote: Callable[[str], None]):
        """`vote` is called by the pump."""
        buttons = []
        for choice, words in CHOICES.items():
            button = w.Button(description=words)
            clicked(button, update_loop, functools.partial(vote, choice))
            buttons.append(button)
        self._key = w.Text(
            description="vote by key", placeholder=KEYS_IN_WORDS, **tip("the first key typed here is your vote")
        )
        self._key.observe(lambda change: update_loop.post(lambda: self._typed(change["new"], vote)), "value")
        self.view = w.Box([*buttons, self._key])
        self.view.add_class("bn-ask")

    def show(self, wanted: bool) -> None:
        """Show it while there is something to vote on."""
        self.view.layout.display = None if wanted else "none"

    def _typed(self, text: str, vote: Callable[[str], None]) -> None:
        self._key.value = ""
        if choice := choice_of(text):
            vote(choice)


class Answering:
    """An answer under way: first the base is loaded, on a thread since it takes long, then both are decoded here."""

    def __init__(self, assistant: Assistant, stream: Iterator[Comparison]):
        """Begin to load what the assistant's stream of answers will need."""
        self.words = "Loading the model, once for this kernel …"
        self._stream = stream
        self._problem: BizassistError | None = None
        run = next(iter(assistant.runs), None)
        name = run.model if run else "auto"
        self._loading = threading.Thread(target=self._load, args=(name,), name="bizassist-load", daemon=True)
        self._loading.start()

    def _load(self, name: str) -> None:
        try:
            loaded_base(name)
        except BizassistError as error:  # raised again where it can be shown; any other comes again in the stream
            self._problem = error

    def step(self, turn: Turn) -> bool:
        """Decode for a moment into the turn; whether there is more to come."""
        if self._loading.is_alive():
            return True
        if self._problem:
            raise self._problem
        self.words = "Answering …"
        end = time.monotonic() + _SLICE
        while time.monotonic() < end:
            newer = next(self._stream, None)
            if newer is None:
                return False
            turn.comparison = newer
        return True

    def close(self) -> None:
        """Stop where it is."""
        self._stream.close()  # type: ignore[attr-defined] # a generator


class Options:
    """How answers are drawn."""

    def __init__(self) -> None:
        """The defaults: greedy."""
        self._fields: dict[str, Any] = {field.name: _input(field) for field in dataclasses.fields(Generation)}
        self.view = w.VBox(list(self._fields.values()))
        self.view.add_class("bn-options")

    def generation(self) -> Generation:
        """As the fields stand."""
        return Generation(**{name: field.value for name, field in self._fields.items()})

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return bool(self._fields["temperature"].value == 0)

    def next_seed(self) -> None:
        """Draw another answer next time."""
        self._fields["seed"].value += 1


def _input(field: "dataclasses.Field[Any]") -> Any:
    """A number for a whole one, a slider for a share, with the field's own range and text."""
    limits = field.metadata
    kind, step = (w.BoundedIntText, 1) if isinstance(field.default, int) else (w.FloatSlider, 0.05)
    label = field.name.replace("_", " ")
    return kind(
        value=field.default,
        min=limits["least"],
        max=limits["most"],
        step=step,
        description=label,
        **tip(limits["text"]),
    )
