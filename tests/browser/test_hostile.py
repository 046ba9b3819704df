"""Hostile answers in a real browser: nothing runs, nothing is fetched, and the layout holds."""

from pathlib import Path

import pytest
from hostile import HOSTILE

pytestmark = pytest.mark.slow

FOLDERS = {"folder": str(Path(__file__).parent), "tests": str(Path(__file__).parents[1])}
SHOW = """
import sys
sys.path[:0] = [{folder!r}, {tests!r}]
import ipywidgets
import pytest
from hostile import HOSTILE
from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.notebook.panel import Panel
from bizassist_nb.notebook.panel.transcript import Pane, Turn
panel = Panel()
panes = [Pane("base"), Pane("tuned")]
for pane in panes:
    pane.show([])
def turn(text, ended):
    turn = Turn(text, ("run",))
    turn.comparison = Comparison(text, dict.fromkeys(["base", "tuned"], text), ("run",))
    if ended:
        turn.end("")
    return turn
both = ipywidgets.Box([pane.view for pane in panes])
both.add_class("bn-panes")
around = ipywidgets.VBox([both])
around.add_class("bizassist")
"""
EACH = """
for text in HOSTILE:
    for ended in (False, True):
        for pane in panes:
            pane.show([turn(text, ended)])
for pane in panes:
    pane.show([turn(text, True) for text in HOSTILE])
"""
STATIC = """
from IPython.display import display
for text in HOSTILE:
    display(Comparison(text, {"base": text, "tuned": text}, ("run",)))
"""

VIEWS = """
import sys, tempfile
from pathlib import Path
sys.path[:0] = [{folder!r}, {tests!r}]
import ipywidgets
from hostile import HOSTILE, hostile_run
from IPython.display import HTML, display
from bizassist_nb.results.run_comparison import RunComparison, runs_section
from bizassist_nb.core.rendering import table
from bizassist_nb.results.summary import run_html
place = Path(tempfile.mkdtemp())
shown = [text for text in HOSTILE if len(text) < 1000]
runs = [hostile_run(place / str(i), text) for i, text in enumerate(shown)]
"""
EACH_VIEW = """
for pages in (map(run_html, runs), (RunComparison([run])._repr_html_() for run in runs), map(run_html, runs)):
    page = "".join(pages)
    live = ipywidgets.HTML(page)
    live.add_class("bizassist")
    display(HTML(page), live)
display(runs_section(runs), ipywidgets.HTML(table([shown], shown)))
print("all shown")
"""


def quiet(book, server, asked):
    """Check that nothing ran, nothing was fetched and nothing went wrong."""
    book.page.wait_for_timeout(1500)  # time to run, for what would
    assert book.page.evaluate("window.hacked") is None
    assert book.errors == []
    assert book.page.locator("mjx-container, .MathJax").count() == 0
    home = (server.url, server.url.replace("http", "ws"), "data:", "blob:")
    assert not [url for url in asked if not url.startswith(home)]


PRICES = r"""
from IPython.display import Markdown, display
from bizassist_nb.assistant.comparison import Comparison, Comparisons
from bizassist_nb.core.rendering import Section, plain_markdown
from bizassist_nb.results.ballot import Ballot
text = r"$49 to $99 $$\href{https://example.com}{x}$$ \(\href{https://example.com}{x}\) \begin{align}x\end{align}"
both = Comparison(text, {"base": text, "tuned": text}, ("run",), note=text)
ballot = Ballot(run, Comparison(text, {"base": text, "tuned": text}, ("run",)))
display(both, Comparisons([both]), ballot, Section("", head=[text], rows=[[text]]), Markdown(plain_markdown(text)), run)
display(Markdown("a formula of the user's own: $x$"))
"""


@pytest.mark.parametrize("kind", ["lab", "notebook"])
def test_dollar_amounts_are_no_formulas(serve, opened, kind):
    made = VIEWS.format(**FOLDERS) + r'run = hostile_run(place / "prices", "$49 to $99 \\href{https://example.com}{x}")'
    book = opened(serve(kind), [made, PRICES], name="prices.ipynb")
    for cell in range(2):
        book.run(cell)
    book.page.locator("mjx-container").first.wait_for()  # the user's own
    outputs = book.page.locator(".jp-OutputArea-output")
    assert outputs.count() == 7
    for shown in outputs.all()[:-1]:
        assert "$49 to $99" in shown.inner_text()
        assert shown.locator("mjx-container").count() == 0
        # In Markdown, JupyterLab makes a link of a bare address, as GitHub does; \href shows another text than that.
        assert "x" not in shown.locator("a[href]").all_inner_texts()
        if "jp-RenderedMarkdown" not in shown.get_attribute("class"):
            assert shown.locator("a[href]").count() == 0


def test_nothing_in_the_views_of_a_run_runs(lab, opened):
    book = opened(lab, [VIEWS.format(**FOLDERS), EACH_VIEW], name="views.ipynb")
    asked = []
    book.page.on("request", lambda request: asked.append(request.url))
    for cell in range(2):
        book.run(cell)
    book.page.get_by_text("all shown", exact=True).first.wait_for(state="attached")
    quiet(book, lab, asked)
    links = book.page.locator(".jp-OutputArea a[href]").evaluate_all("all => all.map(a => a.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}


def test_nothing_in_an_answer_runs_or_breaks_the_layout(lab, opened):
    assert len(HOSTILE) >= 30
    cells = [SHOW.format(**FOLDERS), "panel", "around", EACH, STATIC]
    book = opened(lab, cells, name="hostile.ipynb")
    asked = []
    book.page.on("request", lambda request: asked.append(request.url))
    for cell in range(5):
        book.run(cell)
    panes = book.page.locator(".bn-panes").last.locator(".bn-pane")
    panes.first.get_by_text("deep").first.wait_for()
    quiet(book, lab, asked)
    for pane in (panes.nth(0), panes.nth(1)):
        schemes = pane.locator("a[href]").evaluate_all("all => all.map(a => a.protocol)")  # as the browser takes them
        assert set(schemes) <= {"http:", "https:", "mailto:"}
        assert pane.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        assert pane.locator("script, img, iframe, svg, style, form, object, embed, video, input").count() == 0
    assert panes.nth(0).bounding_box()["y"] == panes.nth(1).bounding_box()["y"]
    assert book.page.locator(".bizassist").first.is_visible()
