"""A person at the panel, in real front ends: settings, training, chat, and coming back to it."""

import json
import re

import nbformat
import pytest
from front_ends import COLAB_PYTHON, OLDER_KERNEL
from nbconvert import HTMLExporter
from random_run import random_run

from bizassist_nb.api import Run

PANEL = ["%load_ext bizassist_nb", "%bizassist"]
COLAB = ["import google.colab\n%load_ext bizassist_nb", "%bizassist"]


def fill_in(book, tiny, name, epochs=100):
    """Settings of a run with the tiny model that lasts as long as it is wanted."""
    book.fill("name of the run", name)
    book.choose("model", "other …")
    book.fill("model: which", tiny)
    book.choose("data", "sample")
    book.fill("rows to train on, as a number", 12)
    book.unfold("More settings")
    book.fill("held out", 4)
    book.fill("epochs", epochs)
    book.choose("engine", "transformers")
    book.fill("max length", 512)
    book.see("GiB free")


def plots(book, count, timeout=60):
    """Wait until so many different loss plots have been seen; what they said of the newest step."""
    seen = []
    for _ in range(timeout * 5):
        shown = book.panel.locator("svg[role=img]")
        label = shown.first.get_attribute("aria-label") if shown.count() else ""
        if "training loss" in label and label not in seen:
            seen.append(label)
        if len(seen) >= count:
            return [
                int(re.search(r"(\d+)(?:;|$)", label.partition(" at step ")[2].partition(" at ")[2]).group(1))
                for label in seen
            ]
        book.page.wait_for_timeout(200)
    raise AssertionError(f"only {len(seen)} plots: {seen}")


def test_a_person_trains_stops_resumes_chats_and_comes_back(lab, opened, tiny):
    book = opened(lab, [*PANEL, "%bizassist"])
    book.show()
    book.see("No run yet")
    fill_in(book, tiny, "first")
    book.press("Start")
    steps = plots(book, 3)
    assert steps == sorted(set(steps))
    book.unfold("More settings")
    book.press("Stop first")
    book.see("first: stopped")
    run = Run(lab.root / "runs" / "first")
    assert run.settings.subset == 12
    assert run.status == "stopped"
    assert run.adapter
    done = len(run.steps)
    book.press("Resume first")
    assert plots(book, 1)[0] >= done

    book.tab("Chat")  # while it trains
    answer_at_length(book)
    box = book.panel.get_by_label("question", exact=True)
    box.type("How should we **price** it?")
    box.press("Enter")
    growing(book)
    book.press("Stop generating")
    book.see("stopped")
    book.press("Clear")
    book.see("take one of those suggested")

    book.tab("Train")
    book.press("Stop first")
    book.see("first: stopped")
    votes_compares_and_exports(book, run)
    book.tab("Train")
    book.run(2)  # a second view of the same panel
    assert book.page.locator(".bizassist").count() == 2
    book.see("first: stopped")
    book.save()
    book.reload()
    book.see("first: stopped")
    assert book.panel.get_by_label("rows to train on, as a number").first.input_value() == "12"
    assert book.errors == []


def votes_compares_and_exports(book, run):
    """A blind vote, then the tabs for runs and exports."""
    book.tab("Chat")
    book.panel.get_by_label("blind").check()
    book.fill("max new tokens", 20)
    book.press("How should we price a new feature?")
    book.see("right")
    book.press("Left is better")
    book.see("your vote")
    vote = json.loads((run.path / "votes.jsonl").read_text("utf-8"))
    assert vote["question"] == "How should we price a new feature?"
    assert vote["winner"] == vote["left"]
    book.tab("Runs")
    book.press("Compare")
    book.see("Runs compared")
    book.tab("Export")
    book.press("Export")
    book.see(f"{run.path.name}/adapter")
    assert (run.adapter / "README.md").is_file()


def answer_at_length(book):
    """Have answers last until they are stopped: the tiny model has no end to its own."""
    book.unfold("Generation settings")
    book.fill("max new tokens", 1900)


def growing(book):
    """Wait until the answers in both panes have been seen to grow at the same time."""
    panes = book.panel.locator(".bn-pane")
    before = [len(panes.nth(i).locator(".bn-answer").last.inner_text()) for i in (0, 1)]
    for _ in range(300):
        now = [len(panes.nth(i).locator(".bn-answer").last.inner_text()) for i in (0, 1)]
        if all(a < b for a, b in zip(before, now, strict=True)):
            return
        book.page.wait_for_timeout(100)
    raise AssertionError(f"answers did not grow: {before} {now}")


def train_and_stop(book, tiny, name):
    """Start, see the plot move, stop; the run."""
    fill_in(book, tiny, name)
    book.press("Start")
    plots(book, 3)
    book.press(f"Stop {name}")
    book.see(f"{name}: stopped")
    run = Run(book.server.root / "runs" / name)
    assert run.status == "stopped"
    assert run.adapter
    return run


