"""The extension, magics and views in a real kernel. These also run under Colab's front-end versions."""

import json
import os
import re
import shutil
import signal
import time

import nbformat
import pytest
from live_kernel import kernel, wait_until
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from bizassist_nb.api import Run
from bizassist_nb.runs import records

pytestmark = pytest.mark.notebook

WIDGET = "application/vnd.jupyter.widget-view+json"
PLAIN = "--set engine=transformers"  # quicker to begin


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def live(place):
    with kernel(place) as running:
        assert running.run("%load_ext bizassist_nb").status == "ok"
        yield running


@pytest.fixture(scope="module")
def quick(tiny):
    """Settings of a run that takes a moment: the tiny random model."""
    return (
        f'model = "{tiny}"\ndata = "sample"\nsubset = 12\nheld_out = 4\nmax_length = 512\nengine = "transformers"\n'
        'system_prompt = ""\n'
    )


@pytest.fixture(scope="module")
def trained(live, quick):
    """The cell of a finished run named "trained"."""
    return live.run(f"%%finetune trained\n{quick}")


def test_load_ext_imports_nothing_heavy(place):
    with kernel(place) as fresh:
        code = (
            "import sys\nbefore = set(sys.modules)\n%load_ext bizassist_nb\n"
            "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
            "print(sorted(new & {'torch', 'transformers', 'matplotlib', 'numpy', 'ipywidgets', 'datasets', 'peft'}))"
        )
        assert fresh.run(code).text.strip() == "[]"


def test_finetune_ends_with_static_output_only(trained, place):
    assert trained.status == "ok"
    assert not trained.mime(WIDGET)
    assert len(trained.mime("image/png")) == 1
    (summary,) = trained.mime("text/html")
    assert "trained: finished · step 3/3" in summary
    assert "95 % interval" in summary
    assert Run(place / "runs" / "trained").status == "finished"


def test_finetune_shows_settings_progress_and_plot_while_it_trains(trained):
    assert any(WIDGET in output.get("data", {}) for output in trained.shown)
    seen = "\n".join(trained.updates)
    for text in (
        "subset = 12",
        "asked for",
        "12 rows to train on",
        "tokens/s",
        "held-out loss",
        "<svg",
    ):
        assert text in seen, text


def test_finetune_gives_a_run(trained, live):
    cell = live.run(
        "from bizassist_nb import open_run\nrun = open_run('trained')\nrun.name, run.status, len(run.steps)"
    )
    assert cell.text == "('trained', 'finished', 3)"
    assert live.run("run.plot()").mime("image/png")


def test_interrupt_stops_with_a_checkpoint_and_resume_finishes(live, quick, place):
    message = live.start(f"%%finetune halted\n{quick}epochs = 100")
    path = place / "runs" / "halted"
    wait_until(lambda: (path / "settings.toml").exists() and len(Run(path).steps) >= 3)
    live.interrupt()
    cell = live.finish(message)
    assert cell.status == "ok"
    stopped = Run(path)
    done = len(stopped.steps)
    assert stopped.status == "stopped"
    assert 3 <= done < 300
    assert f"the checkpoint at step {done} is kept; go on with: %%finetune halted --resume" in cell.mime("text/html")[0]
    assert stopped.adapter
    message = live.start("%%finetune halted --resume\n")
    wait_until(lambda: len(stopped.steps) > done)
    live.interrupt()
    assert live.finish(message).status == "ok"
    assert stopped.last(records.Resumed).step == done
    assert [step.step for step in stopped.steps] == list(range(1, len(stopped.steps) + 1))


