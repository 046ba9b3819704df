"""The panel without a browser: what its controls do, and what is shown then; tests/browser has a person at it."""

import asyncio
import contextlib
import dataclasses
import datetime
import functools
import html
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import weakref
import zipfile

import ipywidgets
import pytest
import torch
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from live_kernel import wait_until
from random_run import random_run

from bizassist_nb import Assistant, BizassistError, Comparison, Conversation, Panel, load_ipython_extension, open_run
from bizassist_nb.api import Run
from bizassist_nb.assistant import assistant, decoding, loaded
from bizassist_nb.core.errors import ModelError, RunError, SettingsError
from bizassist_nb.core.settings import DEMO, PRESETS, Settings
from bizassist_nb.notebook import views
from bizassist_nb.notebook.panel.transcript import Pane, Turn
from bizassist_nb.results.model_card import write_card
from bizassist_nb.results.summary import run_text
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal, json_line, take_lock, write_worker
from bizassist_nb.runs.run import list_runs, running
from bizassist_nb.training import launch, preflight
from bizassist_nb.training.forecast import forecast, past
from bizassist_nb.training.launch import start

QUESTIONS = ("How should we price it?", "And what would you do next?")
DRAWN = {"max_new_tokens": 12, "temperature": 1.0, "top_p": 0.95, "top_k": 500, "repetition_penalty": 1.1, "seed": 3}


class Driven:
    """A panel whose update loop is turned by the test instead of a kernel's event loop."""

    def __init__(self, folder):
        self.panel = Panel(str(folder))
        self.turn()

    def turn(self):
        self.panel.update_loop.turn()

    def widgets(self, at=None):
        at = at or self.panel.view
        yield at
        for child in getattr(at, "children", ()):
            yield from self.widgets(child)

    def named(self, name, which=-1):
        """The last of that name: the train tab, which comes first, names some things as later ones do."""
        return [widget for widget in self.widgets() if getattr(widget, "description", None) == name][which]

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
    driven.fill("tuned model", ["one"])
    return driven


def test_what_is_said_before_training_is_what_training_finds(trained, monkeypatch):
    free = trained.last(records.Preflight).free  # what other processes take may have changed since
    here = dataclasses.replace(preflight.device(), free=free)
    monkeypatch.setattr(preflight, "device", lambda: here)
    *_, found = forecast(trained.settings)
    read = trained.last(records.Data).training
    assert (found.rows, found.epoch_tokens) == (read.rows, read.tokens)
    assert found.truncated_share * found.rows == pytest.approx(read.truncated)
    assert found.steps == trained.total_steps
    assert found.expected.peak == pytest.approx(trained.last(records.Preflight).peak)
    assert found.fit.micro_batch == trained.last(records.Fit).micro_batch
    assert found.power.rows == trained.last(records.Power).rows == trained.evaluation.base.rows


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Be a machine with that device, on which no panel was open yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda name: monkeypatch.setattr(preflight, "device", lambda: preflight.Device(name, (0, 0), 16.0))


def test_the_form_opens_on_what_trains_here(machine, tmp_path):
    for name, expected in (("cpu", Settings.from_toml(DEMO)), ("cuda:0", Settings())):
        machine(name)
        driven = Driven(tmp_path)
        assert driven.panel.state.settings == dataclasses.replace(expected, runs_dir=str(tmp_path))
        assert driven.named("data").value == expected.data
        assert not (tmp_path / "cache" / "bizassist_nb").exists()  # nothing was typed


def test_the_form_is_kept_over_a_restart_of_the_kernel(machine, tmp_path):
    machine("cpu")
    driven = Driven(tmp_path)
    driven.fill("LoRA rank, as a number", 8)
    driven.fill("columns", 'response = "answer"')
    driven.until(lambda: not driven.panel.state.unsettled)
    kept = dataclasses.replace(Settings.from_toml(DEMO), rank=8, columns={"response": "answer"}, runs_dir=str(tmp_path))
    driven.fill("seed", -1)  # what is not valid is not kept
    driven.until(lambda: not driven.panel.state.unsettled)
    assert Driven(tmp_path).panel.state.settings == kept
    assert Driven(tmp_path / "another").panel.state.settings.rank == 16
    (form,) = (tmp_path / "cache" / "bizassist_nb" / "forms").iterdir()
    form.write_text("of_another_version = 1")
    assert Driven(tmp_path).panel.state.settings.rank == 16


def test_a_preset_fills_the_form_and_keeps_the_folder(machine, tmp_path):
    machine("cpu")
    driven = Driven(tmp_path)
    driven.fill("batch size", 7)
    for name, (_, toml) in PRESETS.items():
        driven.press(name)
        if name != "My data":
            expected = dataclasses.replace(Settings.from_toml(toml), runs_dir=str(tmp_path))
            assert driven.panel.state.settings == expected
    assert driven.named("data: which").value == ""
    assert driven.named("data: which").layout.display is None
    assert "⚠ write a hub id (owner/name) or path of a file" in driven.shown()
    assert driven.named("Start").disabled


def test_the_cell_to_copy_is_written_only_when_the_settings_change(machine, tmp_path):
    machine("cpu")
    driven = Driven(tmp_path)
    cell = driven.named("as a cell")
    driven.fill("as a cell", "typed by a person")
    driven.turn()
    assert cell.value == "typed by a person"
    driven.fill("batch size", 2)
    assert cell.value.startswith("%%finetune\n")
    assert "batch_size = 2" in cell.value


def test_the_menu_of_runs_to_load_begins_with_the_newest_and_keeps_what_was_chosen(driven, runs, tiny):
    menu = driven.named("settings of run")
    assert menu.value == "two"
    driven.fill("settings of run", "one")
    random_run(runs[0].path.with_name("three"), tiny)
    driven.until(lambda: "three" in menu.options)
    assert menu.value == "one"


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


