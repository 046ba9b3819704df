"""What docs/safety.md promises: texts of models, data and files stay texts, and secrets are nowhere."""

import ast
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from markdown_it import MarkdownIt
from random_run import random_run
from traitlets.config import Config

import bizassist_nb
from bizassist_nb import Assistant, Panel
from bizassist_nb.__main__ import main
from bizassist_nb.api import open_run
from bizassist_nb.assistant.comparison import Comparison, Comparisons
from bizassist_nb.core import rendering
from bizassist_nb.core.errors import BizassistError, RunError, printable
from bizassist_nb.core.settings import Settings
from bizassist_nb.notebook.panel.preview import page_html, row_html
from bizassist_nb.notebook.views import progress_html
from bizassist_nb.results import loss_plot
from bizassist_nb.results.ballot import Ballot
from bizassist_nb.results.model_card import card
from bizassist_nb.results.run_comparison import RunComparison, runs_section
from bizassist_nb.results.summary import run_html, run_text
from bizassist_nb.training.forecast import forecast

sys.path.insert(0, str(Path(__file__).parent / "browser"))
from hostile import HOSTILE, hostile_run

PACKAGE = Path(bizassist_nb.__file__).parent
TOKEN = "hf_markerTokenThatMustNotBeSeen"

TEXTS = [
    *(text for text in HOSTILE if len(text) < 1000),
    "'\"><script>x</script>",
    "</td></tr></table></details></pre></div><b>",
    "$\\frac{1}{$",
    "$\\href{javascript:x}{y}$ ~~a~~ **b** _c_ <!-- --> &lt;b&gt; \\| | `x` [a](javascript:x) ![a](//e.x/y.png)",
    "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m",
    "{0.__class__} {name} %s %(x)d $HOME `id` $(id)",
    "a\n---\nlicense: mine\n---\n# head\n\n- item\n\n```\ncode\n```\n| a | b |\n|---|---|",
]
CLEAN = [text.encode("utf-8", "replace").decode().replace("\0", "") for text in TEXTS]  # what a TOML file can hold


MARKDOWN = MarkdownIt("gfm-like", {"linkify": False})


