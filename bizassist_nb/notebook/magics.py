"""`%%finetune`, `%%ask` and `%bizassist`: each parses its line, makes one call, and returns the result."""

import dataclasses
import functools
import inspect
import re
import textwrap
from keyword import iskeyword
from typing import Any, NamedTuple

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import MagicArgumentParser
from IPython.display import display

from bizassist_nb.api import Run, open_run
from bizassist_nb.core.errors import DataError, RunError, without_locals
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED, add_options, chosen
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.sources import VARIABLE
from bizassist_nb.runs.run import RunDirectory, check_alone, list_runs

_WORD = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|\S)+""")


def _words(line: str) -> list[str]:
    """A magic's line cut at white space, but not within quotes, which stay: in a setting they are TOML's.

    Unlike a shell's, a quote that is not closed is a letter: "What's next?"
    """
    return _WORD.findall(line)


def _unquoted(word: str) -> str:
    """A word that is quoted as a whole, without its quotes."""
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


@functools.cache
def finetune_parser() -> MagicArgumentParser:
    """The parser of a `%%finetune` line; its help is that of the magic, too."""
    names = ", ".join(field.name for field in dataclasses.fields(Settings))
    text = f"Fine-tune. The cell's body is settings in TOML, all of them optional: {names}."
    parser = MagicArgumentParser("%finetune", description=textwrap.fill(text, 100))
    add = parser.add_argument
    name = "name of the run; made from the data's name without one"
    add("name", nargs="?", type=_unquoted, metavar="NAME", help=name)
    add("--background", action="store_true", help="return at once; look at the run with %%bizassist runs")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run of that name from its last checkpoint")
    mode.add_argument("--replace", action="store_true", help="move the run of that name to the bin and begin anew")
    setting = "a setting, after the body's"
    add("--set", action="append", default=[], type=_unquoted, metavar="KEY=VALUE", help=setting)
    return parser


def finetune_options(line: str) -> Any:
    """The options of a `%%finetune` line."""
    return finetune_parser().parse_args(_words(line))


@functools.cache
def ask_parser() -> MagicArgumentParser:
    """The parser of an `%%ask` or `%ask` line; its help is that of the magic, too."""
    parser = MagicArgumentParser("%ask", description="Ask base and tuned. The question is the body, or ends the line.")
    add, one = parser.add_argument, parser.add_mutually_exclusive_group()
    who = "run whose tuned model answers; the one trained last without this; may be given several times"
    add("--run", action="append", default=[], type=_unquoted, metavar="NAME", help=who)
    one.add_argument("--base", action="store_true", help="ask the base alone")
    one.add_argument("--tuned", action="store_true", help="ask the tuned model alone")
    one.add_argument("--blind", action="store_true", help="hide which answer is which until you have voted")
    more = "ask further in the conversation that the last question of this kernel began, to the same runs"
    add("--continue", dest="further", action="store_true", help=more)
    add_options(parser, _unquoted)
    add("--each", action="store_true", help="every line of the body is a question of its own")
    add("--runs-dir", type=_unquoted, metavar="DIR", help="folder of the runs; the last one used without this")
    add("-o", dest="out", metavar="VAR", help="a variable to put the Comparison in, too")
    add("question", nargs="...", help="the question, in a line magic")
    return parser


def ask_options(line: str, cell: str | None = None) -> Any:
    """The options of an `%%ask` or `%ask` line; `cell` is the body of the cell.

    Raises:
        UsageError: for options that cannot be used, or not together.
    """
    options = ask_parser().parse_args(_words(line))
    if cell is not None and options.question:
        raise UsageError(f"%%ask: {' '.join(options.question)!r} is no option; the question belongs in the body")
    altered = options.strength != 1 or options.system is not None
    if options.blind and (options.each or options.prompted or options.further or len(options.run) > 1 or altered):
        raise UsageError(
            "%%ask --blind: a vote is on one question to one run as it was trained; "
            "leave out --each, --prompted, --continue, --strength, --system, and any --run but one"
        )
    others = options.run or options.base or options.tuned or options.prompted or options.runs_dir
    if options.further and (others or options.each):
        raise UsageError("%%ask --continue: leave out --run, --runs-dir, --base, --tuned, --prompted and --each")
    if options.out is not None and not (options.out.isidentifier() and not iskeyword(options.out)):
        raise UsageError(f"%%ask -o: {options.out!r} is no name of a variable; give one like answer")
    return options


class _Talk(NamedTuple):
    """The conversation that --continue goes on with, and who takes part in it."""

    runs: list[RunDirectory]
    who: tuple[str, ...]
    system: str | None
    said: Any  # a Conversation


@magics_class
class BizassistMagics(Magics):
    """The magics; they remember the run, the folder and the conversation used last."""

    runs_dir = "runs"
    _run: Run | None = None
    _talk: _Talk | None = None

    @cell_magic
    def finetune(self, line: str, cell: str) -> Run:
        """Train with a live view; an interrupt stops cleanly with a checkpoint, a second one ends the run at once."""
        from bizassist_nb.assistant.loaded import unload
        from bizassist_nb.training.launch import begin, follow, start

        options = finetune_options(line)
        settings = Settings.from_toml(cell, options.set)
        how = {"resume": options.resume, "replace": options.replace}
        if any(how.values()) and options.name is None:
            raise UsageError("%%finetune: which run? %%finetune NAME --resume, or %%finetune NAME --replace")
        data = None if options.resume else self._table(settings.data)
        check_alone(settings.runs_dir, but=options.name)
        unload()
        if options.background:
            self._run = Run(start(settings, options.name, data=data, **how).path)
            self.runs_dir = settings.runs_dir
            return self._run
        from bizassist_nb.notebook.views import TrainingView

        view = TrainingView()
        try:
            begun = functools.partial(begin, settings, options.name, data=data, **how)
            self._run = Run(follow(begun, view).path)
        finally:
            view.finish()
            if view.run:
                self.runs_dir = settings.runs_dir
        return self._run

    def _table(self, data: str) -> Any:
        """What the variable holds that `Settings.data` names in braces; None for other data."""
        if not (found := VARIABLE.fullmatch(data)):
            return None
        table = self.shell.user_ns.get(found[1])  # type: ignore[union-attr] # a registered Magics has its shell
        if table is None:
            raise DataError(f'data = "{data}": the notebook has no table named {found[1]}; make it in a cell before')
        return table

    @no_var_expand  # a question is text: {braces} and $ in it are the asker's
    @line_cell_magic
    def ask(self, line: str, cell: str | None = None) -> Any:
        """Stream the answers of base and tuned into adjacent columns.

        Where an interrupt or an error ends them, what there is of them is displayed, and is in the variable of `-o`.
        """
        options = ask_options(line, cell)
        question = " ".join(options.question) if cell is None else cell
        talk = self._conversation(options)
        generation = dataclasses.replace(chosen(options), system=talk.system)
        self._talk = None if options.each or options.blind else talk
        from ipywidgets import HTML

        from bizassist_nb.assistant.assistant import Assistant
        from bizassist_nb.assistant.comparison import Comparison, Comparisons
        from bizassist_nb.notebook.views import clear, follow, show_ballot, show_widget
        from bizassist_nb.results.ballot import Ballot, draw_order

        order = draw_order() if options.blind else None
        show_widget(live := HTML(), "Answers, while they are written.")
        answered: list[Comparison] = []
        try:
            with without_locals():  # of the view's, too, from where an interrupt leaves the answer half-way
                live.value = "<i>Loading the model, once for this kernel …</i>"
                assistant = Assistant(*talk.runs, base=self._base(options, talk), anyway=options.anyway)
                lines = [line.strip() for line in question.splitlines() if line.strip()]
                if options.each:
                    follow(assistant.each(lines or [""], generation, who=talk.who), live, order, answered)
                else:
                    stream = assistant.stream(question, generation, who=talk.who, conversation=talk.said)
                    follow((([], [found]) for found in stream), live, order, answered)
        except BaseException:  # an interrupt, too: what was answered is shown, and the error goes on
            clear(live)
            if answered and not order:  # without its end there is nothing to vote on
                display(self._keep(options, Comparisons(answered) if options.each else answered[0]))
            raise
        clear(live)
        if order:
            show_ballot(self._keep(options, Ballot(talk.runs[0], answered[0], order)))
            return None  # it is displayed already, and changes with the vote
        return self._keep(options, Comparisons(answered) if options.each else answered[0])

    def _conversation(self, options: Any) -> _Talk:
        """A new conversation, or with --continue that of the last question."""
        from bizassist_nb.assistant.comparison import Conversation

        if not options.further:
            asked = (BASE,) if options.base else (TUNED,) if options.tuned else (BASE, TUNED)
            who = (*asked, *([PROMPTED] if options.prompted else []))
            return _Talk(self._chosen(options), who, options.system, Conversation())
        if not self._talk or not self._talk.said:
            raise UsageError("%%ask --continue: there is no conversation in this kernel yet; ask without --continue")
        return self._talk if options.system is None else self._talk._replace(system=options.system)

    def _keep(self, options: Any, found: Any) -> Any:
        """What was found, as the result of the magic: in the variable of `-o`, too."""
        if options.out:
            self.shell.user_ns[options.out] = found  # type: ignore[union-attr] # a registered Magics has its shell
        return found

    @line_magic
    def bizassist(self, line: str) -> Any:
        """%bizassist shows the panel, %bizassist runs [DIR] a table of runs, %bizassist doctor what this machine has.

        %bizassist help shows the options of all magics; %%finetune? and %%ask? say what each is for.
        """
        from bizassist_nb.results.run_comparison import runs_section
        from bizassist_nb.training import doctor

        usage = inspect.getdoc(BizassistMagics.bizassist)
        match [_unquoted(word) for word in _words(line)]:
            case []:
                from bizassist_nb.notebook.panel import Panel

                return Panel.of(self.runs_dir)
            case ["help"]:
                for parser in (finetune_parser(), ask_parser()):
                    print(parser.format_usage(), parser.description, sep="\n", end="\n\n")
                print(usage)
                return None
            case ["doctor"]:
                return doctor.report(self.runs_dir)
            case ["runs", *folder] if len(folder) <= 1:
                return runs_section(list_runs(*folder or [self.runs_dir]))
        raise UsageError(usage)

    def _chosen(self, options: Any) -> list[RunDirectory]:
        """The runs to ask: those named, else the one that this kernel trained last, else the newest with an adapter."""
        folder = options.runs_dir or self.runs_dir
        if options.run:
            return [open_run(name, folder) for name in options.run]
        if self._run and self._run.adapter and not options.runs_dir:
            return [self._run]
        trained = [run for run in list_runs(folder) if run.adapter]
        if not trained and (options.tuned or options.blind):
            raise RunError(f"there is no tuned model in {folder} yet; make one with %%finetune")
        return trained[-1:]

    def _base(self, options: Any, talk: _Talk) -> Settings | None:
        """Settings of the newest run: its base answers where there is no tuned model yet; None where it does not."""
        if talk.runs:
            return None
        sound = [run for run in list_runs(options.runs_dir or self.runs_dir) if not run.damage]
        return sound[-1].resolved if sound else None


BizassistMagics.finetune.__doc__ = finetune_parser().format_help()
BizassistMagics.ask.__doc__ = ask_parser().format_help()

_QUESTION = re.compile(r"^(\s*(?:\w+\s*=\s*)?)%ask\s+(.*\?)\s*$")


def as_meant(lines: list[str]) -> list[str]:
    """An input transformer for two things that IPython misunderstands.

    It refuses a cell magic without a body, which `%%finetune` allows; and it takes a line that ends in a question mark,
    as `%ask` lines do, for a call for help on the last word.
    """
    if lines and lines[0].startswith("%%"):
        empty = lines[0].startswith("%%finetune") and not "".join(lines[1:]).strip()
        return [lines[0].rstrip("\n") + "\n", "\n"] if empty else lines
    return [
        _QUESTION.sub(lambda found: f"{found[1]}get_ipython().run_line_magic('ask', {found[2]!r})\n", line)
        for line in lines
    ]