def test_rows_that_cannot_be_used_are_warned_of_before_training_and_after(tiny, tmp_path, rows_file):
    rows = [{"instruction": f"Why {i}? " * (2 if i % 4 else 60), "response": "So it is."} for i in range(40)]
    rows[3] = {"instruction": "Only a question"}
    asked = {"model": str(tiny), "data": str(rows_file(rows)), "subset": 24, "held_out": 6, "max_length": 64}
    driven = Driven(tmp_path)
    for name in ("model", "data"):
        driven.fill(name, "other …")
        driven.fill(f"{name}: which", asked[name])
    driven.fill("rows to train on, as a number", 24)
    driven.fill("held out", 6)
    driven.fill("max length", 64)
    driven.until(lambda: "GiB free" in driven.shown())
    assert "1 rows of the data cannot be used; the first is row 4: " in driven.shown()
    [few] = re.findall(r"(\d+) of 24 rows are not used", driven.shown())
    [needed] = re.findall(r"With max_length = (\d+) all are used whole", driven.shown())
    assert 0 < int(few) < 24
    *_, found = forecast(Settings(**asked | {"max_length": int(needed)}))
    assert (found.too_long, found.truncated_share) == (0, 0)
    assert re.search(r"With [0-6] test rows nobody can tell \(at least 12 are needed\)", driven.shown())
    run = start(Settings(**asked, runs_dir=str(tmp_path), engine="transformers"), "run")
    wait_until(lambda: run.last(records.Data))
    run.kill()
    assert re.search(rf"of 30 rows are not used: .*With max_length = {needed} all", run_text(run))


def test_rows_that_choose_the_adapter_are_no_test_rows(tiny, tmp_path):
    """What can be seen is promised for the test rows alone."""
    asked = {"model": str(tiny), "data": "sample", "subset": 24, "held_out": 24, "runs_dir": str(tmp_path)}
    *_, plain = forecast(Settings(**asked))
    *_, split = forecast(Settings(**asked, keep="best"))
    assert (plain.power.rows, split.power.rows) == (24, 16)
    assert split.power.change > plain.power.change


def test_a_template_is_previewed_as_it_is_edited_with_what_is_odd_about_its_rows(tiny, tmp_path, rows_file):
    rows = [{"text": f"Message number {i} of them", "label": i % 3 == 0} for i in range(40)]
    rows[3]["text"] += ", jane.doe@example.com"
    driven = Driven(tmp_path)
    for name, value in (("model", str(tiny)), ("data", str(rows_file(rows)))):
        driven.fill(name, "other …")
        driven.fill(f"{name}: which", value)
    driven.fill("rows to train on, as a number", 30)
    driven.fill("held out", 10)
    driven.fill("engine", "transformers")
    driven.fill("template", 'user = "Is this urgent? {txt}", assistant = "{label}"')
    driven.until(lambda: "has no column &#x27;txt&#x27; (named in template); it has text, label" in driven.shown())
    assert "did you mean {text}?" in driven.shown()
    driven.fill("template", 'user = "Is this urgent? {text}", assistant = "{label}"')
    driven.until(lambda: "Is this urgent? Message number" in driven.shown())
    driven.until(lambda: "answers are labels: false" in driven.shown())
    assert "Data check of the 30 rows drawn" in driven.shown()
    settings = driven.panel.state.settings
    assert settings.template == {"user": "Is this urgent? {text}", "assistant": "{label}"}
    assert Settings.from_toml(driven.named("as a cell").value.partition("\n")[2]) == settings
    drawn = {row.number for row in driven.panel.state.watch.found.training}
    assert ("hold an e-mail address" in driven.shown()) == (4 in drawn)


def test_the_time_promised_is_that_of_the_whole_run(tiny, tmp_path):
    def write(run, **seconds):
        (run.path / "events.jsonl").unlink()
        now = time.time()
        for state, took in seconds.items():
            Journal(run.path).append(json_line(records.State(state=state, time=now)))
            now += took
            for step in range(10) if state == "training" else ():
                done = {"step": step + 1, "loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 1.0, "tokens": 1000}
                Journal(run.path).append(json_line(records.Step(**done, seconds=1.0, time=now - 1)))

    run = random_run(tmp_path / "run", tiny)
    write(run, starting=5, loading=25, scoring=10, training=30, answering=60, saving=5, finished=0)
    assert past([run], run.model) == ("run", 1000.0, 125.0)  # all of 135 s but for the steps
    driven = Driven(tmp_path)
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("data", "sample")):
        driven.fill(name, value)
    driven.fill("rows to train on, as a number", 24)
    driven.until(lambda: "GiB free" in driven.shown())
    assert "and the 2 min that it took to load, score, answer and save" in driven.shown()
    [promised] = re.findall(r"<span>time</span> <b>≈ (\d+) min</b>", driven.shown())
    assert int(promised) >= 2
    write(run, starting=5, loading=25, scoring=10, training=30, stopped=0)
    assert past([Run(run.path)], run.model) == ("run", 1000.0, None)


def test_both_panes_remember_what_was_said_and_every_option_is_heeded(driven, runs):
    conversation, assistant = Conversation(), Assistant(runs[0])
    for question in QUESTIONS:
        driven.ask(question)
        expected = assistant.ask(question, conversation=conversation, **DRAWN)
    chat = driven.panel.tabs[2]
    assert chat.turns[-1].comparison == expected
    assert expected.answers != assistant.ask(QUESTIONS[1], **DRAWN).answers  # it has been told the first question
    driven.press("Regenerate")
    driven.until(lambda: not driven.named("Regenerate").disabled)
    assert [question for question, _ in chat.conversation.turns("base")] == list(QUESTIONS)
    assert chat.turns[-1].comparison.answers != expected.answers
    driven.press("Clear")
    assert chat.conversation.turns("base") == []


def test_a_question_without_an_answer_is_no_turn_of_who_did_not_answer():
    conversation = Conversation()
    conversation.add("One?", {"base": "1", "tuned": "one"})
    conversation.add("Two?", {"base": "2", "tuned": " "})
    assert conversation.turns("tuned") == [("One?", "one")]
    assert conversation.turns("base") == [("One?", "1"), ("Two?", "2")]


def heads(driven):
    """What stands above the panes, in their order."""
    return re.findall(r"<h4>(.*?)</h4>", driven.shown())


