"""Takes the pictures of the docs anew: python tests/browser/pictures.py FOLDER.

A real JupyterLab trains the embedded model on sample rows, in a cell and then in the panel, and both answer a question.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from front_ends import Book, chromium, serving

SETTINGS = """data = "sample"      # 120 rows on product and business work
subset = 24          # rows to train on
held_out = 16        # rows on which base and tuned are scored
max_length = 256     # tokens
batch_size = 2"""
QUESTION = "Two customers ask for opposite changes to our product. How should we decide?"
CELLS = [
    "%load_ext bizassist_nb",
    "%bizassist",
    f"%%finetune pricing\n{SETTINGS}",
    f"%%ask --max-new-tokens 64\n{QUESTION}",
]
STEPS = 8
"""Steps that a curve has in a picture of a training."""


def trained(book, steps=STEPS):
    """Wait until the run that is shown in training has done so many steps."""
    book.page.wait_for_function(
        "steps => [...document.querySelectorAll('.bn-tiles b')]"
        ".some(e => parseInt(/^(\\d+) \\/ /.exec(e.innerText)?.[1]) >= steps)",
        arg=steps,
        timeout=900_000,
    )


def cell(book, index):
    return book.page.locator(".jp-Notebook .jp-Cell").nth(index)


def cells(book, folder):
    """The pictures of what cells show."""
    book.run(0)
    book.run(2, wait=False)
    trained(book)
    cell(book, 2).screenshot(path=folder / "training.png")
    shown = cell(book, 2).locator(".jp-RenderedHTMLCommon", has_text="Did it help?").last
    shown.wait_for(timeout=900_000)
    head, foot = shown.bounding_box(), shown.locator("summary", has_text="the figures").bounding_box()
    height = foot["y"] + foot["height"] + 8 - head["y"]
    clip = {"x": head["x"], "y": head["y"], "width": head["width"], "height": height}
    book.page.screenshot(path=folder / "verdict.png", clip=clip)
    book.run(3)
    answers = cell(book, 3).locator(".jp-RenderedHTMLCommon", has_text="tuned (pricing)").last
    answers.wait_for(timeout=300_000)
    cell(book, 3).screenshot(path=folder / "answers.png")


def panel(book, folder):
    """The pictures of the panel: in training, and in the chat."""
    book.run(1)
    book.see("name of the run")
    book.press("Try it: 2 minutes")
    book.fill("name of the run", "second-try")
    book.fill("rows to train on, as a number", 32)
    book.see("GiB free")
    book.press("Start")
    trained(book)
    book.picture(folder / "panel-training.png")
    book.press("Stop second-try")
    book.see("second-try: stopped", timeout=300)
    book.tab("Chat")
    book.choose("tuned model", "pricing")
    book.unfold("Generation settings")
    book.fill("max new tokens", 64)
    book.unfold("Generation settings")
    book.press("How should we price a new feature?")
    book.see("stopped at the limit", timeout=300)
    book.picture(folder / "panel-chat.png")


def main():
    folder, root = Path(sys.argv[1]).resolve(), Path(tempfile.mkdtemp())
    with serving("lab", root) as server, chromium() as browser:
        book = Book(browser, server, server.notebook("pictures.ipynb", CELLS), width=1250, height=2000)
        book.page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
        cells(book, folder)
        panel(book, folder)
        book.close()
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
