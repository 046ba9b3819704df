"""The panel without a browser: what its controls do, and what is shown then; tests/browser has a person at it."""

import dataclasses
import json
import time
import weakref

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from random_run import random_run

from bizassist_nb import Assistant, BizassistError, Conversation, Panel, load_ipython_extension
from bizassist_nb.assistant import decoding, loaded
from bizassist_nb.core.errors import SettingsError
from bizassist_nb.runs.journal import Journal
from bizassist_nb.training import launch, preflight
from bizassist_nb.training.forecast import forecast

QUESTIONS = ("How should we price it?", "And what would you do next?")
DRAWN = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 500, "repetition_penalty": 1.1, "seed": 3}


class Driven:
    """A panel whose update loop is turned by the test instead of a kernel's event loop."""

    def __init__(self, folder):
        self.panel = Panel(str(folder))
        self.turn()

    def turn(self):
        self.panel._update_loop.turn()

    def widgets(self, at=None):
        at = at or self.panel._view
        yield at
        for child in getattr(at, "children", ()):
            yield from self.widgets(child)

    def named(self, name):
        """The last of that name: the train tab, which comes first, names some things as later ones do."""
        return [widget for widget in self.widgets() if getattr(widget, "description", None) == name][-1]

    def press(self, name):
        self.named(name).click()
        self.turn()

    def fill(self, name, value):
        self.named(name).value = value
        self.turn()

    def until(self, condition, timeout=60):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.shown()
            self.turn()
            time.sleep(0.01)

    def ask(self, question):
        self.fill("long question", question)
        self.press("Send")
        self.until(lambda: not self.named("Regenerate").disabled)

    def shown(self):
        return "\n".join(str(widget.value) for widget in self.widgets() if type(widget).__name__ == "HTML")


@pytest.fixture
def runs(tiny, tmp_path):
    return [random_run(tmp_path / "runs" / name, tiny) for name in ("one", "two")]


@pytest.fixture
def driven(runs):
    driven = Driven(runs[0].path.parent)
    for name, value in DRAWN.items():
        driven.fill(name.replace("_", " "), value)
    driven.fill("tuned model", "one")
    return driven


def test_what_is_said_before_training_is_what_training_finds(trained):
    *_, found = forecast(trained.settings)
    read = trained.last("data")["training"]
    assert (found.rows, found.tokens, found.truncated) == (read["rows"], read["tokens"], read["truncated"])
    assert found.steps == trained.total_steps
    assert found.expected.peak == pytest.approx(trained.last("preflight")["peak"])
    assert found.expected.fit.micro_batch == trained.last("fit")["micro_batch"]


def test_memory_is_told_before_training_and_too_little_is_an_alert(tiny, tmp_path, monkeypatch):
    driven = Driven(tmp_path)
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("data", "sample")):
        driven.fill(name, value)
    driven.fill("rows to train on, as a number", 24)
    driven.until(lambda: "GiB free" in driven.shown())
    assert "does not seem to fit" not in driven.shown()
    monkeypatch.setattr(preflight, "device", lambda: preflight.Device("cpu", (0, 0), 0.01))
    driven.fill("rows to train on, as a number", 25)
    driven.until(lambda: "does not seem to fit" in driven.shown())


def test_both_panes_remember_what_was_said_and_every_option_is_heeded(driven, runs):
    conversation, assistant = Conversation(), Assistant(runs[0])
    for question in QUESTIONS:
        driven.ask(question)
        expected = assistant.ask(question, conversation=conversation, **DRAWN)
    chat = driven.panel._tabs[2]
    assert chat._turns[-1].comparison == expected
    assert expected.answers != assistant.ask(QUESTIONS[1], **DRAWN).answers  # it has been told the first question
    driven.press("Regenerate")
    driven.until(lambda: not driven.named("Regenerate").disabled)
    assert [question for question, _ in chat._conversation.turns("base")] == list(QUESTIONS)
    assert chat._turns[-1].comparison.answers != expected.answers
    driven.press("Clear")
    assert chat._conversation.turns("base") == []


def test_a_question_without_an_answer_is_not_taken_back_for_another():
    conversation = Conversation()
    conversation.add("One?", {"base": "1", "tuned": "one"})
    conversation.add("Two?", {"base": "2", "tuned": " "})
    assert conversation.turns("tuned") == [("One?", "one")]
    conversation.forget_last()
    assert conversation.turns("tuned") == [("One?", "one")]
    assert conversation.turns("base") == [("One?", "1")]


def test_turns_that_no_longer_fit_are_dropped_and_it_is_said(driven):
    driven.ask("word " * 1500)
    assert "left out" not in driven.shown()
    driven.ask("word " * 1000)
    assert "the first question and its answer were left out" in driven.shown()