def test_the_columns_are_those_that_are_asked_for(driven, runs, tiny):
    driven.ask(QUESTIONS[0])
    chat = driven.panel.tabs[2]
    for columns, names in ((("tuned",), ["tuned"]), (("base",), ["base"]), (("base", "tuned"), ["base", "tuned"])):
        driven.fill("answers of", columns)
        assert [head.partition(" ")[0] for head in heads(driven)] == names
        driven.ask(QUESTIONS[1])
        assert list(chat.turns[-1].comparison.answers) == names
    talk = Conversation(chat.conversation[:-1])
    expected = Assistant(runs[0]).ask(QUESTIONS[1], conversation=talk, **DRAWN)
    assert chat.turns[-1].comparison == expected  # each has gone on from what it said itself
    assert chat.conversation.turns("base") == talk.turns("base")
    assert [question for question, _ in talk.turns("tuned")] == [QUESTIONS[0], QUESTIONS[1], QUESTIONS[1]]
    driven.fill("answers of", ("base", "tuned", "prompted"))
    assert "three training rows of the run as examples" not in driven.shown()  # it says what it was not asked
    assert driven.shown().count("not asked") >= 4
    driven.fill("tuned model", [])
    driven.press("Clear")
    driven.fill("long question", QUESTIONS[0])
    driven.press("Send")
    driven.until(lambda: "a prompt takes its examples from the rows of a run" in driven.shown())


def test_several_runs_answer_in_one_conversation_which_is_saved(driven, runs):
    driven.fill("tuned model", ["two", "one"])
    driven.ask(QUESTIONS[0])
    assert [head.partition(" (/")[0] for head in heads(driven)][1:] == ["tuned (two)", "tuned (one)"]
    chat = driven.panel.tabs[2]
    talk = Conversation()
    first = Assistant(runs[1], runs[0]).ask(QUESTIONS[0], conversation=talk, **DRAWN)
    assert chat.turns[-1].comparison == first
    driven.press("Save")
    driven.press("Clear")
    driven.fill("tuned model", ["one"])
    driven.press("Load")
    assert driven.named("tuned model").value == ("two", "one")
    driven.ask(QUESTIONS[1])
    assert chat.turns[-1].comparison == Assistant(runs[1], runs[0]).ask(QUESTIONS[1], conversation=talk, **DRAWN)
    driven.fill("blind", True)
    driven.fill("long question", QUESTIONS[1])
    driven.press("Send")
    assert "a blind vote is between base and one run, not two, one: choose one" in driven.shown()
    assert driven.named("long question").value == QUESTIONS[1]  # what was typed is not lost
    driven.fill("tuned model", ["one"])
    assert "A new conversation, since tuned is now one." in driven.shown()


def test_the_last_question_comes_back_to_be_changed(driven):
    chat, edit = driven.panel.tabs[2], driven.named("Edit")
    assert edit.disabled
    for question in QUESTIONS:
        driven.ask(question)
    kept = chat.conversation[:1]
    driven.press("Edit")
    assert driven.named("question").value == QUESTIONS[1]
    assert chat.conversation == kept
    driven.ask("First\nthis, then that?")
    driven.press("Edit")
    assert driven.named("long question").value == "First\nthis, then that?"
    assert driven.named("A longer question").value  # unfolded
    assert [turn.question for turn in chat.turns] == [QUESTIONS[0]]


def test_an_answer_is_copied_as_it_was_written_and_read_out_once_it_is_whole():
    pane = Pane("base")
    _, newest, live = pane.view.children[1].children[0].children
    done = Turn("Why?", comparison=Comparison("Why?", {"base": "Take **ten** <b>."}), ended=True)
    pane.show([done])
    assert "<div hidden>" in newest.value
    assert "Take **ten** &lt;b&gt;.</div>" in newest.value
    assert "bn-newest" in newest._dom_classes  # which the browser's tests see marked as aria-live
    spoken = newest.value
    going = Turn("And?", comparison=Comparison("And?", {"base": "Then"}))
    pane.show([done, going])
    assert "Then" in live.value
    assert "Copy</button>" not in live.value
    assert newest.value == spoken


def test_the_model_is_unloaded_and_the_button_says_what_it_holds(driven, tiny, monkeypatch):
    monkeypatch.setattr(loaded, "bases", {})
    monkeypatch.setattr("bizassist_nb.notebook.panel.chat.bases", loaded.bases)
    driven.turn()
    assert driven.named("Unload ").layout.display == "none"
    driven.ask(QUESTIONS[0])
    base = weakref.ref(*loaded.bases.values())
    size = base().size
    assert size > 4 * 8192 * 64  # its embedding alone
    (unload,) = [each for each in driven.widgets() if str(getattr(each, "description", "")).startswith("Unload ")]
    assert unload.description == f"Unload {tiny.name}: {size / 1e9:.2g} GB"
    driven.press(unload.description)
    assert base() is None
    assert f"Freed {tiny.name}: {size / 1e9:.2g} GB." in driven.shown()
    assert unload.layout.display == "none"
    driven.ask(QUESTIONS[1])
    assert driven.panel.tabs[2].turns[-1].comparison.base


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
        turn = driven.panel.tabs[2].turns[-1]
        alike.append(turn.comparison.tuned == turn.comparison.base)
        driven.press("Clear")
    assert alike == [True, False]


def test_another_tuned_model_begins_a_new_conversation(driven):
    driven.ask(QUESTIONS[0])
    driven.fill("tuned model", ["two"])
    assert "A new conversation, since tuned is now two." in driven.shown()
    assert driven.panel.tabs[2].conversation.turns("base") == []


def test_a_conversation_that_was_cleared_comes_back(driven, tiny):
    undo = driven.named("Undo Clear")
    assert undo.layout.display == "none"
    driven.ask(QUESTIONS[0])
    chat = driven.panel.tabs[2]
    said = list(chat.conversation)
    driven.press("Clear")
    driven.press("Clear")  # nothing more is lost
    assert (chat.conversation, undo.layout.display) == ([], None)
    driven.fill("tuned model", ["two"])
    driven.press("Undo Clear")
    assert (chat.conversation, undo.layout.display) == (said, "none")
    assert (driven.named("tuned model").value, QUESTIONS[0] in html.unescape(driven.shown())) == (("one",), True)


