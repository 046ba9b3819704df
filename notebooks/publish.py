"""Write a repository's address into the notebooks: REPO in their install cell, and on GitHub a badge that opens Colab.

Usage: python publish.py https://HOST/OWNER/NAME; `make notebooks REPO=…` runs it.
"""

import json
import re
import sys
from pathlib import Path

import nbformat

_BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/{}/blob/main/notebooks/{})"


def publish(folder: Path, repo: str) -> None:
    """Write it into all notebooks of the folder, in place of an earlier one.

    Raises:
        ValueError: if it is not the address of a repository.
    """
    if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+){2,}", repo):
        raise ValueError(f"REPO = {repo}: has to be the address of a repository, https://HOST/OWNER/NAME")
    on_github = re.fullmatch(r"https://github\.com/(.+?)(\.git)?", repo)  # Colab opens no other host's notebooks
    for path in folder.glob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        notebook.cells = [cell for cell in notebook.cells if cell.id != "badge"]
        if on_github:
            badge = nbformat.v4.new_markdown_cell(_BADGE.format(on_github[1], path.name), id="badge")
            notebook.cells.insert(0, badge)
        [install] = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", ())]
        install.source = re.sub(r'^REPO = ".*?"', f"REPO = {json.dumps(repo)}", install.source, count=1)
        path.write_text(nbformat.writes(notebook) + "\n", "utf-8")


if __name__ == "__main__":
    publish(Path(__file__).parent, sys.argv[1])