def test_second_interrupt_ends_the_run_at_once(live, quick, place):
    message = live.start(f"%%finetune killed\n{quick}epochs = 100")
    path = place / "runs" / "killed"
    wait_until(lambda: (path / "settings.toml").exists() and Run(path).status == "loading")
    os.kill(Run(path).workers()[0], signal.SIGSTOP)  # it cannot stop by itself
    live.interrupt()
    wait_until(lambda: Run(path).stopping)
    time.sleep(2)  # a second interrupt counts when "stopping" has been shown for a second
    live.interrupt()
    cell = live.finish(message)
    assert Run(path).killed
    assert any("stopping: " in shown and "asked again, it ends at once" in shown for shown in cell.updates)
    wait_until(lambda: Run(path).workers() == [])  # no orphan


def test_pressing_twice_in_a_hurry_is_one_request_to_stop(live, quick, place):
    message = live.start(f"%%finetune hurried\n{quick}epochs = 100")
    path = place / "runs" / "hurried"
    wait_until(lambda: (path / "settings.toml").exists() and len(Run(path).steps) >= 3)
    live.interrupt()
    time.sleep(0.1)  # a hurried second press
    live.interrupt()
    assert live.finish(message).status == "ok"
    run = Run(path)
    assert (run.status, run.killed) == ("stopped", False)
    assert run.adapter


def test_background_returns_at_once(live, quick, place):
    cell = live.run(f"%%finetune aside --background\n{quick}")
    assert cell.status == "ok"
    run = Run(place / "runs" / "aside")
    assert run.status not in ("finished", "failed", "lost")
    wait_until(lambda: run.status == "finished")


def test_ask_leaves_both_answers_as_static_columns(trained, live):
    cell = live.run("%%ask --run trained --max-new-tokens 8 -o answer\nWhat's a <b>price</b>?")
    assert cell.status == "ok"
    (html,) = cell.mime("text/html")
    assert not cell.mime(WIDGET)
    assert "base" in html
    assert "tuned (trained), stopped at the limit of 8 tokens" in html
    assert "What&#x27;s a &lt;b&gt;price&lt;/b&gt;?" in html
    assert live.run("answer.question, answer.runs").text == repr(("What's a <b>price</b>?", ("trained",)))


def widget(cell, **state) -> str:
    """The comm id of the widget made with that state."""
    return next(comm for comm, made in cell.widgets.items() if state.items() <= made.items())


@pytest.mark.parametrize("by", ["button", "key"])
def test_blind_answers_have_no_names_until_the_vote(trained, live, place, by):
    votes = place / "runs" / "trained" / "votes.jsonl"
    before = len(votes.read_text("utf-8").splitlines()) if votes.exists() else 0
    cell = live.run("%%ask --run trained --blind --max-new-tokens 8 -o ballot\nWhat's a price?")
    assert cell.status == "ok"
    assert cell.mime(WIDGET)
    (html,) = cell.mime("text/html")  # what a notebook without the kernel shows
    for shown in (html, *cell.updates):
        assert "left" in shown or "Loading" in shown
        assert "tuned" not in shown
    if by == "button":
        reply = live.send(
            widget(cell, description="Right is better"), {"method": "custom", "content": {"event": "click"}}
        )
    else:
        key = {"method": "update", "state": {"value": "2"}, "buffer_paths": []}
        reply = live.send(widget(cell, description="vote by key"), key)
    winner = live.run("ballot.vote.winner").text.strip("'")
    lines = votes.read_text("utf-8").splitlines()
    assert len(lines) == before + 1
    assert json.loads(lines[-1])["winner"] == winner
    (revealed,) = reply.mime("text/html")
    assert revealed in reply.updates
    assert "tuned (trained)" in revealed
    assert f"You voted: {winner} is better. " in revealed
    assert live.run("ballot.order[1]").text == repr(winner)


@pytest.mark.parametrize(
    ("option", "asked"), [("--base", "['base']"), ("--tuned", "['tuned']"), ("", "['base', 'tuned']")]
)
def test_ask_as_a_line_asks_whom_it_is_told(trained, live, option, asked):
    cell = live.run(f"%ask --run trained --max-new-tokens 4 {option} What's {{next}} for $us?")
    assert "Question: What's {next} for $us?" in cell.text
    assert live.run("list(_.answers)").text == asked