def test_a_conversation_is_saved_and_goes_on_in_another_panel(driven, runs):
    driven.ask(QUESTIONS[0])
    driven.fill("saved as", "pricing-talk")
    driven.press("Save")
    place = runs[0].path.with_name("pricing-talk.json")
    assert f"Saved as {place}" in driven.shown()
    first = driven.panel.tabs[2].turns[0].comparison
    for text in (QUESTIONS[0], first.base, first.tuned):
        assert text in place.with_suffix(".md").read_text("utf-8")
    assert [run.name for run in list_runs(place.parent)] == ["one", "two"]
    another = Driven(place.parent)
    for name, value in {**DRAWN, "tuned model": ["two"], "saved as": "pricing-talk"}.items():
        another.fill(name.replace("_", " "), value)
    another.press("Load")
    assert another.named("tuned model").value == ("one",)
    assert [turn.comparison for turn in another.panel.tabs[2].turns] == [first]
    another.ask(QUESTIONS[1])
    driven.ask(QUESTIONS[1])
    answers = [panel.panel.tabs[2].turns[-1].comparison.answers for panel in (driven, another)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat", None, "is no saved conversation (FileNotFoundError"),
        ("chat", '[{"question": "Why?"}]', "is no saved conversation (ValidationError"),
        ("../chat", None, "cannot be the name of"),
        ("chat", '[{"question": "Why?", "answers": {"tuned": "So."}, "runs": ["gone"]}]', "run 'gone' that answered"),
    ],
)
def test_what_is_no_conversation_to_load_is_said(driven, runs, name, content, words):
    driven.ask(QUESTIONS[0])
    if content:
        runs[0].path.with_name("chat.json").write_text(content)
    driven.fill("saved as", name)
    driven.press("Load")
    assert words in html.unescape(driven.shown())
    assert len(driven.panel.tabs[2].turns) == 1  # what was there stays


def test_a_blind_question_is_in_no_saved_conversation(driven, runs):
    driven.fill("blind", True)
    driven.ask(QUESTIONS[0])
    driven.press("Save")
    assert (runs[0].path.with_name("chat.json").read_text(), runs[0].path.with_name("chat.md").read_text()) == (
        "[]",
        "",
    )


def test_the_chat_has_a_system_prompt_of_its_own_and_texts_that_end_an_answer(driven, runs):
    driven.ask(QUESTIONS[0])
    whole = driven.panel.tabs[2].turns[-1].comparison
    driven.press("Clear")
    stop = whole.base[10:14]
    driven.fill("stop at", f"never said\n{stop}")
    driven.ask(QUESTIONS[0])
    assert driven.panel.tabs[2].turns[-1].comparison.base == whole.base.partition(stop)[0].strip()
    driven.press("Clear")
    driven.fill("system prompt", "Be brief.")
    driven.fill("stop at", "")
    driven.ask(QUESTIONS[0])
    expected = Assistant(runs[0]).ask(QUESTIONS[0], **DRAWN, system="Be brief.")
    assert driven.panel.tabs[2].turns[-1].comparison == expected
    assert 'System prompt: "Be brief.".' in html.unescape(driven.shown())
    assert re.search(r"\d+ tokens, [\d.]+ a second; \d+ of the 2,048 tokens that the model reads", driven.shown())


def test_markdown_is_rendered_while_it_is_written():
    answers = {"base": "Take **ten** customers.\n\n```\nprice"}
    turn = Turn("Why?", comparison=Comparison("Why?", answers))
    page = turn.html("base", named=True)
    assert not turn.ended
    assert "<strong>ten</strong>" in page
    assert "<pre><code>price" in page


def test_a_blind_vote_is_written_and_then_reveals_who_is_who(driven, runs):
    driven.fill("blind", True)
    driven.fill("strength", 0.5)
    driven.ask(QUESTIONS[0])
    chat = driven.panel.tabs[2]
    assert chat.turns[-1].comparison.strength == 1  # as trained, and not part of what is being talked about
    assert chat.conversation.turns("base") == []
    assert "tuned (one)" not in driven.shown()
    driven.press("Left is better")
    (line,) = (runs[0].path / "votes.jsonl").read_text("utf-8").splitlines()
    vote = json.loads(line)
    assert vote["winner"] == vote["left"]
    assert "your vote" in driven.shown()
    assert "tuned (one)" in driven.shown()


@pytest.mark.slow
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


def test_an_export_outlives_its_kernel_and_the_next_panel_shows_it(driven, runs, ended):
    assert driven.named("Cancel").layout.display == "none"
    driven.fill("run", "one")
    driven.press("Export")

    def send(number: int) -> None:
        """Send a signal to the newest export."""
        os.kill(json.loads((driven.panel.state.exports / "export.json").read_text())["process"], number)

    send(signal.SIGSTOP)  # until another panel is there
    again = Driven(runs[0].path.parent)
    again.turn()
    assert (again.named("Cancel").layout.display, again.named("Export").disabled) == (None, True)
    assert "<b>one</b>" in again.shown()
    send(signal.SIGCONT)
    again.until(lambda: "✓" in again.shown())
    assert str(runs[0].path / "adapter") in again.shown()
    third = Driven(runs[0].path.parent)
    third.turn()
    assert "✓" not in third.shown()  # it is over
    again.fill("run", "two")
    again.press("Export")
    send(signal.SIGSTOP)  # until it is cancelled
    third.press("Export")
    assert "another kernel&#x27;s export of a run in this folder still runs" in third.shown()
    last = Driven(runs[0].path.parent)
    last.turn()
    last.press("Cancel")
    send(signal.SIGCONT)
    last.until(lambda: "the export was cancelled" in last.shown())
    assert not last.named("Export").disabled
    assert not (runs[1].path / "adapter" / "README.md").exists()


def test_what_an_export_takes_is_said_before_and_what_is_too_large_is_an_alert(driven, runs, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    driven.fill("run", "one")
    assert "It takes about 0.01 GB of disk" in driven.shown()
    journal = Journal(runs[0].path)
    journal.write(records.Parameters(trainable=10**8, total=2_100_000_000))
    for to, size in (("merged", "4.00"), ("gguf", "8.00")):
        driven.fill("export to", to)
        assert f"It takes about {size} GB of disk" in driven.shown()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 6, 3 * 10**9))
    driven.panel.state.looked = 0.0  # a look at the disk comes with the next look at the runs
    driven.turn()
    assert '<div class="bn-alert" role="alert">⚠ It takes about 8.00 GB of disk, of 3 GB free' in driven.shown()
    driven.fill("export to", "hub")
    assert "You are not logged in: set HF_TOKEN" in driven.shown()