def chat_and_stop(book):
    """Ask both by Enter, see both grow, stop."""
    book.tab("Chat")
    answer_at_length(book)
    box = book.panel.get_by_label("question", exact=True)
    box.type("How should we price it?")
    box.press("Enter")
    growing(book)
    book.press("Stop generating")
    book.see("stopped")


@pytest.mark.slow
def test_notebook_7(serve, opened, tiny):
    server = serve("notebook")
    book = opened(server, PANEL)
    book.show()
    fill_in(book, tiny, "second", epochs=8)
    book.press("Start")
    plots(book, 3)
    book.see("second: finished", timeout=120)
    book.see("Did it help?")
    chat_and_stop(book)
    book.save()
    book.reload()
    book.tab("Train")
    book.see("second: finished")


@pytest.mark.slow
def test_ipykernel_whose_callbacks_run_on_another_thread(serve, opened, tiny):
    assert OLDER_KERNEL.is_dir(), f"run: pip install --no-deps --target {OLDER_KERNEL} ipykernel==7.3.0"
    server = serve("lab")
    book = opened(server, [*PANEL, "import ipykernel; ipykernel.__version__"], kernel=server.older_kernel())
    book.show()
    book.run(2)
    assert "7.3.0" in book.page.locator(".jp-OutputArea-output").last.inner_text()
    train_and_stop(book, tiny, "third")
    chat_and_stop(book)
    assert book.errors == []


@pytest.mark.slow
@pytest.mark.parametrize("colab", [False, True], ids=["classic", "colab"])
def test_notebook_6_and_colabs_versions(serve, opened, tiny, tmp_path, colab):
    if colab:  # all of Colab that the panel looks for
        (tmp_path / "google" / "colab").mkdir(parents=True)
        (tmp_path / "google" / "colab" / "__init__.py").touch()
    server = serve("classic", python=COLAB_PYTHON)
    book = opened(server, [*(COLAB if colab else PANEL), "1 + 1"])
    book.show()
    train_and_stop(book, tiny, "fourth")
    chat_and_stop(book)
    book.run(2)  # other cells run again once nothing is followed
    assert "2" in book.page.locator(".output_text").last.inner_text()
    assert book.errors == []


@pytest.mark.slow
def test_a_crash_is_shown_and_the_panel_goes_on(lab, opened, tiny, tmp_path):
    """A worker that dies at once; then wrong settings; then a run while another cell is busy; then a new kernel."""
    (tmp_path / "trl.py").write_text('import os\nprint("trl went up in smoke", flush=True)\nos._exit(3)\n')
    cells = [
        f"import os; old = os.environ.get('PYTHONPATH', ''); os.environ['PYTHONPATH'] = {str(tmp_path)!r} + ':' + old",
        "os.environ['PYTHONPATH'] = old",
        "import time; time.sleep(6)",
    ]
    book = opened(lab, [*PANEL, *cells], name="crash.ipynb")
    book.show()
    book.run(2)
    fill_in(book, tiny, "dead")
    book.press("Start")
    book.see("ended without a word")
    book.see("trl went up in smoke")
    book.run(3)

    start = book.panel.locator("button", has_text="Start")
    book.fill("batch size", 0)
    book.see("batch_size = 0: has to be a whole number from 1")
    assert start.is_disabled()
    book.fill("batch size", 4)
    book.fill("name of the run", "../up")
    book.see("cannot be the name of a run")
    assert start.is_disabled()
    book.fill("name of the run", "long")
    book.unfold("Copy as cell")
    cell = book.panel.get_by_label("as a cell")
    book.page.wait_for_function("box => box.value.startsWith('%%finetune long')", arg=cell.element_handle())
    assert "epochs = 100" in cell.input_value()

    book.press("Start")
    before = plots(book, 1)[0]
    book.run(4)  # six seconds in which the kernel shows nothing
    assert plots(book, 2)[-1] > before
    book.save()
    book.restart()
    book.show()
    book.see("long: training")
    assert plots(book, 2)[-1] > before
    book.press("Stop long")
    book.see("long: stopped")
    book.unfold("From run")
    book.choose("settings of run", "long")
    book.press("Load")
    box = book.panel.get_by_label("epochs")
    book.unfold("More settings")
    book.page.wait_for_function("box => box.value === '100'", arg=box.element_handle())

    below(book, "long: stopped")
    page = without_a_kernel(book)
    assert "data:image/png;base64" in page
    assert "long: stopped" in page


# A black dot, as a user's own picture.
OWN = """
import base64
from IPython.display import Image, display
panel = %bizassist
display(panel)
display(Image(base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")))
"""


