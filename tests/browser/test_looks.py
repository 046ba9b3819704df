"""Pictures of the panel (idle, training, chatting; light, dark, narrow), and what can be measured of its looks."""

import shutil

import pytest

from bizassist_nb.runs import Run

CELLS = ["%load_ext bizassist_nb", "%bizassist"]
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
      && !e.closest(':disabled') && getComputedStyle(e).clipPath === 'none')
    .map(e => { const back = behind(e), c = parse(getComputedStyle(e).color);
      let a = c.length === 4 ? c[3] : 1; for (let n = e; n; n = n.parentElement) a *= getComputedStyle(n).opacity;
      const one = light(over(c.slice(0, 3), a, back)), two = light(back);
      return [(Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05), e.textContent.trim().slice(0, 40)]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


def fits(book):
    """Nothing is wider than the panel."""
    wide = book.panel.evaluate(
        "e => [...e.querySelectorAll('*')].filter(c => c.offsetParent && !c.closest('.widget-readout, svg, label')"
        " && c.getBoundingClientRect().right > e.getBoundingClientRect().right + 1).map(c => c.outerHTML.slice(0, 200))"
    )
    assert wide == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_looks(serve, opened, trained, tmp_path, screenshots, theme):
    shutil.copytree(trained.path, tmp_path / "runs" / "pricing")
    book = opened(serve("lab", dark=theme == "dark"), CELLS)
    book.show()
    book.see("tokens an epoch")
    book.see("95 % interval")
    book.page.screenshot(path=screenshots / f"idle-{theme}.png")
    assert book.panel.locator("*").evaluate_all(CONTRAST) == []

    book.choose("data", "sample")
    book.fill("rows to train on, as a number", 24)
    book.press("Start")
    book.page.wait_for_function(
        "() => [...document.querySelectorAll('.bizassist svg')].some(s => /at step 1, .* at [2-9]/.test(s.ariaLabel))",
        timeout=120_000,
    )
    book.page.screenshot(path=screenshots / f"training-{theme}.png")
    assert book.panel.locator("*").evaluate_all(CONTRAST) == []
    book.press("Stop")
    book.see(": stopped")

    book.tab("Chat")
    book.choose("tuned model", "pricing")
    book.unfold("Generation settings")
    book.fill("max new tokens", 90)
    book.unfold("Generation settings")
    book.press("How should we price a new feature?")
    book.page.wait_for_function(
        "() => document.querySelectorAll('.bn-answer')[1]?.innerText.length > 200", timeout=120_000
    )
    book.page.screenshot(path=screenshots / f"chatting-{theme}.png")
    book.see("cut short", timeout=120)
    assert book.panel.locator("*").evaluate_all(CONTRAST) == []
    left, right = (book.panel.locator(".bn-pane").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    fits(book)

    book.page.set_viewport_size({"width": 800, "height": 1000})
    book.page.wait_for_timeout(500)
    left, right = (book.panel.locator(".bn-pane").nth(i).bounding_box() for i in (0, 1))
    assert left["x"] == right["x"]
    fits(book)
    book.page.screenshot(path=screenshots / f"narrow-chat-{theme}.png")
    book.tab("Preview")
    book.see("as the model reads it")
    fits(book)
    book.page.screenshot(path=screenshots / f"narrow-preview-{theme}.png")
    book.tab("Train")
    book.unfold("More settings")
    fits(book)
    book.page.screenshot(path=screenshots / f"narrow-train-{theme}.png")
    assert Run(tmp_path / "runs" / "sample-1").status == "stopped"