def test_in_colab_a_click_downloads_what_was_exported(driven, runs, monkeypatch):
    sent = []
    monkeypatch.setitem(sys.modules, "google.colab.files", types.SimpleNamespace(download=sent.append))
    monkeypatch.setattr("bizassist_nb.notebook.panel.export.in_colab", lambda: True)
    driven.fill("run", "one")
    assert driven.named("Download").layout.display == "none"
    driven.press("Export")
    driven.until(lambda: driven.named("Download").layout.display is None)
    driven.press("Download")
    assert sent == [str(runs[0].path / "adapter.zip")]
    assert "adapter_model.safetensors" in zipfile.ZipFile(sent[0]).namelist()


@pytest.mark.parametrize(("to", "stays"), [("adapter", True), ("merged", False)])
def test_only_an_export_that_needs_a_model_makes_room_for_one(driven, runs, monkeypatch, to, stays):
    monkeypatch.setattr(loaded, "bases", {})
    loaded.loaded_base(runs[0].model)
    base = weakref.ref(*loaded.bases.values())
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")  # only there it lets go of bases
    driven.fill("export to", to)
    driven.press("Export")
    assert (base() is not None) is stays
    driven.press("Cancel")
    driven.until(lambda: not driven.named("Export").disabled)


def test_only_a_run_that_would_get_further_can_be_resumed(driven, runs):
    journal = Journal(runs[1].path)
    journal.write(records.State(state="failed"))
    resume = driven.named("Resume")
    for message, refused in (("the disk is full", False), ("the loss became nan at step 5", True)):
        journal.write(records.Error(message=message, expected=True))
        driven.turn()
        assert (resume.disabled, resume.description) == (refused, "Resume" if refused else "Resume two")
    assert "a lower learning_rate than auto" in resume.tooltip


@pytest.fixture
def shell():
    shell = InteractiveShell()
    load_ipython_extension(shell)
    return shell


def test_a_run_that_is_started_in_a_cell_has_the_memory_of_an_answer_under_way(runs, shell, monkeypatch):
    monkeypatch.setattr(loaded, "bases", {})
    driven = Driven(runs[0].path.parent)
    driven.fill("tuned model", ["one"])
    driven.fill("max new tokens", 1500)
    driven.fill("long question", QUESTIONS[0])
    driven.press("Send")
    turn = driven.panel.tabs[2].turns[-1]
    driven.until(lambda: turn.comparison and turn.comparison.tuned)
    base = weakref.ref(*loaded.bases.values())
    with pytest.raises(SettingsError):
        shell.find_cell_magic("finetune")("NAME", "rank = 0")
    assert base()  # nothing came of it, so the answer goes on
    monkeypatch.setattr(launch, "follow", lambda *_, **__: runs[0])
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")  # only there it lets go of bases
    shell.find_cell_magic("finetune")("NAME", "")
    assert base() is None
    assert (turn.ended, turn.remark) == (True, "stopped")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, torch.OutOfMemoryError])
@pytest.mark.parametrize("line", ["%%ask --run one --runs-dir", "Assistant(open_run('one', PLACE)).ask(QUESTION) #"])
def test_an_answer_that_fails_in_a_cell_keeps_no_base(runs, shell, monkeypatch, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(loaded, "bases", {})
    monkeypatch.setattr(decoding.ModuleSteps, "forward", fail)
    folder = runs[0].path.parent
    shell.user_ns |= {"Assistant": Assistant, "open_run": open_run, "PLACE": folder, "QUESTION": QUESTIONS[0]}
    result = shell.run_cell(f"{line} {folder}\n" + (QUESTIONS[0] if line.startswith("%%") else ""))
    assert not result.success
    base = weakref.ref(*loaded.bases.values())
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")
    loaded.unload()
    assert base() is None


@pytest.mark.slow
def test_chat_beside_a_run_that_needs_the_memory_is_refused_unless_asked_for(runs, shell, tiny, monkeypatch, request):
    asked = {"subset": 16, "held_out": 4, "epochs": 200, "engine": "transformers", "max_length": 160}
    run = start(Settings(model=str(tiny), data="sample", runs_dir=str(runs[0].path.parent), **asked), "live")
    request.addfinalizer(run.kill)
    driven = Driven(runs[0].path.parent)
    driven.until(lambda: run.steps)
    assert run.path in [each.path for each in running()]
    driven.fill("tuned model", ["one"])
    driven.fill("max new tokens", 2)
    monkeypatch.setattr(loaded, "bases", {})

    def check_room(*asked):  # as on a GPU
        with monkeypatch.context() as gpu:
            gpu.setattr(loaded.models, "device", lambda: "cuda:0")
            loaded.check_room(*asked)

    monkeypatch.setattr(assistant, "check_room", check_room)

    def plan(peak):
        planned = {"free": 14.5, "memory": "GPU memory", "parts": {"weights": 4.0, "activations": peak - 4}}
        Journal(run.path).write(records.Preflight(sentence="", peak=peak, **planned))

    plan(12.0)
    driven.ask(QUESTIONS[0])
    assert "is being trained and is expected to take 12.0 of 14.5 GiB of GPU memory" in driven.shown()
    assert loaded.bases == {}
    assert not driven.panel.tabs[2].turns[-1].comparison
    result = shell.run_cell(f"%%ask --run one --runs-dir {runs[0].path.parent}\n{QUESTIONS[0]}")
    assert "or chat all the same with --anyway" in str(result.error_in_exec)
    driven.fill("chat anyway", True)
    driven.ask(QUESTIONS[0])
    assert driven.panel.tabs[2].turns[-1].comparison
    monkeypatch.setattr(loaded, "bases", {})
    driven.fill("chat anyway", False)
    plan(9.0)  # there is room for both
    driven.ask(QUESTIONS[0])
    assert driven.panel.tabs[2].turns[-1].comparison


def test_a_base_that_could_not_be_loaded_leaves_nothing_behind(runs, shell, monkeypatch):
    halves, emptied = [], []

    def half(_source, **_):
        model = torch.nn.Linear(1, 1)
        halves.append(weakref.ref(model))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loaded, "bases", {})
    monkeypatch.setattr(loaded.models, "load_nf4", half)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**34))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    result = shell.run_cell(f"%%ask --run one --runs-dir {runs[0].path.parent}\n{QUESTIONS[0]}")
    assert isinstance(result.error_in_exec, ModelError)
    monkeypatch.setattr(loaded.models, "device", lambda: "cuda:0")
    loaded.unload()
    assert [each() for each in halves] == [None]
    assert emptied == [True]