def below(book, text, count=1):
    """Wait until so many of the outputs below live views, which are seen without a kernel, say that."""
    outputs = book.page.locator("[class$='-static']").filter(has_text=text)
    outputs.nth(count - 1).wait_for(state="attached")


def without_a_kernel(book):
    """The saved notebook, as one sees it without a kernel."""
    book.save()
    book.page.wait_for_timeout(500)
    page, _ = HTMLExporter().from_notebook_node(nbformat.read(book.server.root / book.name, as_version=4))
    return page


@pytest.mark.slow
def test_a_kernel_that_ends_leaves_the_last_plot_and_figures(lab, opened, tiny):
    train = f"%%finetune leaving\nmodel = '{tiny}'\ndata = 'sample'\nsubset = 12\nheld_out = 4\nepochs = 100"
    go_on = "%%finetune leaving --resume --background\n"
    book = opened(lab, [PANEL[0], train, OWN, go_on], name="leaving.ipynb")
    shown = book.page.get_by_text("leaving: training").locator("visible=true")
    pictures = book.page.locator(".jp-RenderedImage").locator("visible=true")
    controls = book.page.locator(".jp-OutputArea .jupyter-widgets").locator("visible=true")
    book.run(0)
    book.run(1, wait=False)
    book.page.locator(".bn-tiles").get_by_text("step").first.wait_for()  # in the live view
    book.page.get_by_text("what it trains on").click()
    drawn = "document.querySelector('svg[role=img]')?.outerHTML"
    book.page.wait_for_function(f"before => {drawn} !== before", arg=book.page.evaluate(drawn))
    assert book.page.locator("details[open]").count() == 1  # what was unfolded stays so while it trains
    below(book, "leaving: training")
    assert (shown.count(), pictures.count()) == (1, 0)
    page = without_a_kernel(book)
    assert 'src="data:image/png;base64' in page
    assert "leaving: training" in page
    book.restart()
    book.page.get_by_text("As of").locator("visible=true").wait_for()
    assert (shown.count(), pictures.count(), controls.count()) == (1, 1, 1)  # the one control is a sentence

    book.run(0)  # Jupyter interrupts a cell before it ends its kernel, so the run was stopped
    book.run(3)
    book.run(2)
    book.see("leaving: training")
    below(book, "leaving: training", 2)
    assert pictures.count() == 2  # what the first cell kept, and the user's own beside the panel
    assert without_a_kernel(book).count("leaving: training") >= 2
    book.restart()
    book.page.get_by_text("As of").locator("visible=true").nth(1).wait_for()
    assert pictures.count() == 3
    sentence = "e => getComputedStyle(e, '::before').content"
    assert "run %bizassist to bring it back" in book.panel.evaluate(sentence)
    assert controls.count() == 2  # the two sentences, and none of the panel's controls with their icons


def go_to(book, name, key="Tab"):
    """Press Tab, or Shift+Tab, until what is labelled so has the focus."""
    focused = "() => { const e = document.activeElement; return e.labels?.[0]?.textContent || e.textContent }"
    for _ in range(80):
        book.page.keyboard.press(key)
        if book.page.evaluate(focused).strip() == name:
            return
    raise AssertionError(f"{key} does not reach {name}")


@pytest.mark.slow
def test_keys_alone_train_and_export(serve, opened, tiny, tmp_path):
    book = opened(serve("lab"), PANEL)
    book.show()
    keys = book.page.keyboard
    book.panel.locator("button").first.focus()
    go_to(book, "model")
    keys.press("End")  # other …
    book.see("write a hub id")
    go_to(book, "model: which")
    keys.type(str(tiny))
    go_to(book, "rows to train on, as a number")
    keys.press("ControlOrMeta+a")
    keys.type("12")
    go_to(book, "More settings")
    keys.press("Enter")
    go_to(book, "held out")
    keys.press("ControlOrMeta+a")
    keys.type("4")
    keys.press("Tab")
    book.see("GiB free")
    go_to(book, "Start")
    keys.press("Enter")
    book.see("sample-1: finished", timeout=120)
    go_to(book, "Train", "Shift+Tab")
    for _ in range(4):
        keys.press("ArrowRight")
    keys.press("Enter")
    go_to(book, "Export")
    keys.press("Enter")
    book.see("sample-1/adapter")
    assert (tmp_path / "runs" / "sample-1" / "adapter" / "README.md").is_file()
    assert book.errors == []