def test_base_alone_does_not_claim_that_there_is_no_run(trained, live):
    cell = live.run("%ask --base --max-new-tokens 4 Why?")
    assert "--- base (" in cell.text
    assert "no tuned model yet" not in cell.text


def test_other_outputs_of_the_cell_stay(trained, live):
    cell = live.run("print('before')\ndisplay('shown')\n%ask --run trained --max-new-tokens 4 Why?")
    assert "before" in cell.text
    assert "'shown'" in cell.text
    assert "--- base" in cell.text
    assert not cell.mime(WIDGET)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("%%ask --run tr", ["trained"]),
        ("%ask --con", ["--continue"]),
        ("%%ask --top-", ["--top-p", "--top-k"]),
        ("%%finetune tr", []),  # a name of its own
        ("%%finetune --resume tr", ["trained"]),
        ("%%finetune new --set ra", ["rank"]),
        ("%%finetune new --set rank=8 --back", ["--background"]),
    ],
)
def test_tab_completes_the_line_of_a_cell(trained, live, typed, offered):
    matches = live.complete(typed)
    assert set(offered) <= set(matches)  # IPython 7 adds names of Python
    assert offered or "trained" not in matches


def test_tab_completes_settings_in_the_body_of_a_cell(live):
    sees_the_cell = live.run("import IPython\nIPython.version_info >= (8, 6)").text == "True"
    for code, offered in (
        ("%%finetune\nsubset = 3\nra", sees_the_cell),
        ("%%finetune\nsubset = ra", False),
        ("%%ask\nra", False),
    ):
        assert ("rank" in live.complete(code)) == offered
    if sees_the_cell:
        assert live.complete("%%finetune\nlearn") == ["learning_rate"]


def test_help_is_made_of_the_texts_of_the_options(live):
    shown = live.run("%bizassist help").text
    for word in ("%%finetune [--background]", "%%ask [--run NAME]", "learning_rate", "%bizassist runs [DIR]"):
        assert word in shown
    for magic, words in (
        ("%%ask", ["--continue", "a text that ends an answer"]),
        ("%%finetune", ["--replace", "learning_rate"]),
    ):
        reply = live.client.inspect(magic, len(magic), reply=True, timeout=60)["content"]
        assert all(word in reply["data"]["text/plain"] for word in words)


@pytest.mark.parametrize("option", ["", "--blind"])
def test_an_interrupt_leaves_what_was_answered(trained, live, option):
    message = live.start(f"%%ask --run trained --max-new-tokens 1500 {option} -o halted\nHow would you do that?")
    begun, shown = 0, ""
    while not begun or len(shown) < begun + 100:  # until it is in the midst of the answers
        reply = live.client.get_iopub_msg(timeout=240)["content"]
        shown = reply.get("data", {}).get("state", {}).get("value", shown)
        if not begun and ("How would you" in shown or "left" in shown):
            begun = len(shown)
    live.interrupt()
    cell = live.finish(message)
    assert cell.status == "error"
    if option:
        assert not cell.mime("text/html")
    else:
        (html,) = cell.mime("text/html")
        assert "Interrupted: these answers are not complete." in html
        assert live.run("len(halted.base) > 10, halted.question").text == "(True, 'How would you do that?')"


def test_a_question_that_is_too_long_is_refused_before_any_is_answered(trained, live):
    questions = "\n".join(["One?", "Two?", "word " * 2500, "Four?"])
    cell = live.run(f"%%ask --run trained --each --max-new-tokens 4 -o kept\n{questions}")
    assert cell.status == "error"
    assert "the question has" in cell.text
    assert live.run("'kept' in dir()").text == "False"


def test_ask_line_can_be_assigned(trained, live):
    live.run("first = %ask --run trained --max-new-tokens 4 --base Why?")
    assert live.run("first.question").text == "'Why?'"


