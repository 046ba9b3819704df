"""Fine-tune a 4-bit language model into a business and product assistant, inside a notebook, and see whether it helped.

`%load_ext bizassist_nb` brings the magics; `import bizassist_nb` brings the same things as Python.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from bizassist_nb.api import Run as Run
    from bizassist_nb.api import compare as compare
    from bizassist_nb.api import finetune as finetune
    from bizassist_nb.api import open_run as open_run
    from bizassist_nb.assistant.assistant import Assistant as Assistant
    from bizassist_nb.assistant.comparison import Comparison as Comparison
    from bizassist_nb.assistant.comparison import Conversation as Conversation
    from bizassist_nb.core.errors import BizassistError as BizassistError
    from bizassist_nb.core.settings import Settings as Settings
    from bizassist_nb.notebook.panel import Panel as Panel

# Loaded when first used: neither `import bizassist_nb` nor `%load_ext` pays for torch.
_HOMES = {
    "Assistant": "bizassist_nb.assistant.assistant",
    "BizassistError": "bizassist_nb.core.errors",
    "Comparison": "bizassist_nb.assistant.comparison",
    "Conversation": "bizassist_nb.assistant.comparison",
    "Panel": "bizassist_nb.notebook.panel",
    "Run": "bizassist_nb.api",
    "Settings": "bizassist_nb.core.settings",
    "compare": "bizassist_nb.api",
    "finetune": "bizassist_nb.api",
    "open_run": "bizassist_nb.api",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from bizassist_nb.core.versions import own_version  # its imports take longer than `import bizassist_nb` does

        return own_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(shell: "InteractiveShell") -> None:
    """Register the magics with IPython (`%load_ext bizassist_nb`)."""
    from bizassist_nb.notebook import completion
    from bizassist_nb.notebook.magics import BizassistMagics, as_meant

    magics = BizassistMagics(shell)
    shell.register_magics(magics)
    completion.install(shell, lambda: magics.runs_dir)
    if as_meant not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.insert(0, as_meant)