def test_a_base_that_a_run_would_have_go_counts_as_free(runs, monkeypatch):
    monkeypatch.setattr(loaded, "bases", {})
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


def test_other_columns_are_counted_anew(tiny, rows_file):
    rows = [{"q": f"Why {i}?", "short": "Yes.", "long": "Because of this and of that. " * 20} for i in range(40)]
    asked = {"model": str(tiny), "data": str(rows_file(rows)), "subset": 20, "held_out": 4}
    *_, short = forecast(Settings(**asked, columns={"instruction": "q", "response": "short"}))
    *_, long = forecast(Settings(**asked, columns={"instruction": "q", "response": "long"}))
    assert long.epoch_tokens > short.epoch_tokens + 20 * 60


class Worker:
    """What a run's views see of a worker: a process that holds the run's lock; it heeds a stop only if told to."""

    def __init__(self, run, *, heeds=False):
        lock = take_lock(run.path)
        Journal(run.path).write(records.State(state="training"))
        command = ["sleep", "600"] if heeds else ["bash", "-c", "trap '' TERM; sleep 600"]
        self.process = subprocess.Popen(command, pass_fds=(lock,), start_new_session=True)
        write_worker(lock, self.process.pid)
        os.close(lock)
        time.sleep(0.3)  # until bash has set its trap

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()


@pytest.fixture
def working(runs):
    """Give a run a worker."""
    workers = []

    def begin(number, **options):
        workers.append(Worker(runs[number], **options))
        return workers[-1].process

    yield begin
    for worker in workers:
        worker.end()


def test_two_clicks_on_stop_in_a_hurry_are_one(runs, working):
    worker = working(1)
    driven = Driven(runs[0].path.parent)
    stop = driven.named("Stop two")
    stop.click()
    stop.click()
    driven.turn()
    assert stop.description == "Stop two at once"
    assert "asked again, it ends at once" in driven.shown()
    stop.click()
    assert (worker.poll(), runs[1].killed) == (None, False)
    time.sleep(1)  # for so long "stopping" has to be shown before a second click counts
    stop.click()
    assert worker.wait(10) == -signal.SIGKILL
    assert runs[1].killed
    driven.turn()
    assert (stop.description, stop.disabled) == ("Stop", True)


def test_a_panel_shows_that_another_has_stopped_the_run(runs, working):
    working(1)
    runs[1].stop()
    assert Driven(runs[0].path.parent).named("Stop two at once")


def test_stop_and_resume_are_of_the_run_that_is_shown(runs, working):
    shown, other = working(0, heeds=True), working(1, heeds=True)
    driven = Driven(runs[0].path.parent)
    choice = driven.named("run", 0)
    choice.value = "one"
    driven.turn()
    driven.press("Stop one")
    assert shown.wait(10) == -signal.SIGTERM
    assert other.poll() is None
    driven.turn()
    assert "one: " in driven.shown()
    assert driven.named("Resume").disabled
    other.kill()
    other.wait()
    driven.turn()
    assert not driven.named("Resume one").disabled


def test_two_clicks_on_start_begin_one_run(runs, tiny, ended):
    driven = Driven(runs[0].path.parent)
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("data", "sample"), ("held out", 4)):
        driven.fill(name, value)
    driven.fill("rows to train on, as a number", 12)
    driven.fill("epochs", 100)
    driven.fill("engine", "transformers")
    start = driven.named("Start")
    start.click()
    start.click()
    driven.turn()
    assert [run.name for run in list_runs(runs[0].path.parent)] == ["one", "two", "sample-1"]
    assert "is being trained, and both" not in driven.shown()  # which is no error of that person's
    list_runs(runs[0].path.parent)[-1].kill()


def table(driven):
    """The names in the table of runs, in its order."""
    return re.findall(r"<tr><td[^>]*>([^<]*)</td>", driven.panel.tabs[3].table.value)


def test_runs_are_ordered_and_filtered(driven, runs):
    assert table(driven) == ["two", "one"]
    driven.fill("order", "by name")
    assert table(driven) == ["one", "two"]
    driven.fill("chosen run", "one")
    driven.fill("note", "the first <try>")
    driven.press("Apply")
    driven.fill("filter", "finished FIRST")
    assert table(driven) == ["one"]
    assert "the first &lt;try&gt;" in driven.panel.tabs[3].table.value
    assert runs[0].note == "the first <try>"
    driven.fill("filter", "nothing like it")
    assert "No run has all these words" in driven.panel.tabs[3].table.value


def test_a_run_is_renamed_with_its_card_and_stays_the_one_that_is_shown(driven, runs):
    write_card(runs[1])
    driven.fill("chosen run", "two")
    driven.fill("new name", "pricing")
    driven.press("Apply")
    driven.turn()
    assert table(driven) == ["pricing", "one"]
    assert driven.panel.state.followed.name == driven.named("chosen run").value == "pricing"
    path = runs[0].path.with_name("pricing")
    assert "# pricing" in (path / "README.md").read_text()
    driven.fill("tuned model", ["pricing"])
    driven.ask(QUESTIONS[0])
    assert driven.panel.tabs[2].turns[-1].comparison.tuned
    for name, why in (("one", "is there already"), ("../up", "cannot be the name of a run")):
        driven.fill("new name", name)
        driven.press("Apply")
        assert why in driven.shown()
        assert path.is_dir()


def test_a_deleted_run_can_be_brought_back_and_one_in_training_is_neither_moved_nor_renamed(driven, runs, working):
    driven.fill("chosen run", "two")
    driven.press("Delete")
    driven.turn()
    assert table(driven) == ["one"]
    assert [path.name[:4] for path in (runs[0].path.parent / ".bin").iterdir()] == ["two-"]
    driven.press("Undo")
    driven.turn()
    assert table(driven) == ["two", "one"]
    assert driven.named("Undo").layout.display == "none"
    working(1)
    driven.fill("chosen run", "two")
    driven.fill("new name", "pricing")
    for button in ("Apply", "Delete"):
        driven.press(button)
        assert "is being trained by another process" in driven.shown()
    assert runs[1].path.is_dir()