@pytest.mark.slow
def test_keys_alone_reach_everything(lab, opened):
    book = opened(lab, PANEL, name="keys.ipynb")
    book.show()
    book.choose("data", "sample")
    book.fill("rows to train on, as a number", 24)
    book.see("GiB free")
    reached = []
    book.panel.locator("button").first.focus()
    for _ in range(20):
        reached.append(
            book.page.evaluate(
                "() => { const e = document.activeElement; return e.labels?.[0]?.textContent || e.textContent }"
            ).strip()
        )
        book.page.keyboard.press("Tab")
    for name in ("Train", "name of the run", "model", "rows to train on, as a number", "More settings", "Start"):
        assert name in reached
    book.panel.locator("button", has_text="More settings").focus()
    book.page.keyboard.press("Enter")
    book.panel.get_by_label("learning rate").wait_for()
    book.panel.get_by_role("tab", name="Train").focus()
    book.page.keyboard.press("ArrowRight")
    book.page.keyboard.press("Enter")
    book.see("as the model reads it")
    unnamed = book.panel.locator("input, select, textarea").evaluate_all(
        "all => all.filter(e => !e.labels?.length && !e.ariaLabel).length"
    )
    assert unnamed == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lab", "notebook"])
def test_the_panel_says_that_a_cell_keeps_the_kernel_busy(serve, opened, kind):
    book = opened(serve(kind), [*PANEL, "import time\ntime.sleep(6)"], name="busy.ipynb")
    book.show()
    said = "getComputedStyle(document.querySelector('.bizassist .bn-head'), '::after')"
    book.page.wait_for_function(f"() => {said}.content === 'none'")
    book.run(2, wait=False)
    book.page.wait_for_function(f"() => {said}.visibility === 'visible' && {said}.content.includes('kernel busy')")
    book.page.wait_for_function(f"() => {said}.content === 'none'")


@pytest.mark.slow
def test_answers_are_read_out_copied_and_asked_anew(serve, opened, tiny, tmp_path):
    random_run(tmp_path / "runs" / "one", tiny)
    random_run(tmp_path / "runs" / "two", tiny)
    sampled = "from bizassist_nb import Panel\nPanel.of('runs').tabs[2].options['temperature'].value = 1.0"
    book = opened(serve("lab"), [*PANEL, sampled], name="chat.ipynb")
    book.context.grant_permissions(["clipboard-read", "clipboard-write"])
    book.show()
    book.tab("Chat")
    book.unfold("Generation settings")
    book.fill("max new tokens", 12)
    book.unfold("Generation settings")
    book.run(2)  # the likeliest tokens of the tiny model are white space, of which there is nothing to copy
    newest = book.panel.locator(".bn-newest > .widget-html-content")
    book.page.wait_for_function("() => document.querySelectorAll('.bn-newest > [aria-live=polite]').length === 2")
    book.press("How should we price a new feature?")
    copy = newest.nth(1).locator("button")
    copy.wait_for()
    copy.focus()
    book.page.keyboard.press("Enter")
    book.see("Copied")
    said = newest.nth(1).locator("[hidden]").text_content()
    assert said
    assert book.page.evaluate("navigator.clipboard.readText()") == said
    book.page.evaluate(
        "() => Object.defineProperty(navigator, 'clipboard', { value: undefined })"
    )  # as it is over http
    newest.nth(0).locator("button").click()
    book.see("Selected: press Ctrl+C")
    assert book.page.evaluate("getSelection().toString().trim()") == newest.nth(0).locator(".bn-answer").inner_text()

    book.press("Edit")
    box = book.panel.get_by_label("question", exact=True)
    book.page.wait_for_function("box => box.value && box === document.activeElement", arg=box.element_handle())
    box.press("End")
    box.type(" And why?")
    book.panel.get_by_label("tuned model").select_option(["one", "two"])
    book.choose("answers of", "base, tuned and prompted base")
    book.see("tuned (one)")
    box.press("Enter")
    book.page.wait_for_function("() => document.querySelectorAll('.bn-newest button').length === 4")
    assert newest.locator(".bn-asked").all_inner_texts() == ["How should we price a new feature? And why?"] * 4
    assert newest.evaluate_all("all => all.map(e => e.ariaLive)") == ["polite"] * 4
    book.panel.locator("button", has_text=re.compile("^ *Unload .*GB$")).click()
    book.see("Freed ")
    assert book.errors == []


@pytest.mark.slow
def test_rows_are_uploaded(lab, opened, tmp_path):
    rows = tmp_path / "sales.jsonl"
    rows.write_text("".join(f'{{"instruction": "Week {i}?", "response": "Bread."}}\n' for i in range(40)))
    book = opened(lab, PANEL, name="upload.ipynb")
    book.show()
    book.unfold("Upload rows")
    book.see("at most 10 MB")
    with book.page.expect_file_chooser() as chosen:
        book.panel.locator("button", has_text="Upload").last.click()
    chosen.value.set_files(rows)
    shown = "() => [...document.querySelectorAll('.bizassist input')].some(e => e.value === 'uploads/sales.jsonl')"
    book.page.wait_for_function(shown)
    assert (lab.root / "uploads" / "sales.jsonl").read_bytes() == rows.read_bytes()
