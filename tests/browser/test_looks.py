"""Pictures of the panel (idle, training, chatting; light, dark, narrow), and what can be measured of its looks."""

import os
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from hostile import hostile_run

from bizassist_nb.api import Run

pytestmark = pytest.mark.slow

CELLS = ["%load_ext bizassist_nb", "%bizassist"]
RUN = "from bizassist_nb import compare, open_run\nopen_run('sample-2')"
# Contrast of every text to what is behind it (WCAG 2.2), where that is one plain colour; disabled controls excepted.
CONTRAST = """all => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => { const f = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const over = (top, a, under) => top.map((v, i) => v * a + under[i] * (1 - a));
  const behind = e => { const stack = [];
    for (let n = e; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor);
      const a = c.length === 4 ? c[3] : 1; if (a > 0) stack.push([c.slice(0, 3), a]); if (a === 1) break; }
    return stack.reverse().reduce((under, [c, a]) => over(c, a, under), [255, 255, 255]); };
  return all.filter(e => e.offsetParent && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
      && !e.closest(':disabled, [aria-hidden]') && getComputedStyle(e).clipPath === 'none')
    .map(e => { const back = behind(e), c = parse(getComputedStyle(e).color);
      let a = c.length === 4 ? c[3] : 1; for (let n = e; n; n = n.parentElement) a *= getComputedStyle(n).opacity;
      const one = light(over(c.slice(0, 3), a, back)), two = light(back);
      return [(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05), e.textContent.trim().slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5);
}"""

# What has a scrollbar and should not, and what of a label is not seen.
CROWDED = """all => all.filter(e => e.offsetParent && !e.matches('select, textarea, .bn-talk, .bn-scroll, .bn-scroll *')
    && !(e.matches('.widget-html-content, [tabindex]') && e.querySelector('table'))).filter(e => {
  const style = getComputedStyle(e), wide = e.scrollWidth > e.clientWidth, high = e.scrollHeight > e.clientHeight;
  return ['auto', 'scroll'].includes(style.overflowX) && wide || ['auto', 'scroll'].includes(style.overflowY) && high
    || e.matches('.widget-label, .lm-TabBar-tabLabel, button') && wide && style.clipPath === 'none';
}).map(e => e.outerHTML.slice(0, 200))"""
# Words in tables that are broken, but for very long ones.
BROKEN = """cells => cells.filter(c => c.offsetParent).flatMap(c => [...c.childNodes])
  .filter(n => n.nodeType === 3).flatMap(n =>
  [...n.data.matchAll(/[^\\s-]+/g)].filter(word => {
    const range = document.createRange();
    range.setStart(n, word.index); range.setEnd(n, word.index + word[0].length);
    return word[0].length <= 12 && new Set([...range.getClientRects()].map(r => r.top)).size > 1;
  }).map(word => word[0]))"""
# Inputs of the same row that lie upon one another, or have no room for what stands in them.
COVERED = """rows => rows.filter(r => r.offsetParent).filter(r => {
  const boxes = [...r.querySelectorAll('.noUi-target, input, select')]
    .filter(e => e.offsetParent && e.type !== 'checkbox').map(e => e.getBoundingClientRect());
  return boxes.some(b => b.width < 60) || boxes.some((a, i) => boxes.slice(i + 1).some(b =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1));
}).map(r => r.innerText)"""


def fits(book):
    """Nothing is wider than the panel, but for what can be scrolled; nothing is crowded, broken or covered."""
    assert book.panel.locator("*").evaluate_all(CROWDED) == []
    assert book.panel.locator("td, th").evaluate_all(BROKEN) == []
    assert book.panel.locator(".bn-row, .bn-options > *").evaluate_all(COVERED) == []
    wide = book.panel.evaluate(
        "e => [...e.querySelectorAll('*')].filter(c => c.offsetParent"
        " && !c.closest('.widget-readout, svg, label, table, .bn-scroll')"
        " && c.getBoundingClientRect().right > e.getBoundingClientRect().right + 1).map(c => c.outerHTML.slice(0, 200))"
    )
    assert wide == []


