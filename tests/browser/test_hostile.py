"""Hostile answers in a real browser: nothing runs, nothing is fetched, and the layout holds."""

from pathlib import Path

from hostile import HOSTILE

SHOW = """
import sys
sys.path.insert(0, {folder!r})
import ipywidgets
from hostile import HOSTILE
from bizassist_nb.assistant.comparison import Comparison
from bizassist_nb.notebook.panel import Panel
from bizassist_nb.notebook.panel.chat import Pane, Turn
panel = Panel()
panes = [Pane("base"), Pane("tuned")]
for pane in panes:
    pane.show([])
def turn(text, ended):
    turn = Turn(text, "run")
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


def test_nothing_in_an_answer_runs_or_breaks_the_layout(lab, opened):
    assert len(HOSTILE) >= 30
    cells = [SHOW.format(folder=str(Path(__file__).parent)), "panel", "around", EACH, STATIC]
    book = opened(lab, cells, name="hostile.ipynb")
    asked = []
    book.page.on("request", lambda request: asked.append(request.url))
    for cell in range(5):
        book.run(cell)
    panes = book.page.locator(".bn-panes").last.locator(".bn-pane")
    panes.first.get_by_text("deep").first.wait_for()
    book.page.wait_for_timeout(1500)  # time to run, for what would
    for pane in (panes.nth(0), panes.nth(1)):
        schemes = pane.locator("a[href]").evaluate_all("all => all.map(a => a.protocol)")  # as the browser takes them
        assert set(schemes) <= {"http:", "https:", "mailto:"}
        assert pane.evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        assert pane.locator("script, img, iframe, svg, style, form, object, embed, video, input").count() == 0
    assert panes.nth(0).bounding_box()["y"] == panes.nth(1).bounding_box()["y"]
    assert book.page.evaluate("window.hacked") is None
    assert book.errors == []
    assert not [url for url in asked if not url.startswith((lab.url, lab.url.replace("http", "ws"), "data:", "blob:"))]
    assert book.page.locator(".bizassist").first.is_visible()