@pytest.mark.parametrize("button", ["Start", "Resume", "Export"])
def test_nothing_that_needs_the_gpu_begins_beside_a_run_of_another_kernel(runs, working, button):
    Journal(runs[1].path).write(records.State(state="stopped"))
    driven = Driven(runs[0].path.parent)
    driven.fill("export to", "merged")
    press = driven.named("Resume two" if button == "Resume" else button)
    working(0)  # the panel has not looked since
    press.click()
    driven.turn()
    assert "&#x27;one&#x27; is being trained, and both would need the same GPU&#x27;s memory" in driven.shown()
    assert (runs[1].status, len(list_runs(runs[0].path.parent))) == ("stopped", 2)
    assert not (runs[1].path / "merged").exists()


def test_a_cell_starts_no_second_run_beside_one_in_training(runs, working, shell):
    working(0)
    for line in ("fresh", "fresh --background", "two --resume"):
        with pytest.raises(RunError, match="'one' is being trained"):
            shell.find_cell_magic("finetune")(line, f'runs_dir = "{runs[0].path.parent}"')
    assert len(list_runs(runs[0].path.parent)) == 2


def test_a_tab_that_cannot_be_brought_up_to_date_stops_no_other(driven, monkeypatch):
    def broken(_, _run):
        raise ValueError("no facts <here>")

    monkeypatch.setattr(views.RunView, "show", broken)  # of the Train tab, which comes first
    driven.fill("export to", "merged")
    assert "ValueError: no facts &lt;here&gt;" in driven.shown()
    assert driven.named("merge into").layout.display is None  # on the Export tab, which comes last
    monkeypatch.undo()
    driven.turn()
    assert "no facts" not in driven.shown()


def test_in_a_first_training_the_base_that_is_trained_answers(runs, tiny, driven, shell):
    for run in runs:
        shutil.rmtree(run.path / "adapter")
    driven.press("Refresh")
    driven.ask(QUESTIONS[0])  # and not what "auto" stands for
    assert driven.panel.tabs[2].turns[-1].comparison.model == str(tiny)
    assert f"<h4>base ({tiny.name})</h4>" in driven.shown()


def test_without_a_run_the_base_of_the_form_answers_with_its_system_prompt(tiny, tmp_path):
    driven = Driven(tmp_path)
    for name, value in DRAWN.items():
        driven.fill(name.replace("_", " "), value)
    driven.fill("model", "other …")
    driven.fill("model: which", str(tiny))
    base = Settings(model=str(tiny))
    answers = []
    for prompt in (base.system_prompt, "Short answers only."):
        driven.named("system prompt", 0).value = prompt  # of the Train tab
        driven.ask(QUESTIONS[0])
        answers.append(driven.panel.tabs[2].turns[-1].comparison)
        assert answers[-1] == Assistant(base=dataclasses.replace(base, system_prompt=prompt)).ask(
            QUESTIONS[0], who=("base",), **DRAWN
        )
        driven.press("Clear")
    assert answers[0].base != answers[1].base
    driven.named("system prompt", 0).value = "x\0"
    driven.fill("long question", QUESTIONS[0])
    driven.press("Send")
    assert "which base answers?" in driven.shown()


def test_a_cell_asks_the_base_of_the_newest_run_where_none_is_tuned(runs, tiny, shell):
    for run in runs:
        shutil.rmtree(run.path / "adapter")
    found = shell.run_line_magic("ask", f"--runs-dir {runs[0].path.parent} --max-new-tokens 4 Why?")
    assert (list(found.answers), found.model) == (["base"], str(tiny))
    assert "There is no tuned model yet" in found.note


def test_a_cell_goes_on_with_the_conversation_of_the_last(runs, shell):
    drawn = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in DRAWN.items())
    where = f"--runs-dir {runs[0].path.parent} {drawn}"
    ask = functools.partial(shell.run_cell_magic, "ask")
    with pytest.raises(UsageError, match="no conversation in this kernel yet"):
        ask("--continue", "Why?")
    ask(f"{where} --run one --system 'Be brief.'", QUESTIONS[0])
    found = ask(f"--continue {drawn}", QUESTIONS[1])  # the runs, too, are the last ones
    talk, options = Conversation(), {**DRAWN, "system": "Be brief."}
    expected = [Assistant(runs[0]).ask(question, conversation=talk, **options) for question in QUESTIONS]
    assert found == expected[1]
    assert found.answers != Assistant(runs[0]).ask(QUESTIONS[1], **options).answers
    ask(f"{where} --run two --tuned", QUESTIONS[0])  # a conversation of its own
    last = ask(f"--continue {drawn}", QUESTIONS[1])
    assert (last.runs, list(last.answers)) == (("two",), ["tuned"])
    ask(f"{where} --run one --each", "\n".join(QUESTIONS))
    with pytest.raises(UsageError, match="no conversation in this kernel yet"):
        ask("--continue", "Why?")


@pytest.mark.parametrize(
    "line",
    ["--blind --continue", "--blind --system x", "--each --continue", "--continue --run two", "--base --continue"],
)
def test_options_that_do_not_go_together_are_refused(line, shell):
    with pytest.raises(UsageError, match=r"--\w+: .*leave out .*--(system|each)"):
        shell.run_cell_magic("ask", line, "Why?")


def widgets_alive():
    return len(getattr(ipywidgets.widgets.widget, "_instances", None) or ipywidgets.Widget.widgets)  # 8; 7


def test_there_is_one_panel_a_folder_and_nothing_is_left_of_one_that_is_closed(runs):
    folder = str(runs[0].path.parent)

    async def shown():
        before = widgets_alive(), len(asyncio.all_tasks())
        panel = Panel.of(folder)
        panel.show()
        one = widgets_alive(), len(asyncio.all_tasks())
        assert Panel.of(folder) is panel
        for _ in range(3):
            panel = Panel(folder)
            panel.show()
            await asyncio.sleep(0)
        assert (widgets_alive(), len(asyncio.all_tasks())) == one
        panel.close()
        await asyncio.sleep(0)
        assert (widgets_alive(), len(asyncio.all_tasks())) == before
        with pytest.raises(BizassistError, match="this panel is closed"):
            panel.show()

    asyncio.run(shown())


