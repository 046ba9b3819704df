"""The Chat tab: one question box, and the answers streaming into adjacent panes, one for each who answers."""

import contextlib
import dataclasses
import functools
import html
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import ipywidgets as w
import msgspec

from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.comparison import Comparison, Conversation
from bizassist_nb.assistant.loaded import active_answers, bases, unload
from bizassist_nb.core.errors import BizassistError, QuestionError, RunError, brief
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED, Generation
from bizassist_nb.core.settings import user_path
from bizassist_nb.notebook.panel.controls import fold, offer
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.notebook.panel.transcript import Pane, Turn
from bizassist_nb.notebook.panel.update_loop import UpdateLoop
from bizassist_nb.notebook.views import close, labelled, vote_row
from bizassist_nb.results.ballot import Ballot, draw_order, tally
from bizassist_nb.runs.records import decode
from bizassist_nb.runs.run import check_name
from bizassist_nb.training.forecast import ForecastThread

_SLICE: Final = 0.1
"""Seconds of answering between updates of the panes: smooth to the eye, and the kernel can handle its messages."""
_QUIET: Final = 0.3
"""Seconds without a change after Enter: the front end may send the text after the Enter itself."""
_LATE: Final = 10.0
"""Seconds to wait for text after an Enter: a front end delays it while it thinks the kernel busy."""

SUGGESTED: Final = (
    "How should we price a new feature?",
    "What should we ask in the first ten customer interviews?",
    "Which three metrics show that a product is worth keeping?",
    "Should we use AI to answer support requests?",
)
COLUMNS: Final = {
    "base and tuned": (BASE, TUNED),
    "tuned alone": (TUNED,),
    "base alone": (BASE,),
    "base, tuned and prompted base": (BASE, TUNED, PROMPTED),
}
"""Who can be asked; tuned is each of the runs that are chosen."""
_EMPTY: Final = "Ask a question below, or take one of those suggested."
_NO_MODEL: Final = "No tuned model yet: train one on the Train tab."
_TYPED: Final = {"stop": ("stop at", "one text a line"), "system": ("system prompt", "as in training")}
_GREEDY: Final = "With temperature 0 the answer is the same each time; raise it under Generation settings."


