"""`%%finetune`, `%%ask` and `%bizassist`: they parse their line, make one call, and return what it gave."""

import re
from keyword import iskeyword
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import MagicArgumentParser

from bizassist_nb.api import Run, finetune, open_run
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.generation import BASE, TUNED, add_options, chosen
from bizassist_nb.core.settings import Settings
from bizassist_nb.runs.run import RunDirectory, list_runs


def _finetune_parser() -> MagicArgumentParser:
    parser = MagicArgumentParser("%%finetune", description="Fine-tune; the cell's body is settings in TOML.")
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="name of the run; made from the data's name without one"
    )
    parser.add_argument(
        "--background", action="store_true", help="return at once; look at the run with %%bizassist runs"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of that name from its last checkpoint"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, after the body's")
    return parser


def _ask_parser() -> MagicArgumentParser:
    parser = MagicArgumentParser(
        "%%ask", description="Ask base and tuned; the question is the body, or the line's rest."
    )
    parser.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="NAME",
        help="the run whose tuned model answers; the one trained last without this; may be given several times",
    )
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--base", action="store_true", help="ask the base alone")
    one.add_argument("--tuned", action="store_true", help="ask the tuned model alone")
    one.add_argument("--blind", action="store_true", help="hide whose answer is whose until you have voted")
    add_options(parser)
    parser.add_argument("--each", action="store_true", help="every line of the body is a question of its own")
    parser.add_argument("--runs-dir", metavar="DIR", help="folder of the runs; the last one used without this")
    parser.add_argument("-o", dest="out", metavar="VAR", help="a variable to put the Comparison in, too")
    parser.add_argument("question", nargs="...", help="the question, in a line magic")
    return parser


def _ask_options(line: str, cell: str | None) -> Any:
    """What the line says, if it goes together."""
    options = _parse(_ask_parser(), line)
    if cell is not None and options.question:
        raise UsageError(
            f"%%ask: {' '.join(options.question)!r} is not an option; the question goes in the cell's body"
        )
    if options.blind and (options.each or len(options.run) > 1 or options.strength != 1):
        raise UsageError(
            "%%ask --blind: a vote is on one question to one run as it was trained; "
            "leave out --each, --strength, and any --run but one"
        )
    if options.out is not None and not (options.out.isidentifier() and not iskeyword(options.out)):
        raise UsageError(f"%%ask -o: {options.out!r} is no name of a variable; give one like answer")
    return options