def accessible(book, place=".bizassist"):
    """axe-core finds nothing serious or critical there."""
    found = Axe().run(book.page, place).response["violations"]
    bad = [(each["id"], each["nodes"][0]["html"]) for each in found if each["impact"] in ("serious", "critical")]
    assert bad == []


def pictures(book, folder, name):
    """One in each theme; in both every text stands out from what is behind it."""
    for theme in ("dark", "light"):
        book.theme(theme)
        book.picture(folder / f"{name}-{theme}.png")
        assert book.panel.locator("*").evaluate_all(CONTRAST) == []
        accessible(book)


def panes(book):
    return [book.panel.locator(".bn-pane").nth(i).bounding_box() for i in (0, 1)]


@pytest.mark.parametrize("width", [1400, 800, 390])
def test_everything_fits_at_any_width(serve, opened, tmp_path, screenshots, width):
    for name in ("first-pricing", "sample-2"):
        hostile_run(tmp_path / "runs" / name, "A price is what a customer pays")
    book = opened(serve("lab"), [*CELLS, RUN, "compare('first-pricing', 'sample-2')"], width=width, height=2000)
    if width < 1400:
        book.page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    book.show()
    book.see("tokens an epoch")
    for tab in ("Train", "Preview", "Chat", "Runs", "Export"):
        book.tab(tab)
        for button in book.panel.locator("button.bn-fold").locator("visible=true").all():
            button.click()
        if tab == "Runs":
            book.press("Compare")
            book.see("Runs compared")
        book.page.wait_for_timeout(500)
        pictures(book, screenshots, f"{width}-{tab.lower()}")
        fits(book)
    for cell in (2, 3):
        book.run(cell)
    accessible(book, ".jp-RenderedHTMLCommon")


def test_looks(serve, opened, dolly, trained, tmp_path, screenshots):
    shutil.copytree(trained.path, tmp_path / "runs" / "pricing")
    book = opened(serve("lab"), CELLS)
    book.page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    book.show()
    book.see("GiB free")
    book.see("95 % interval")
    pictures(book, screenshots, "idle")

    book.choose("data", "sample")
    book.fill("rows to train on, as a number", 96)
    book.unfold("More settings")
    book.fill("held out", 24)
    book.fill("batch size", 1)
    book.fill("learning rate", 1e-3)
    book.unfold("More settings")
    book.see("GiB free")
    book.press("Start")
    book.page.wait_for_function(
        "steps => [...document.querySelectorAll('.bizassist svg')].some(s =>"
        " Number(/at step 1, .* at (\\d+)/.exec(s.ariaLabel)?.[1]) >= steps)",
        arg=40 if "SCREENSHOTS" in os.environ else 2,  # a longer curve where the pictures are wanted
        timeout=300_000,
    )
    pictures(book, screenshots, "training")
    (name,) = {path.name for path in (tmp_path / "runs").iterdir()} - {"pricing"}
    book.press(f"Stop {name}")
    book.see(": stopped", timeout=120)

    book.tab("Chat")
    book.choose("tuned model", "pricing")
    book.unfold("Generation settings")
    book.fill("max new tokens", 90)
    book.unfold("Generation settings")
    book.press("How should we price a new feature?")
    book.page.wait_for_function(
        "() => document.querySelectorAll('.bn-answer')[1]?.innerText.length > 200", timeout=120_000
    )
    pictures(book, screenshots, "chatting")
    book.see("stopped at the limit of 90 tokens", timeout=120)
    left, right = panes(book)
    assert left["y"] == right["y"]
    for tab, text in (("Preview", "as the model reads it"), ("Runs", "held-out"), ("Export", "export to")):
        book.tab(tab)
        book.see(text)
        fits(book)
        pictures(book, screenshots, tab.lower())

    book.page.set_viewport_size({"width": 800, "height": 1000})
    book.tab("Chat")
    book.page.wait_for_timeout(500)
    left, right = panes(book)
    assert left["x"] == right["x"]
    book.tab("Train")
    book.unfold("More settings")
    for tab in ("Train", "Preview", "Chat", "Runs", "Export"):
        book.tab(tab)
        fits(book)
        book.picture(screenshots / f"narrow-{tab.lower()}.png")
    assert Run(tmp_path / "runs" / "sample-1").status == "stopped"