def calls(act):
    """How many functions of Python are called in it."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def test_an_idle_panel_does_little_and_answers_at_once(tmp_path, monkeypatch):
    for number in range(200):
        path = tmp_path / f"run-{number}"
        path.mkdir()
        (path / "settings.toml").write_text(Settings(data="sample", model="smollm2-135m").to_toml())
        (path / "worker.lock").touch()
        Journal(path).write(records.State(state="finished"))
    driven = Driven(tmp_path)
    driven.fill("data", "sample")
    driven.fill("rows to train on, as a number", 4)
    driven.until(lambda: not driven.panel.state.following)
    driven.panel.state.looked = 0.0
    most = 1_000 if sys.version_info < (3, 12) else 1_300  # pathlib makes more calls from 3.12 on
    assert calls(driven.turn) < 200 * most  # the runs are listed: for each there are some files to read
    driven.panel.state.looked = time.monotonic() + 3600  # they are not listed again
    driven.turn()
    assert calls(driven.turn) < 4_000  # only the run that is shown is looked at

    waits, wait_for = [], asyncio.wait_for

    def wait(woken, seconds):
        waits.append(seconds)
        return wait_for(woken, 3600)  # nothing but what a person does ends it

    async def until(condition):
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.01)

    async def idle():
        driven.panel.update_loop.start()
        await until(lambda: waits)
        assert waits == [2.0]  # seconds between turns
        driven.named("batch size").value = 0
        await until(lambda: "batch_size = 0" in driven.shown())
        driven.named("export to").value = "hub"
        driven.named("Refresh").click()
        await until(lambda: driven.named("repository").layout.display is None)

    monkeypatch.setattr(asyncio, "wait_for", wait)
    asyncio.run(idle())


def test_columns_are_named_as_the_error_says(tiny, rows_file, tmp_path):
    driven = Driven(tmp_path)
    data = rows_file([{"q": f"Why {i}?", "a": "So."} for i in range(40)])
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("data", "other …")):
        driven.fill(name, value)
    driven.fill("data: which", str(data))
    driven.until(lambda: "has no instruction column" in driven.shown())
    assert driven.named("Start").disabled
    assert "has no instruction column" in driven.named("Start").tooltip
    driven.named("data: which").value = str(tmp_path / "next.jsonl")
    driven.turn()
    assert "has no instruction column" not in driven.shown()  # not of a file that is no longer named
    driven.fill("data: which", str(data))
    for written in (
        'instruction = "q", response = "a"',
        '{ instruction = "q", response = "a" }',
        'columns = { instruction = "q", response = "a" }',
    ):
        driven.fill("columns", written)
        assert driven.panel.state.settings.columns == {"instruction": "q", "response": "a"}
    driven.fill("rows to train on, as a number", 1000)
    driven.fill("held out", 64)
    driven.until(lambda: "set held_out to 8 and subset to at most 32" in driven.shown())
    driven.fill("rows to train on, as a number", 30)
    driven.fill("held out", 10)
    driven.until(lambda: "GiB free" in driven.shown())
    assert not driven.named("Start").disabled
    driven.fill("columns", "instruction = q")
    assert "{ instruction = &quot;question&quot; }" in driven.shown()


def test_an_uploaded_file_is_what_is_trained_on(tiny, rows_file, tmp_path):
    def upload(content):
        file = {"name": "../sales.jsonl", "type": "", "size": len(content), "content": memoryview(content)}
        driven.named("Upload").value = ({**file, "last_modified": datetime.datetime(2026, 11, 27)},)
        driven.turn()

    driven = Driven(tmp_path / "work" / "runs")
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("held out", 4)):
        driven.fill(name, value)
    driven.fill("rows to train on, as a number", 8)
    rows = rows_file([{"instruction": f"What sold in week {i}?", "response": "Bread."} for i in range(40)]).read_bytes()
    upload(rows)
    path = tmp_path / "work" / "uploads" / "sales.jsonl"
    assert path.read_bytes() == rows
    assert driven.named("Upload").value == ()  # the kernel keeps no copy
    driven.until(lambda: "What sold in week" in driven.shown())
    assert driven.panel.state.settings.data == str(path)
    upload(rows.replace(b"Bread", b"Cakes"))
    assert "is there already, with other rows; rename your file" in driven.shown()
    assert path.read_bytes() == rows


def test_a_file_that_has_come_meanwhile_is_read_by_refresh(tiny, rows_file, tmp_path):
    driven = Driven(tmp_path / "runs")
    path = tmp_path / "late.jsonl"
    for name, value in (("model", "other …"), ("model: which", str(tiny)), ("data", "other …"), ("held out", 4)):
        driven.fill(name, value)
    driven.fill("rows to train on, as a number", 8)
    driven.fill("data: which", str(path))
    driven.until(lambda: "there is no file" in driven.shown())
    rows_file([{"instruction": f"Why {i}?", "response": "So."} for i in range(40)], "late.jsonl")
    driven.press("Refresh")
    driven.until(lambda: "GiB free" in driven.shown())
    assert not driven.named("Start").disabled


def test_what_the_panels_threads_log_of_the_hub_is_not_printed_into_a_cell():
    """huggingface_hub's own line for a retry; of a cell's download it is still shown."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    printed = []
    handler = logging.Handler()
    handler.emit = lambda record: printed.append(record.threadName)
    logger.addHandler(handler)
    try:
        for name in ("bizassist-forecast", "bizassist-load", "MainThread"):
            thread = threading.Thread(target=logger.warning, args=["Retrying in 1s [Retry 1/5]."], name=name)
            thread.start()
            thread.join()
    finally:
        logger.removeHandler(handler)
    assert printed == ["MainThread"]


def test_what_is_chosen_while_colabs_loop_is_about_to_end_is_shown(runs, monkeypatch):
    """In Colab the front end's messages are served within the loop; here a person chooses in its last round."""
    driven = Driven(runs[0].path.parent)
    driven.until(lambda: not (driven.panel.state.following or driven.panel.state.working))
    rounds = []

    def serve(_):
        rounds.append(None)
        if len(rounds) == 1:
            driven.named("model").value = "other …"

    monkeypatch.setitem(sys.modules, "google.colab", None)
    monkeypatch.setattr("jupyter_ui_poll.ui_events", lambda: contextlib.nullcontext(serve))
    monkeypatch.setattr("bizassist_nb.notebook.panel.update_loop.get_ipython", InteractiveShell.instance)
    driven.panel.update_loop.wake()
    assert driven.named("model: which").layout.display is None
    assert len(rounds) > 1