def test_strength_goes_from_the_base_to_beyond_what_was_trained(driven):
    driven.fill("temperature", 0.0)
    driven.fill("repetition penalty", 2.0)
    alike = []
    for strength in (0.0, 1.5):
        driven.fill("strength", strength)
        driven.ask(QUESTIONS[0])
        turn = driven.panel._tabs[2]._turns[-1]
        alike.append(turn.answer("tuned") == turn.answer("base"))
        driven.press("Clear")
    assert alike == [True, False]


def test_another_tuned_model_begins_a_new_conversation(driven):
    driven.ask(QUESTIONS[0])
    driven.fill("tuned model", "two")
    assert "A new conversation, since tuned is now two." in driven.shown()
    assert driven.panel._tabs[2]._conversation.turns("base") == []


def test_a_blind_vote_is_written_and_then_reveals_who_is_who(driven, runs):
    driven.fill("blind", True)
    driven.fill("strength", 0.5)
    driven.ask(QUESTIONS[0])
    chat = driven.panel._tabs[2]
    assert chat._turns[-1].comparison.strength == 1  # as trained, and not part of what is being talked about
    assert chat._conversation.turns("base") == []
    assert "tuned (one)" not in driven.shown()
    driven.press("Left is better")
    (line,) = (runs[0].path / "votes.jsonl").read_text().splitlines()
    vote = json.loads(line)
    assert vote["winner"] == vote["left"]
    assert "your vote" in driven.shown()
    assert "tuned (one)" in driven.shown()


def test_a_merged_model_is_exported_with_its_verdict(driven, runs):
    driven.fill("run", "one")
    driven.fill("export to", "merged")
    driven.press("Export")
    driven.until(lambda: "✓" in driven.shown(), timeout=120)
    assert str(runs[0].path / "merged") in driven.shown()
    assert "compared with the tuned model on 6 held-out prompts" in driven.shown()
    assert (runs[0].path / "merged" / "model.safetensors").is_file()


def test_an_export_that_fails_says_why_and_another_can_be_started(driven):
    driven.fill("export to", "hub")
    driven.fill("repository", "no-owner")
    driven.press("Export")
    assert driven.named("Export").disabled
    driven.until(lambda: not driven.named("Export").disabled)
    assert "name the hub repository as OWNER/NAME" in driven.shown()


def test_only_a_run_that_would_get_further_can_be_resumed(driven, runs):
    journal = Journal(runs[1].path)
    journal.write("state", state="failed")
    for message, refused in (("the disk is full", False), ("the loss became nan at step 5", True)):
        journal.write("error", message=message, expected=True)
        driven.turn()
        assert driven.named("Resume").disabled == refused
    assert "a lower learning_rate than 0.0002" in driven.named("Resume").tooltip


@pytest.fixture
def shell():
    shell = InteractiveShell()
    load_ipython_extension(shell)
    return shell


def test_a_run_that_is_started_in_a_cell_has_the_memory_of_an_answer_under_way(runs, shell, monkeypatch):
    monkeypatch.setattr(loaded, "_loaded", {})
    driven = Driven(runs[0].path.parent)
    driven.fill("tuned model", "one")
    driven.fill("max new tokens", 1500)
    driven.fill("long question", QUESTIONS[0])
    driven.press("Send")
    turn = driven.panel._tabs[2]._turns[-1]
    driven.until(lambda: turn.comparison and turn.answer("tuned"))
    base = weakref.ref(*loaded._loaded.values())
    with pytest.raises(SettingsError):
        shell.find_cell_magic("finetune")("NAME", "rank = 0")
    assert base()  # nothing came of it, so the answer goes on
    monkeypatch.setattr(launch, "finetune", lambda *_, **__: runs[0])
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")  # only there it lets go of bases
    shell.find_cell_magic("finetune")("NAME", "")
    assert base() is None
    assert (turn.ended, turn.remark) == (True, "stopped")


def test_an_answer_that_is_interrupted_in_a_cell_keeps_no_base(runs, shell, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded, "_loaded", {})
    monkeypatch.setattr(decoding._ModuleSteps, "forward", interrupted)
    shell.run_cell(f"%%ask --run one --runs-dir {runs[0].path.parent}\n{QUESTIONS[0]}")
    base = weakref.ref(*loaded._loaded.values())
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")
    loaded.unload()
    assert base() is None


def test_a_base_that_a_run_would_have_go_counts_as_free(runs, monkeypatch):
    monkeypatch.setattr(loaded, "_loaded", {})
    monkeypatch.setattr(torch.cuda, "memory_allocated", iter((0, 2 << 30)).__next__)  # before it is loaded, and after
    monkeypatch.setattr(preflight, "device", lambda: preflight.Device("cpu", (0, 0), 3.0))
    settings = dataclasses.replace(runs[0].settings, subset=4)
    *_, before = forecast(settings)
    loaded.loaded_base(settings.model)
    *_, after = forecast(settings)
    assert (before.expected.free, after.expected.free) == (3.0, 5.0)


def test_outside_a_notebook_it_says_so(driven):
    with pytest.raises(BizassistError, match="shown in a notebook"):
        driven.panel.show()
