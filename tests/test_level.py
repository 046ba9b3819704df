"""What the kernel holds stays level: over 200 updates of the views of a training, and over 200 questions each way."""

import json

import pytest
from live_kernel import kernel
from random_run import random_run

pytestmark = pytest.mark.slow

SETUP = """
import asyncio, gc, json, threading, warnings
import ipywidgets, matplotlib.figure, psutil
from pathlib import Path
from bizassist_nb import Panel, open_run
from bizassist_nb.notebook import views
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import take_lock, Journal
%load_ext bizassist_nb
run = open_run("one")
journal = Journal(run.path)
ask = get_ipython().run_cell_magic

def level():
    gc.collect()
    process, objects = psutil.Process(), gc.get_objects()
    return {
        "MiB": process.memory_info().rss / 2**20,
        "files": process.num_fds(),
        "threads": threading.active_count(),
        "widgets": len(ipywidgets.widgets.widget._instances) if hasattr(ipywidgets.widgets.widget, "_instances")
            else len(ipywidgets.Widget.widgets),
        "figures": sum(isinstance(each, matplotlib.figure.Figure) for each in objects),
        "objects": len(objects),
    }

def measured(act, count=200, warm=50):
    found = []
    for i in range(count):
        act(i)
        if i + 1 in (warm, count):
            found.append(level())
    return found

def step(i):
    journal.write(records.Step(step=i + 1, loss=2.0, learning_rate=1e-4, gradient_norm=1.0, tokens=100, seconds=1.0))
"""

TRAINING = """
journal.write(records.Plan(steps=1000))
journal.write(records.State(state="training"))
lock = take_lock(run.path)
view = views.TrainingView()
views.PLOT_EVERY = 0.0
def update(i):
    step(i)
    view(run)
found["cell"] = measured(update)
view.finish()
"""

PANEL = """
panel = Panel()
panel.show()
panel.update_loop.task.cancel()  # turned here instead, so that no turn is missed
controls = panel.tabs[0].settings.controls
for name, value in (("model", run.settings.model), ("data", "sample"), ("subset", 24)):
    controls[name].put(value)
state, checked = panel.state, lambda: panel.state.watch.found and panel.state.watch.found.findings is not None
while state.unsettled or not checked():  # the rows are counted and checked once, on a thread
    panel.update_loop.turn()
    assert not (any(panel.update_loop.problems) or state.watch.problem)
def turn(i):
    step(200 + i)
    panel.state.looked = 0.0
    panel.update_loop.turn()
found["panel"] = measured(turn)
journal.write(records.State(state="finished"))
import os
os.close(lock)
"""

ASK = """
def question(i):
    ask("ask", "--run one --max-new-tokens 2 -o answer", f"Question {i}?")
found["questions by magic"] = measured(question)
"""

CHAT = """
chat = panel.tabs[2]
def question(i):
    if i % 10 == 0:
        chat.forget()
    panel.update_loop.post(lambda: chat.ask(f"Question {i}?"))
    panel.update_loop.turn()
    while chat.answering:
        panel.update_loop.turn()
    assert chat.turns[-1].ended, panel.update_loop.problems
chat.options["max_new_tokens"].value = 2
found["questions in the panel"] = measured(question)
"""


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("level")
    random_run(folder / "runs" / "one", tiny, model=str(tiny))
    with kernel(folder) as live:
        live.run("found = {}")
        for code in (SETUP, TRAINING, PANEL, ASK, CHAT):
            cell = live.run(code)
            assert cell.status == "ok", cell.text
        return json.loads(live.run("print(json.dumps(found))").text)


@pytest.mark.parametrize("what", ["cell", "panel", "questions by magic", "questions in the panel"])
def test_what_the_kernel_holds_stays_level(found, what):
    warm, end = found[what]
    print(f"{what}: after 50 {warm}, after 200 {end}")  # for docs/benchmarks.md
    for each in ("files", "threads", "widgets", "figures"):
        assert end[each] <= warm[each], each
    assert end["MiB"] - warm["MiB"] < 5
    assert end["objects"] - warm["objects"] < 150 * 10  # a step's event and its like are kept, and are few
