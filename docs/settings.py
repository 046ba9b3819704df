"""Write docs/settings.md from the settings' own texts. Run: python docs/settings.py"""

from pathlib import Path

from bizassist_nb.core.settings import reference

HEAD = """# Settings

The keys of a `%%finetune` cell, of the file of `bizassist finetune`, and of `Settings`. Made by `docs/settings.py`.

| setting | default | meaning |
| --- | --- | --- |
"""


def text() -> str:
    """The page."""
    return HEAD + "".join(f"| `{name}` | `{default}` | {_cell(meaning)} |\n" for name, default, meaning in reference())


def _cell(meaning: str) -> str:
    return meaning.replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(text(), "utf-8")