class Structure(HTMLParser):
    """Tags and attributes of a page; the values of those that hold texts are left out."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        keep = [(name, "" if name in ("aria-label", "alt", "src", "points") else value) for name, value in attributes]
        self.found.append((tag, keep))

    def handle_comment(self, data):
        self.found.append(("a comment", data))

    handle_decl = handle_pi = unknown_decl = handle_comment


def structure(page):
    return Structure(page).found


VIEWS = {
    "report": run_html,
    "panel, in training": progress_html,
    "table": lambda run: runs_section([run, run]).page(),
    "comparison of runs": lambda run: RunComparison([run, run])._repr_html_(),
    "plot": loss_plot.loss_svg,
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_text_of_a_run_adds_to_the_structure_of_a_view(view, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_plot.LossFigure, "_repr_png_", lambda _: b"a picture")  # drawn further down
    expected = structure(VIEWS[view](hostile_run(tmp_path / "plain", "x")))
    for i, text in enumerate(TEXTS):
        page = VIEWS[view](hostile_run(tmp_path / f"run{i}", text))
        assert structure(page) == expected, text
        page.encode()  # it can be sent


def test_no_name_of_a_folder_adds_to_the_structure_of_a_view(tmp_path):
    """A folder may have any name, once somebody unpacked it here."""
    plain = hostile_run(tmp_path / "plain", "x")
    for i, text in enumerate(CLEAN):
        name = text.replace("/", "∕")[:60].strip(".") or "x"
        run = hostile_run(tmp_path / str(i) / name, "x")
        assert runs_section([run]).page().count("<") == runs_section([run]).page().count(">")
        assert len(structure(runs_section([run]).page())) == len(structure(runs_section([plain]).page())) + 1
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", run_text(run) + repr(runs_section([run])))
        if set("$\\_%{") & set(name):  # no formula, no formats
            assert loss_plot.loss_figure(run, plain)._repr_png_().startswith(b"\x89PNG")


def test_a_name_that_begins_with_an_underscore_is_in_the_legend(tmp_path):
    figure = loss_plot.loss_figure(hostile_run(tmp_path / "_one", "x"), hostile_run(tmp_path / "$two$", "x"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_one", "$two$"]
    assert figure._repr_png_()


def test_no_text_of_a_row_adds_to_the_structure_of_the_preview(tiny, tmp_path):
    def page(text):
        path = tmp_path / "rows.json"
        clean = (text.encode("utf-8", "replace").decode()).strip() or "x"
        rows = [{"instruction": f"{clean} {i}", "response": clean, "context": f"{clean} {i}"} for i in range(5)]
        path.write_text(json.dumps(rows), "utf-8")
        *_, found = forecast(Settings(model=str(tiny), data=str(path), subset=3, held_out=2, engine="transformers"))
        tags = structure(page_html(found, 0)), structure(row_html(found, found.training[0]))
        return tags[0], {tag for tag, _ in tags[1]}, {name for _, all_ in tags[1] for name, _ in all_}

    expected = page("x")
    for text in TEXTS:
        assert page(text) == expected, text


def test_no_text_of_a_question_adds_to_the_structure_of_answers_and_votes(tmp_path):
    run = hostile_run(tmp_path / "one", "x")

    def pages(text):
        both = Comparison(text, {"base": "x", "tuned": "y"}, (text,), note=text)
        ballot = Ballot(run, Comparison(text, {"base": "x", "tuned": "y"}, ("one",)), ("base", "tuned"))
        before = structure(ballot._repr_html_())
        ballot.cast("tie")
        return [
            structure(page) for page in (both._repr_html_(), Comparisons([both])._repr_html_(), ballot._repr_html_())
        ], before

    expected = pages("x")
    for text in TEXTS:
        assert pages(text) == expected, text


def test_descriptions_of_the_panels_controls_are_plain_text(tmp_path):
    hostile_run(tmp_path / "runs" / "one", "x")

    def widgets(at):
        yield at
        for child in getattr(at, "children", ()):
            yield from widgets(child)

    for widget in widgets(Panel(str(tmp_path / "runs")).view):
        assert not getattr(widget, "description_allow_html", False)
        assert not re.search("[<>]", getattr(widget, "description", ""))


def markdown_structure(text):
    return [(token.type, token.tag) for token in MARKDOWN.parse(text) if token.type != "inline"]


def test_no_text_of_a_run_adds_to_the_model_card(tiny, tmp_path):
    def text_of(text):
        return card(hostile_run(tmp_path / f"{abs(hash(text))}" / "one", text))

    expected = text_of("x")
    shape = markdown_structure(expected.split("---", 2)[2])
    for text in CLEAN:
        found = text_of(text)
        _, head, body = found.split("---\n", 2)
        assert yaml.safe_load(head).keys() <= {
            "library_name",
            "pipeline_tag",
            "tags",
            "base_model",
            "datasets",
            "license",
        }
        assert "license" not in yaml.safe_load(head)
        assert markdown_structure(body) == shape, text
        rendered = MARKDOWN.render(body)
        tags = {tag for tag, _ in structure(rendered)}
        assert not tags & {"script", "iframe", "style", "svg", "form", "object", "math", "a comment", "a", "em", "s"}
        assert rendered.count("<img") == 2  # the verdict and the loss curve
        (code,) = [token.content for token in MARKDOWN.parse(body) if token.type == "fence"]
        calls = {node.func.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and
                 isinstance(node.func, ast.Name)}  # fmt: skip
        assert calls <= {"BitsAndBytesConfig", "print"}


# The terminal


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_that_is_printed_moves_the_cursor(text, tmp_path, capsys):
    run = hostile_run(tmp_path / "one", text)
    both = Comparison(text, {"base": text, "tuned": text}, (text,), note=text)
    ballot = Ballot(run, Comparison(text, {"base": text, "tuned": text}, ("one",)))
    shown = [
        repr(both),
        repr(Comparisons([both])),
        repr(ballot),
        run_text(run),
        repr(runs_section([run])),
        repr(RunComparison([run])),
    ]
    shown += BizassistError(text)._render_traceback_()
    for command in (["runs"], ["votes", "one"]):
        assert main([*command, "--runs-dir", str(tmp_path)]) == 0
    assert main(["ask", text, "Hi?", "--runs-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    for each in (*shown, said.out, said.err):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", each)
        each.encode()


def test_line_ends_and_tabs_are_printed_as_they_are():
    assert printable("a\tb\r\nc\nü 漢 🦜") == "a\tb\nc\nü 漢 🦜"


# Names, code, shells


def test_a_question_is_not_expanded(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_run(tmp_path / "runs" / "one", tiny)
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell(config=config)
    shell.run_line_magic("load_ext", "bizassist_nb")
    shell.user_ns.update(name="expanded", price="expanded")
    asked = "What is {name} worth, {price!r}, $name $$ %s {0} {undefined} `id` $(id) !ls ?"
    for code in (f"%ask --max-new-tokens 1 -o found {asked}", f"%%ask --max-new-tokens 1 -o found\n{asked}"):
        assert shell.run_cell(code).success
        assert shell.user_ns["found"].question == asked


def test_the_package_has_nothing_that_runs_what_it_reads():
    """No eval, pickle, shell or remote code; torch.load only of weights."""
    names = {"eval", "exec", "compile", "__import__", "input"}
    modules = {"marshal", "shelve", "dill", "cloudpickle", "joblib"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {name.partition(".")[0] for name in found} & modules, path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", (path, node.lineno)  # torch's, of what is no tensor
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert called not in names, (path, node.lineno)
            assert called not in ("os.system", "os.popen", "subprocess.getoutput"), (path, node.lineno)
            assert not called.startswith("yaml.") or called in ("yaml.safe_load", "yaml.YAMLError"), (path, node.lineno)
            assert keywords.get("shell", "False") == "False", (path, node.lineno)
            assert keywords.get("trust_remote_code", "False") == "False", (path, node.lineno)
            if called == "torch.load":
                assert keywords.get("weights_only") == "True", (path, node.lineno)
            if (
                called == "AutoModelForCausalLM.from_pretrained" and path.name != "parity.py"
            ):  # which loads what we wrote
                assert keywords.get("use_safetensors") == "True" or "gguf_file" in keywords, (path, node.lineno)


# Secrets


@pytest.fixture
def echo():
    """A hub that answers everything with a refusal in which the token is repeated."""

    class Echo(http.server.BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length)
            said = f"not for {self.headers.get('Authorization')}, said {TOKEN}"
            seen.append(self.headers.get("Authorization"))
            body = json.dumps({"error": said}).encode()
            self.send_response(403)
            self.send_header("X-Error-Message", said)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            self.answer()

        def do_POST(self):
            self.answer()

        def do_HEAD(self):
            self.answer()

        def log_message(self, *_):
            pass

    seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("what", [{"data": "owner/rows"}, {"model": "owner/model", "data": "sample"}])
def test_a_token_that_a_hub_repeats_is_nowhere(what, echo, tmp_path):
    address, seen = echo
    settings = [part for key, value in what.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "bizassist_nb", "finetune", "--name", "one", *settings, "--set", "subset=8"]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
    }
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert f"Bearer {TOKEN}" in seen  # it was really sent
    assert "(the token)" in result.stderr or "cannot be loaded" in result.stderr
    run = open_run("one", tmp_path / "runs")
    views = [result.stdout, result.stderr, run_text(run), run_html(run), run.error, "\n".join(run.log(1000))]
    files = [path.read_bytes().decode("utf-8", "replace") for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*views, *files):
        assert "markerToken" not in text


def test_a_surprise_in_the_worker_is_logged_without_the_token(tmp_path, monkeypatch, capfd):
    from bizassist_nb.training import worker

    def fail(*_):
        raise RuntimeError(f"https://me:secret-word@host said {TOKEN}")

    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    monkeypatch.setattr(worker.Worker, "work", fail)
    assert worker.main(str(tmp_path)) == 1
    seen = capfd.readouterr().err + (tmp_path / "events.jsonl").read_text("utf-8")
    assert "RuntimeError: https://(the password)@host said (the token)" in seen
    assert "markerToken" not in seen
    assert "secret-word" not in seen


def test_a_token_that_does_not_look_like_one_is_known_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an-odd-token")
    assert str(RunError("refused an-odd-token")) == "refused (the token)"
    with pytest.raises(BizassistError, match="holds a password or a token"):
        Settings(data="an-odd-token/rows.csv")
    monkeypatch.setenv("HF_TOKEN", "")
    assert str(RunError("refused an-odd-token")) == "refused an-odd-token"


def test_answers_of_a_model_are_what_the_hostile_texts_are_held_against(tiny, tmp_path):
    run = random_run(tmp_path / "one", tiny)
    answer = Assistant(run).ask("<script>x</script>", max_new_tokens=2)
    assert "script" not in {tag for tag, _ in structure(answer._repr_html_())}
    assert rendering.markdown("<script>x</script>") == "<p>&lt;script&gt;x&lt;/script&gt;</p>\n"