def test_ask_each_line_of_a_cell_gives_a_table_for_pandas(trained, live):
    cell = live.run("%%ask --run trained --each --max-new-tokens 4 --strength 0.5 -o table\nWhy?\n\nWhat <i>now</i>?")
    assert cell.status == "ok"
    (html,) = cell.mime("text/html")
    assert html.count("<tr>") == 3
    assert "What &lt;i&gt;now&lt;/i&gt;?" in html
    assert "tuned (trained), strength 0.5" in html
    live.run("import pandas; frame = pandas.DataFrame(table.to_dict())")
    assert live.run("list(frame.question)").text == "['Why?', 'What <i>now</i>?']"
    assert live.run("list(frame.columns[:3]), set(frame.strength)").text == "(['question', 'base', 'tuned'], {0.5})"


def test_ask_of_several_runs_has_a_column_for_each(trained, place, live):
    shutil.copytree(place / "runs" / "trained", place / "runs" / "second")
    cell = live.run("%%ask --run trained --run second --max-new-tokens 4 -o answers\nWhy?")
    shutil.rmtree(place / "runs" / "second")
    assert cell.status == "ok"
    assert live.run("list(answers.answers)").text == "['base', 'tuned (trained)', 'tuned (second)']"
    assert live.run("answers.answers['tuned (trained)'] == answers.answers['tuned (second)']").text == "True"


def test_ask_without_a_run_asks_the_base_alone_and_says_so(live, tmp_path):
    cell = live.run(f"%ask --runs-dir {tmp_path} --max-new-tokens 4 Hello?")
    assert "There is no tuned model yet, so only the base answers" in cell.text
    assert live.run("list(_.answers)").text == "['base']"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("%ask --run nosuch Hello?", ["there is no run 'nosuch'", "trained"]),
        ("%%ask --run trained\n   ", ["question is empty"]),
        ("%ask --run trained --max-new-tokens 0 Hello?", ["max_new_tokens = 0"]),
        ("%ask --blind --runs-dir nowhere Hello?", ["no tuned model in nowhere"]),
        ("%%finetune trained\n", ["there is a run 'trained' already", "--resume"]),
        ("%%finetune trained --resume\n", ["has finished"]),
        ("%%finetune nosuch --resume\n", ["no run 'nosuch'"]),
        ("%%finetune ../up\n", ["'../up' cannot be the name of a run"]),
        ("%%finetune x\nsubset = \n", ["not TOML", "line 1"]),
        ("%%finetune x\nrnak = 8\nsubset = 0\n", ["did you mean rank?", "subset = 0: has to be a whole number from 1"]),
        (f'%%finetune missing {PLAIN}\ndata = "nosuch.csv"\n', ["there is no file nosuch.csv"]),
        (f'%%finetune untrained {PLAIN}\nmodel = "./nosuch"\ndata = "sample"\nsubset = 9\n', ["./nosuch", "folder"]),
        (f'%%finetune unreachable {PLAIN}\ndata = "owner/none"\n', ["owner/none", "cannot be loaded"]),
        (f'%%finetune many {PLAIN}\ndata = "sample"\nsubset = 118\n', ["120 usable rows", "at most 56"]),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback_of_ours(trained, live, code, words):
    cell = live.run(code)
    assert cell.status == "error"
    for word in words:
        assert word in cell.text
    assert "Traceback" not in cell.text
    assert "bizassist_nb/" not in cell.text


@pytest.mark.parametrize(
    "code",
    ["%%finetune --bakground\n", "%%ask --run\nHi", "%%ask hello\nHi", "%bizassist what", "%%finetune --resume\n"],
)
def test_wrong_arguments_are_a_usage_error(live, code):
    cell = live.run(code)
    assert cell.status == "error"
    assert "UsageError" in cell.text or "error:" in cell.text
    assert "Traceback" not in cell.text