class Chat:
    """The conversation, the question box, and the generation settings."""

    title = "Chat"

    def __init__(self, state: State, update_loop: UpdateLoop):
        self._state, self._update_loop = state, update_loop
        self.turns: list[Turn] = []
        self._cleared: list[Turn] = []
        self.answering: Generator[str] | None = None
        """The answer under way; it yields what it is doing."""
        self._entered: tuple[float, str] | None = None
        self._awaited = 0.0  # deadline for text that the browser sends after its Enter
        self._newest: list[str] = []
        self._notice = ""
        active_answers.add(self)

        hint = "the runs whose adapters answer; hold Ctrl or Shift to choose several or none"
        self._runs = labelled(w.SelectMultiple, "tuned model", hint, rows=2).add_class("bn-wide")
        hint = "who answers, each in a column"
        self._columns = labelled(w.Dropdown, "answers of", hint, options=list(COLUMNS.items())).add_class("bn-wide")
        hint = "hide which answer is which until you have voted"
        self._blind = labelled(w.Checkbox, "blind", hint, indent=False)
        hint = "take GPU memory that the run in training may need"
        self._anyway = labelled(w.Checkbox, "chat anyway", hint, indent=False)
        who = [w.Box(row).add_class("bn-row") for row in ([self._runs], [self._columns, self._blind, self._anyway])]
        self._panes: dict[str, Pane] = {}
        self._talk = w.Box().add_class("bn-panes")
        self._votes = vote_row(self._vote, update_loop.post).add_class("bn-ask")
        suggested = [
            update_loop.button(text, functools.partial(self.ask, text), tooltip="ask this") for text in SUGGESTED
        ]
        self._suggested = w.Box(suggested).add_class("bn-chips")
        self._long = labelled(w.Textarea, "long question", "a question of several lines", rows=6)
        self.options: dict[str, Any] = {field.name: _input(field) for field in dataclasses.fields(Generation)}
        options = w.VBox(list(self.options.values())).add_class("bn-options")
        self._folded = fold("A longer question", self._long, self._send_button(self._long))
        settings = fold("Generation settings", options)
        self._status = w.HTML().add_class("bn-status")
        question = self._question_row()
        self._name = labelled(w.Text, "saved as", "name of its file in the folder of runs", value="chat")
        files = [update_loop.button(name, act) for name, act in (("Save", self._save), ("Load", self._load))]
        saved = fold("Save or load", w.Box([self._name, *files]).add_class("bn-row"))
        asking = [self._votes, self._suggested, question, self._status]
        self.view = w.VBox([*who, self._talk, *asking, self._folded, saved, settings])

    def _question_row(self) -> Any:
        """The question box and its buttons."""
        self._question = labelled(w.Text, "question", "Enter sends it", placeholder="Ask, then press Enter")
        self._question.continuous_update = False  # the whole text in one message, not one a letter
        button, post = self._update_loop.button, self._update_loop.post
        self._question.on_msg(lambda _w, content, _b: content.get("event") == "submit" and post(self._on_enter))
        self._send = self._send_button(self._question)
        self._stop = button("Stop generating", self.halt, icon="stop")
        self._again = button("Regenerate", self._regenerate, icon="refresh", tooltip="answer the last question anew")
        self._edit = button("Edit", self._on_edit, icon="pencil", tooltip="take the last question back, to change it")
        self._clear = button("Clear", self.forget, icon="trash", tooltip="forget the conversation")
        self._undo = button("Undo Clear", lambda: self._restore(self._cleared), icon="undo")
        self._unload = button("Unload", self._on_unload, icon="eject", tooltip="free the memory that the model takes")
        buttons = [self._send, self._stop, self._again, self._edit, self._clear, self._undo, self._unload]
        return w.Box([self._question, *buttons]).add_class("bn-ask")

    def _send_button(self, box: Any) -> Any:
        send = functools.partial(self._take, box)
        return self._update_loop.button("Send", send, button_style="primary", icon="paper-plane")

    # What the buttons do.

    def _on_enter(self) -> None:
        self._entered, self._awaited = (time.monotonic(), self._question.value), 0.0

    def _take(self, box: Any) -> None:
        """Ask the question in the box, and empty it."""
        question = box.value.strip()
        if question and not self.answering:
            self.ask(question)
            box.value = ""

    def ask(self, question: str) -> None:
        """Begin to answer, unless an answer is under way."""
        if self.answering:
            return
        self._notice = ""
        self._choose()
        runs, who = self._runs.value, self._columns.value
        assistant = Assistant(
            *(self._state.runs[name] for name in runs), base=self._state.base, anyway=self._anyway.value
        )
        order = draw_order() if runs and self._blind.value else None
        generation, conversation = self._generation(), self.conversation
        if order:  # a vote is on the run as trained, and on its answer to this question alone
            if len(runs) > 1:
                raise QuestionError(f"a blind vote is between base and one run, not {', '.join(runs)}: choose one")
            who = (BASE, TUNED)
            generation, conversation = dataclasses.replace(generation, strength=1.0, system=None), Conversation()
        elif not runs and PROMPTED not in who:
            who = (BASE,)
        turn = Turn(question, runs if TUNED in who else (), order)
        stream = assistant.stream(question, generation, who=who, conversation=conversation)
        self.answering = _answering(assistant, stream, turn, self._state.watch)
        self.turns.append(turn)

    def _generation(self) -> Generation:
        """What the generation settings ask for; an empty system prompt asks for that of training."""
        typed = {name: field.value for name, field in self.options.items()}
        return Generation(**typed | {"stop": tuple(typed["stop"].splitlines()), "system": typed["system"] or None})

    def halt(self) -> None:
        """End the answer that is being written, if one is."""
        if self.answering:
            self.answering.close()
            self.answering = None
            self.turns[-1].end("stopped")

    def _regenerate(self) -> None:
        if not self.turns or self.answering:
            return
        greedy = self.options["temperature"].value == 0
        self.options["seed"].value += 0 if greedy else 1
        self.ask(self.turns.pop().question)
        self._notice = _GREEDY if greedy else self._notice

    def _on_edit(self) -> None:
        """Take the last turn out, and put its question where it was typed."""
        if self.turns and not self.answering:
            question = self.turns.pop().question
            box = self._long if "\n" in question else self._question
            self._folded.children[0].value = box is self._long or self._folded.children[0].value
            self._awaited = 0.0  # it is not what an Enter was pressed for
            box.value = question
            box.send({"do": "focus"})

    def _on_unload(self) -> None:
        held = _held()
        unload(on_cpu=True)
        self._notice = f"Freed {held}. The next question loads the model again."

    def _vote(self, choice: str) -> None:
        turn = self.turns[-1] if self.turns else None
        if turn and turn.votable and turn.comparison:
            ballot = Ballot(self._state.runs.get(turn.runs[0]), turn.comparison, turn.order)
            turn.vote = ballot.cast(choice)
            self._notice = tally(ballot.run).sentence

    def forget(self) -> None:
        """Begin a new conversation."""
        self.halt()
        self._cleared, self.turns = self.turns or self._cleared, []
        self._notice = ""

    def _restore(self, turns: list[Turn]) -> None:
        """Go on with a conversation that was cleared or saved, with the runs that answered in it."""
        runs = _asked(turns)
        if lost := [run for run in runs if run not in self._runs.options]:
            raise RunError(f"the run {lost[0]!r} that answered in that conversation is not in {self._state.runs_dir}")
        self.forget()
        self._runs.value, self.turns = runs, list(turns)

    def _place(self) -> Path:
        return user_path(self._state.runs_dir) / f"{check_name(self._name.value)}.json"

    def _save(self) -> None:
        """Write the conversation into the folder of runs, as JSON and, to be read, as Markdown."""
        said = [turn.comparison for turn in self.turns if turn.comparison and turn.order is None]
        place, pages = self._place(), "\n\n---\n\n".join(each._repr_markdown_() for each in said)
        write_atomic(place, lambda part: part.write_bytes(msgspec.json.encode(said)))
        write_atomic(place.with_suffix(".md"), lambda part: part.write_text(pages, "utf-8"))
        self._notice = f"Saved as {place}, and as Markdown beside it."

    def _load(self) -> None:
        try:
            said = decode(self._place().read_bytes(), list[Comparison])
        except (OSError, ValueError) as error:
            raise RunError(f"{self._place()} is no saved conversation ({brief(error)}); name another") from error
        self._restore([Turn(each.question, each.runs, None, None, each, True) for each in said])

    @property
    def conversation(self) -> Conversation:
        """What was said so far, without blind questions: a vote is on the answers to one question alone."""
        said = Conversation()
        for turn in self.turns:
            if turn.comparison and turn.order is None:
                said.add(turn.question, turn.comparison.answers)
        return said

    # What the update loop calls.

    def update(self) -> None:
        """Continue the answers for a moment, and show them."""
        self._choose()
        if time.monotonic() < self._awaited and self._question.value.strip():
            self._on_enter()
        if self._entered:
            since, text = self._entered
            if text != self._question.value:
                self._entered = (time.monotonic(), self._question.value)
            elif time.monotonic() - since >= _QUIET:
                self._entered = None
                self._awaited = 0.0 if text.strip() else time.monotonic() + _LATE
                self._take(self._question)
        if self.answering:
            self._doing = self._go_on(self.answering)
        self._show_panes()
        busy = self.answering is not None
        self._state.working = busy or self._entered is not None
        self._anyway.layout.display = None if self._state.live else "none"
        self._votes.layout.display = None if self.turns and self.turns[-1].votable else "none"
        self._stop.disabled = not busy
        self._send.disabled = busy
        self._again.disabled = self._edit.disabled = busy or not self.turns
        self._undo.layout.display = None if self._cleared and not self.turns else "none"
        self._clear.disabled = not self.turns
        self._suggested.layout.display = None if not self.turns else "none"
        held = _held()
        self._unload.description, self._unload.layout.display = f"Unload {held}", None if held else "none"
        words = self._doing if busy else self._notice
        self._status.value = f'<span role="status">{html.escape(words)}</span>'

    def _show_panes(self) -> None:
        """Show a pane for each who is asked; those of a blind question stand for left and right."""
        runs, who = self._runs.value, self._columns.value
        if any(turn.order for turn in self.turns):
            who = (BASE, TUNED)
        tuned = [f"{TUNED} ({run})" for run in runs] if len(runs) > 1 else [TUNED]
        names = [name for each in who for name in (tuned if each == TUNED else [each])]
        if names != list(self._panes):
            gone = [pane.view for name, pane in self._panes.items() if name not in names]
            self._panes = {name: self._panes.get(name) or Pane(name) for name in names}
            self._talk.children = [pane.view for pane in self._panes.values()]
            for view in gone:
                close(view)
        for name, pane in self._panes.items():
            pane.show(self.turns, _NO_MODEL if name == TUNED and not runs else _EMPTY)

    def _choose(self) -> None:
        """List the runs that can answer. A new one is chosen at once, but not in mid-conversation."""
        names = self._state.tuned
        talked_with = _asked(self.turns)
        offer(self._runs, names)
        self._runs.layout.display = None if names else "none"
        if names[:1] != self._newest:
            self._newest = names[:1]
            if names and not talked_with:
                self._runs.value = names[:1]
        chosen = self._runs.value
        if talked_with and chosen and {*chosen} != {*talked_with}:  # they would continue another's answers
            self.forget()
            self._notice = f"A new conversation, since tuned is now {', '.join(chosen)}."

    def _go_on(self, answering: Iterator[str]) -> str:
        try:
            return next(answering)
        except StopIteration:
            self.turns[-1].end("")
        except BaseException as error:  # an interrupt, too, must leave no answer that seems to continue
            self.turns[-1].end("not answered")
            self.answering = None
            # The update loop shows an update's error for a turn; this stays until the next question.
            self._notice = f"⚠ {error if isinstance(error, BizassistError) else brief(error)}"
            raise
        self.answering = None
        return ""


