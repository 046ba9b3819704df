"""Strip from the notebooks what nbval does not compare: such outputs, times, widget state."""

from pathlib import Path

import nbformat

for path in Path(__file__).parent.glob("*.ipynb"):
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, 1):
        cell.metadata.pop("execution", None)
        cell.execution_count = count  # nbval takes a cell without one for a cell that was never run
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            cell.outputs = []
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    path.write_text(nbformat.writes(notebook) + "\n", "utf-8")
