"""The command line: `bizassist`, or `python -m bizassist_nb`."""

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TextIO

from bizassist_nb.api import Run, open_run
from bizassist_nb.core.errors import BizassistError, SettingsError, brief, printable
from bizassist_nb.core.generation import BASE, PROMPTED, TUNED, add_options, chosen
from bizassist_nb.core.settings import DEMO, Settings, reference, user_path
from bizassist_nb.core.versions import own_version
from bizassist_nb.runs.run import ENDED, RunDirectory, list_runs

_LARGEST: Final = 2**20
"""Most bytes of a file of settings."""

DEMO_QUESTION: Final = "We can build only one of three features this quarter. How should we decide?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, or 1 for an error that the user can fix, or 130 after an interrupt."""
    options = _parser().parse_args(arguments)
    try:
        options.run_command(options)
    except BizassistError as error:
        _say(f"bizassist: {error}", to=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _say(text: object, to: TextIO | None = None) -> None:
    """Print at once; control characters are spelt out, so that none moves the cursor or sets colours."""
    print(printable(str(text)), file=to, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bizassist", description="Fine-tune a small assistant and see if it helped.")
    parser.add_argument("--version", action="version", version=own_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, text in {
        _finetune: "train a run from a TOML file of settings",
        _ask: "ask base and tuned a question",
        _evaluate: "score base and tuned on the held-out rows again",
        _votes: "count the blind votes on a run",
        _export: "write the merged 16-bit model, or the adapter's folder, or upload it",
        _data: "check rows before training: what is wrong or odd about them, with row numbers and what to do",
        _models: "show the bases that have names, with the memory that they take and their licences",
        _runs: "show a table of the runs",
        _doctor: "show what this machine has, and what follows from it",
        _demo: "fine-tune the embedded model on a CPU and ask it a question",
    }.items():
        subparser = commands.add_parser(command.__name__.removeprefix("_"), help=text)
        subparser.set_defaults(run_command=command)
        subparser.add_argument("--runs-dir", default="runs", help="folder of the runs (default: runs)")
        if command in (_finetune, _demo, _data):
            setting = "a setting, applied after all others"
            subparser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
        elif command not in (_models, _runs, _doctor):
            subparser.add_argument("run", metavar="RUN")
    _add_arguments(commands.choices)
    return parser


def _add_arguments(commands: Mapping[str, argparse.ArgumentParser]) -> None:
    """The arguments that only one command has."""
    finetune, ask, export = (commands[name] for name in ("finetune", "ask", "export"))
    commands["data"].add_argument("file", metavar="FILE", help="a file or folder of rows, or what else data can name")
    finetune.add_argument("file", nargs="?", metavar="FILE.toml", help="settings; the defaults without one")
    finetune.add_argument("--name", help="name of the run; made from the data's name without one")
    mode = finetune.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="continue the run of that name")
    mode.add_argument("--replace", action="store_true", help="move the run of that name to the bin and begin anew")
    lines = (f"  {name} = {default}\n      {text}" for name, default, text in reference())
    finetune.epilog = "\n".join(["settings, with their defaults:", *lines])
    finetune.formatter_class = argparse.RawDescriptionHelpFormatter
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--base", action="store_true", help="ask the base alone")
    add_options(ask)
    commands["evaluate"].add_argument("--json", action="store_true", help="print evaluation.json, not the verdict card")
    commands["votes"].add_argument("--to", metavar="FILE.jsonl", help="write preference pairs for TRL's DPO trainer")
    to = "merged: a 16-bit model, compared with the tuned assistant; adapter: its folder, with a model card; "
    to += "hub: that folder, uploaded; gguf: the merged model as a file for llama.cpp and Ollama, with a Modelfile"
    export.add_argument("--to", choices=["merged", "adapter", "hub", "gguf"], required=True, help=to)
    base = "with --to merged: into the 4-bit weights of training, or into the 16-bit weights that those were made of"
    export.add_argument("--base", choices=["trained", "original"], default="trained", help=base)
    export.add_argument("--repo", metavar="OWNER/NAME", help="hub repository, with --to hub")
    export.add_argument("--private", action="store_true", help="make the repository private, with --to hub")


def _finetune(options: argparse.Namespace) -> None:
    settings = _settings(options, _read(options.file) if options.file else "")
    _train(settings, options.name, resume=options.resume, replace=options.replace)


def _demo(options: argparse.Namespace) -> None:
    from bizassist_nb.assistant.assistant import Assistant

    run = _train(_settings(options, DEMO))
    if run.status == "finished":
        first, last = run.steps[:5], run.steps[-5:]
        means = [sum(step.loss for step in steps) / len(steps) for steps in (first, last)]
        _say(f"\ntraining loss: {means[0]:.3f} over the first five steps, {means[1]:.3f} over the last five\n")
        _say(Assistant(run).ask(DEMO_QUESTION, max_new_tokens=200))
        _say(f"\nAsk more: bizassist ask {run.name} 'your question'; the loss curve is {run.path / 'loss.png'}")


def _settings(options: argparse.Namespace, text: str) -> Settings:
    settings = Settings.from_toml(text, options.set)
    return dataclasses.replace(settings, runs_dir=options.runs_dir) if options.runs_dir != "runs" else settings


def _read(name: str) -> str:
    try:
        with user_path(name).open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise SettingsError([f"{name} is no file of settings: it has more than {_LARGEST // 1024:,} KiB"])
        return text.decode()
    except UnicodeDecodeError as error:
        where = f"line {text[: error.start].count(10) + 1}"
        raise SettingsError([f"{name} is not UTF-8 ({where}); save it as UTF-8"]) from error
    except (OSError, ValueError) as error:
        raise SettingsError([f"{name} cannot be read ({brief(error)}); give the path of a TOML file"]) from error


def _train(settings: Settings, name: str | None = None, *, resume: bool = False, replace: bool = False) -> RunDirectory:
    from bizassist_nb.results.summary import headline, run_text
    from bizassist_nb.results.verdict_card import rising
    from bizassist_nb.training.launch import begin, follow

    shown, said = "", None
    where = "" if settings.runs_dir == "runs" else f"--runs-dir {shlex.quote(settings.runs_dir)} "
    typed = f"bizassist finetune {where}--name"

    def show(run: RunDirectory) -> None:
        nonlocal shown, said
        line = headline(run)
        if run.status == "training" and (words := rising(run)) != said:
            _say(words or "Held-out loss falls again.")
            said = words
        if line != shown:
            _say(run_text(run, typed) if run.status in ENDED else line)
            shown = line

    begun = functools.partial(begin, settings, name, resume=resume, replace=replace)
    run = Run(follow(begun, show).path)
    if run.error:  # `follow` has not raised it: there was a second interrupt
        raise KeyboardInterrupt
    return run


def _ask(options: argparse.Namespace) -> None:
    from bizassist_nb.assistant.assistant import Assistant

    assistant = Assistant(open_run(options.run, options.runs_dir), anyway=options.anyway)
    who = ((BASE,) if options.base else (BASE, TUNED)) + ((PROMPTED,) if options.prompted else ())
    _say(assistant.ask(options.question, who=who, **dataclasses.asdict(chosen(options))))


def _evaluate(options: argparse.Namespace) -> None:
    import msgspec

    from bizassist_nb.results.verdict_card import sections
    from bizassist_nb.training.evaluation import evaluate

    run = open_run(options.run, options.runs_dir)
    result = evaluate(run)
    _say(json.dumps(msgspec.to_builtins(result), indent=1) if options.json else "\n\n".join(map(repr, sections(run))))


def _votes(options: argparse.Namespace) -> None:
    from bizassist_nb.results.ballot import export_preferences, tally

    run = open_run(options.run, options.runs_dir)
    _say(tally(run).sentence)
    if options.to:
        _say(f"{export_preferences(run, Path(options.to))} preference pairs in {options.to}")


def _export(options: argparse.Namespace) -> None:
    run = open_run(options.run, options.runs_dir)
    to_stderr = functools.partial(_say, to=sys.stderr)
    _say(run.export(options.to, base=options.base, repo=options.repo, private=options.private, show=to_stderr))


def _data(options: argparse.Namespace) -> None:
    from bizassist_nb.core.rendering import text_table
    from bizassist_nb.data.check import check_source

    words, found = check_source(dataclasses.replace(Settings.from_toml("", options.set), data=options.file))
    _say("\n".join([words, text_table([finding.cells() for finding in found], most=100) if found else "nothing odd"]))


def _models(_: argparse.Namespace) -> None:
    from bizassist_nb.core.rendering import text_table
    from bizassist_nb.models.named import NAMED
    from bizassist_nb.training.preflight import on_t4

    rows = [("name", "on a T4", "licence", "hub id", "why")]
    for name, base in NAMED.items():
        why = base.why + "; its weights untested here" * (not base.tested)
        rows.append((name, f"{on_t4(name):.1f} GiB", base.licence, base.hub, why))
    _say(text_table(rows, most=120))


def _runs(options: argparse.Namespace) -> None:
    from bizassist_nb.results.run_comparison import runs_section

    _say(runs_section(list_runs(options.runs_dir)))


def _doctor(options: argparse.Namespace) -> None:
    from bizassist_nb.training import doctor

    _say(doctor.report(options.runs_dir))


if __name__ == "__main__":
    sys.exit(main())
