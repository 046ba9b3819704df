"""Completion by Tab in the cells of `%%finetune` and `%%ask`: options, names of runs, and settings."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any, Final

import IPython

from bizassist_nb.core.errors import RunError
from bizassist_nb.core.settings import Settings
from bizassist_nb.notebook.magics import ask_parser, finetune_parser
from bizassist_nb.runs.run import list_runs

_MAGICS: Final = ("%%finetune", "%%ask", "%ask")
_SETTINGS: Final = [field.name for field in dataclasses.fields(Settings)]


def install(shell: Any, folder: Callable[[], str]) -> None:
    """Have the shell complete in these cells; `folder` says where the runs are."""
    if IPython.version_info >= (8, 6):
        shell.Completer.custom_matchers.append(_matcher(folder))
    else:  # Colab's: a completer sees no more of a cell than the line of the cursor

        def complete(_: Any, event: Any) -> list[str]:
            return _on_line(event.text_until_cursor, event.line, folder())

        for magic in _MAGICS:
            shell.set_hook("complete_command", complete, str_key=magic)


def _matcher(folder: Callable[[], str]) -> Any:
    from IPython.core.completer import SimpleCompletion, context_matcher

    @context_matcher()  # type: ignore[untyped-decorator] # IPython gives it no type
    def bizassist(context: Any) -> dict[str, Any]:
        """What completes the line of a magic, or a line of the body of `%%finetune`, and nothing else then."""
        line = context.line_with_cursor
        before, names = line[: context.cursor_position], list[str]()
        if line.startswith(_MAGICS):
            names = _on_line(before, line, folder())
        elif context.full_text.startswith("%%finetune") and re.fullmatch(r"\w*", before):
            names = _SETTINGS
        found = [SimpleCompletion(name, type="magic") for name in names if name.startswith(context.token)]
        return {"completions": found, "suppress": bool(found), "ordered": True}

    return bizassist


def _on_line(before: str, line: str, folder: str) -> list[str]:
    """What may come next on the line of a magic after what stands before the cursor, of which the last word is cut."""
    *typed, _ = re.split(r"[\s=]+", before)
    if typed[-1:] == ["--set"]:
        return _SETTINGS
    finetune = typed[:1] == ["%%finetune"]
    usage = (finetune_parser() if finetune else ask_parser()).format_usage()
    options = re.findall(r"(?<!\w)--?[a-z][a-z-]*", usage)
    with contextlib.suppress(RunError):  # of a folder that cannot be read: then no names are offered
        if typed[-1:] == ["--run"]:
            return [run.name for run in list_runs(folder) if run.adapter]
        if finetune and re.search("--(resume|replace)", line) and not set(typed[1:]) - set(options):
            return [*(run.name for run in list_runs(folder)), *options]
    return options