@magics_class
class BizassistMagics(Magics):
    """The magics; remembers the run and the folder used last."""

    _run: Run | None = None
    _runs_dir = "runs"
    _panel: Any = None

    @cell_magic
    def finetune(self, line: str, cell: str) -> Run:
        """Train with a live view; an interrupt stops cleanly with a checkpoint, a second one ends the run at once."""
        from bizassist_nb.assistant.loaded import unload
        from bizassist_nb.training.launch import start

        options = _parse(_finetune_parser(), line)
        settings = Settings.from_toml(cell, options.set)
        if options.resume and options.name is None:
            raise UsageError("%%finetune --resume: which run? %%finetune NAME --resume")
        unload()
        if options.background:
            self._run = Run(start(settings, options.name, resume=options.resume).path)
            self._runs_dir = settings.runs_dir
            return self._run
        from bizassist_nb.notebook.views import TrainingView

        view = TrainingView()
        try:
            self._run = finetune(settings, options.name, resume=options.resume, show=view)
        finally:
            view.finish()
            if view.run:
                self._runs_dir = settings.runs_dir
        return self._run

    @no_var_expand  # a question is text: {braces} and $ in it are the asker's
    @line_cell_magic
    def ask(self, line: str, cell: str | None = None) -> Any:
        """Stream the answers of base and tuned into adjacent columns."""
        options = _ask_options(line, cell)
        question = " ".join(options.question) if cell is None else cell
        generation, runs = chosen(options), self._chosen(options)
        who = (BASE,) if options.base else (TUNED,) if options.tuned else (BASE, TUNED)
        from bizassist_nb.assistant.assistant import Assistant
        from bizassist_nb.assistant.comparison import Comparisons, lines
        from bizassist_nb.notebook.views import AnswerView
        from bizassist_nb.notebook.vote_view import BallotView
        from bizassist_nb.results.ballot import Ballot, draw_order

        order = draw_order() if options.blind else None
        view = AnswerView(order)
        try:
            view.wait("Loading the model, once for this kernel …")
            assistant = Assistant(*runs)
            questions = (lines(question) or [""]) if options.each else [question]
            answered = Comparisons(view.follow(assistant.stream(each, generation, who=who)) for each in questions)
        except KeyboardInterrupt as interrupt:
            # IPython keeps its traceback, and so the answer it was in, with the base in GPU memory.
            raise interrupt.with_traceback(None)  # noqa: B904 - it is no other error that has a cause
        finally:
            view.finish()
        result: Any = answered if options.each else answered[0]
        if order:
            result = Ballot(runs[0], answered[0], order)
        if options.out:
            self.shell.user_ns[options.out] = result  # type: ignore[union-attr] # a registered Magics has its shell
        if isinstance(result, Ballot):
            BallotView(result).show()
            return None  # what it shows is there already, and changes with the vote
        return result

    @line_magic
    def bizassist(self, line: str) -> Any:
        """`%bizassist` shows the panel, `%bizassist runs` a table of runs, `%bizassist doctor` this machine."""
        words = line.split()
        if not words:
            return self._shown_panel()
        from bizassist_nb.notebook.tables import doctor_table, runs_table

        if words == ["doctor"]:
            return doctor_table()
        if words[:1] == ["runs"] and len(words) <= 2:
            return runs_table(list_runs(words[1] if len(words) == 2 else self._runs_dir))
        raise UsageError("%bizassist, %bizassist runs [DIR] or %bizassist doctor")

    def _shown_panel(self) -> Any:
        """One panel a kernel: every cell that asks for it shows the same."""
        if self._panel is None:
            from bizassist_nb.notebook.panel import Panel

            self._panel = Panel(self._runs_dir)
        return self._panel

    def _chosen(self, options: Any) -> list[RunDirectory]:
        """The runs to ask: those named, else the one trained here last, else the newest with an adapter."""
        folder = options.runs_dir or self._runs_dir
        if options.run:
            return [open_run(name, folder) for name in options.run]
        if self._run and self._run.adapter and not options.runs_dir:
            return [self._run]
        trained = [run for run in list_runs(folder) if run.adapter]
        if not trained and (options.tuned or options.blind):
            raise RunError(f"there is no tuned model in {folder} yet; make one with %%finetune")
        return trained[-1:]


_QUESTION = re.compile(r"(\s*)(\w+\s*=\s*)?%ask\s+(.*\?)\s*")


def as_meant(lines: list[str]) -> list[str]:
    """An input transformer for two things that IPython takes otherwise than they are meant.

    It refuses a cell magic without a body, which `%%finetune` may be; and it takes a line that ends in a question mark,
    as the question of an `%ask` does, for a call for help on the last word.
    """
    if lines and lines[0].startswith("%%"):
        empty = lines[0].startswith("%%finetune") and not "".join(lines[1:]).strip()
        return [lines[0].rstrip("\n") + "\n", "\n"] if empty else lines
    return [_ask_line(line) for line in lines]


def _ask_line(line: str) -> str:
    found = _QUESTION.fullmatch(line)
    if not found:
        return line
    indent, target, rest = found.groups(default="")
    return f"{indent}{target}get_ipython().run_line_magic('ask', {rest!r})\n"


def _parse(parser: MagicArgumentParser, line: str) -> Any:
    # By white space, not as a shell would: "What's next?" is a question, not an unclosed quotation.
    return parser.parse_args(line.split())