def _asked(turns: list[Turn]) -> tuple[str, ...]:
    """The runs that were asked last in these turns."""
    return next((turn.runs for turn in reversed(turns) if turn.runs), ())


def _held() -> str:
    """The bases in memory with what they take; empty without one."""
    sizes = {base.base.name.rpartition("/")[2]: base.size / 1e9 for base in list(bases.values())}
    return ", ".join(f"{name}: {size:.2g} GB" for name, size in sizes.items())


def _answering(assistant: Assistant, stream: Iterator[Comparison], turn: Turn, watch: ForecastThread) -> Generator[str]:
    """Answer into `turn`: a thread loads the base, which takes long; then the main thread decodes in slices."""
    while watch.busy and not watch.found:  # transformers fails where two threads import it at once
        yield "Reading the rows on the Train tab first …"
    thread = ThreadPoolExecutor(1, "bizassist-load")
    loading = thread.submit(assistant.load)
    thread.shutdown(wait=False)
    while not loading.done():
        yield "Loading the model, once for this kernel …"
    loading.result()  # raises what loading raised
    with contextlib.closing(stream):  # type: ignore[type-var] # a generator
        end = time.monotonic() + _SLICE
        for turn.comparison in stream:
            if time.monotonic() >= end:
                yield "Answering …"
                end = time.monotonic() + _SLICE


def _input(field: "dataclasses.Field[Any]") -> Any:
    """An input with the field's text and range: lines of text, a number for a whole one, else a slider."""
    limits = field.metadata
    if limits["least"] is None:
        name, hint = _TYPED[field.name]
        return labelled(w.Textarea, name, limits["text"], rows=2, placeholder=hint)
    kind, step = (w.BoundedIntText, 1) if isinstance(field.default, int) else (w.FloatSlider, 0.05)
    state = {"value": field.default, "min": limits["least"], "max": limits["most"], "step": step}
    return labelled(kind, field.name.replace("_", " "), limits["text"], **state)
