"""Strip from notebooks what differs each time they are run: times, widgets, counts. Outputs stay.

Usage: python strip.py [NOTEBOOK ...]; without names all beside this file. Exit status 1 if one of those named changed.
"""

import sys
from pathlib import Path

import nbformat

_WIDGET = "application/vnd.jupyter.widget-view+json"
_NOTHING = {"text/plain": ""}


def strip(path: Path) -> bool:
    """Strip one notebook; whether it changed."""
    before = path.read_text("utf-8")
    notebook = nbformat.reads(before, 4)
    notebook.metadata.pop("widgets", None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = count  # nbval takes a cell without one for a cell that was never run
        for output in cell.outputs:
            output.get("data", {}).pop(_WIDGET, None)  # without its state; the HTML beside it says so
            if "execution_count" in output:
                output.execution_count = count
        cell.outputs = [output for output in cell.outputs if output.get("data") != _NOTHING]
    after = nbformat.writes(notebook) + "\n"
    path.write_text(after, "utf-8")
    return after != before


if __name__ == "__main__":
    named = [Path(name) for name in sys.argv[1:]]
    changed = [strip(path) for path in named or Path(__file__).parent.glob("*.ipynb")]
    sys.exit(any(changed) and bool(named))