# In a kernel there is nothing to wait on but the run itself; `live.run` gives up after its own time.
def test_a_name_is_free_again_when_its_run_never_took_a_step(live, quick):
    assert live.run(f'%%finetune again {PLAIN}\nmodel = "./nosuch"\ndata = "sample"\nsubset = 9\n').status == "error"
    assert live.run(f"%%finetune again --background\n{quick}").status == "ok"
    live.run("import time\nagain = _\nagain.kill()\nwhile again.alive: time.sleep(0.1)")


def test_an_edited_cell_can_be_run_again_under_its_name(live, quick):
    assert live.run(f"%%finetune edited --background\n{quick}").status == "ok"
    live.run("import time\nfirst = _\nwhile first.alive and not first.steps: time.sleep(0.1)")
    live.run("first.kill()\nwhile first.alive: time.sleep(0.1)")
    edited = f"{quick}\nrank = 8\n"
    assert "move it to the bin with --replace" in live.run(f"%%finetune edited --background\n{edited}").text
    assert live.run(f"%%finetune edited --replace --background\n{edited}").status == "ok"
    assert live.run("_.settings.rank").text == "8"
    live.run("from bizassist_nb import open_run\nsecond = open_run('edited')\nsecond.kill()")
    live.run("while second.alive: time.sleep(0.1)")


def test_a_table_in_the_notebook_is_trained_on_by_its_name(live, quick):
    live.run("import pandas\ndf = pandas.DataFrame({'text': [f'good {n}' for n in range(40)], 'label': [True] * 40})")
    body = quick.replace('"sample"', '"{df}"') + '[template]\nuser = "Good? {text}"\nassistant = "{label}"\n'
    assert live.run(f"%%finetune framed\n{body}").status == "ok"
    assert (
        live.run("_.settings.data, sorted(p.name for p in _.path.glob('*.parquet'))").text
        == "('{df}', ['data.parquet'])"
    )
    cell = live.run(f"%%finetune misnamed\n{body.replace('{label}', '{lable}')}")
    assert "row 1: has no column 'lable' (named in template); it has text, label; did you mean {label}?" in cell.text


def test_a_worker_that_dies_at_start_shows_its_last_words(live, quick, tmp_path):
    (tmp_path / "trl.py").write_text('import os\nprint("trl went up in smoke", flush=True)\nos._exit(3)\n')
    live.run(f"import os; os.environ['PYTHONPATH'] = {str(tmp_path)!r}")
    cell = live.run(f"%%finetune dead\n{quick}")
    live.run("del os.environ['PYTHONPATH']")
    assert cell.status == "error"
    assert "ended without a word" in cell.text
    assert "trl went up in smoke" in cell.text


def test_tables(trained, live):
    runs = live.run("%bizassist runs")
    assert re.search(r"trained +finished", runs.text)
    assert "tokens/s" in runs.text
    assert runs.mime("text/html")
    assert "bitsandbytes" in live.run("%bizassist doctor").text


def test_runs_are_compared(trained, live):
    cell = live.run("from bizassist_nb import compare\ncompare('trained')")
    assert "Runs compared" in cell.text
    assert "data:image/png;base64" in cell.mime("text/html")[0]


@pytest.mark.slow
def test_a_saved_notebook_shows_everything_without_a_kernel(place, quick):
    notebook = nbformat.v4.new_notebook()
    for code in ("%load_ext bizassist_nb", f"%%finetune saved\n{quick}", "%%ask --max-new-tokens 4\nHow?"):
        notebook.cells.append(nbformat.v4.new_code_cell(code))
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(place)}}).execute()
    kept = json.dumps([cell["outputs"] for cell in notebook.cells])
    assert WIDGET not in kept
    page, _ = HTMLExporter().from_notebook_node(notebook)
    for text in (
        "saved: finished",
        "95 % interval",
        "Did it help?",
        "answers that loop",
        "<summary>General questions, by kind</summary>",
        "data:image/png;base64,",
        "tuned (saved)",
    ):
        assert text in page
