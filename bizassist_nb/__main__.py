"""The command line: `bizassist`, or `python -m bizassist_nb`."""

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TextIO

from bizassist_nb.api import open_run
from bizassist_nb.core.errors import BizassistError, SettingsError, brief, printable
from bizassist_nb.core.generation import BASE, TUNED, add_options, chosen
from bizassist_nb.core.settings import Settings, reference, user_path
from bizassist_nb.core.versions import own_version
from bizassist_nb.runs.run import ENDED, RunDirectory, list_runs

DEMO: Final = 'data = "sample"\nsubset = 96\nheld_out = 24\nmax_length = 512\nlearning_rate = 1e-3\n'
"""Settings of the demo: a few minutes on two CPU cores."""

_LARGEST: Final = 2**20
"""Bytes of a file of settings."""

DEMO_QUESTION: Final = "We can build only one of three features this quarter. How should we decide?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error of the user's to put right, 130 after an interrupt."""
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
    """Print it, at once; no character in it moves the terminal's cursor or sets its colours."""
    print(printable(str(text)), file=to, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bizassist", description="Fine-tune a small assistant and see whether it helped."
    )
    parser.add_argument("--version", action="version", version=own_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_training(commands)
    _add_asking(commands)
    _add_export(commands)
    for name, text, command in (
        ("runs", "a table of the runs there are", _runs),
        ("doctor", "what this machine has, and what follows from it", _doctor),
    ):
        commands.add_parser(name, help=text).set_defaults(run_command=command)
    for subparser in commands.choices.values():
        subparser.add_argument("--runs-dir", default="runs", help="folder of the runs (default: runs)")
    return parser


def _add_training(commands: Any) -> None:
    finetune = commands.add_parser(
        "finetune",
        help="train a run from a TOML file of settings",
        epilog="settings, with their defaults:\n"
        + "\n".join(f"  {name} = {default}\n      {text}" for name, default, text in reference()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    finetune.add_argument("file", nargs="?", metavar="FILE.toml", help="settings; the defaults without one")
    finetune.add_argument("--name", help="name of the run; made from the data's name without one")
    finetune.add_argument("--resume", action="store_true", help="go on with the run of that name")
    finetune.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, after the file's")
    finetune.set_defaults(run_command=_finetune)

    demo = commands.add_parser("demo", help="fine-tune the embedded model on a CPU and ask it a question")
    demo.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting other than the demo's")
    demo.set_defaults(run_command=_demo)


def _add_asking(commands: Any) -> None:
    ask = commands.add_parser("ask", help="ask base and tuned a question")
    ask.add_argument("run", metavar="RUN")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--base", action="store_true", help="ask the base alone")
    add_options(ask)
    ask.set_defaults(run_command=_ask)

    evaluate = commands.add_parser("evaluate", help="score base and tuned on the held-out rows anew")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("--json", action="store_true", help="print evaluation.json instead of the verdict card")
    evaluate.set_defaults(run_command=_evaluate)

    votes = commands.add_parser("votes", help="what the blind votes on a run come to")
    votes.add_argument("run", metavar="RUN")
    votes.add_argument("--to", metavar="FILE.jsonl", help="write them as preference pairs for TRL's DPO trainer")
    votes.set_defaults(run_command=_votes)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write the merged 16-bit model, or give the adapter away")
    export.add_argument("run", metavar="RUN")
    export.add_argument(
        "--to",
        choices=["merged", "adapter", "hub", "gguf"],
        required=True,
        help="merged: a 16-bit model, compared with the tuned assistant; adapter: its folder, with a model card; "
        "hub: that folder, uploaded; gguf: the merged model as a file for llama.cpp and Ollama, with a Modelfile",
    )
    export.add_argument(
        "--base",
        choices=["trained", "original"],
        default="trained",
        help="with --to merged: into the 4-bit weights that were trained on, or into the 16-bit ones they were made of",
    )
    export.add_argument("--repo", metavar="OWNER/NAME", help="hub repository, with --to hub")
    export.add_argument("--private", action="store_true", help="make the repository private, with --to hub")
    export.set_defaults(run_command=_export)


def _finetune(options: argparse.Namespace) -> None:
    _train(_settings(options, _read(options.file) if options.file else ""), options.name, resume=options.resume)


def _demo(options: argparse.Namespace) -> None:
    from bizassist_nb.assistant.assistant import Assistant

    run = _train(_settings(options, DEMO), None, resume=False)
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


def _train(settings: Settings, name: str | None, *, resume: bool) -> RunDirectory:
    from bizassist_nb.results.summary import headline, run_text
    from bizassist_nb.results.verdict_card import rising
    from bizassist_nb.training.launch import finetune

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

    run = finetune(settings, name, resume=resume, show=show)
    if run.error:  # it would have been raised, but for a second interrupt
        raise KeyboardInterrupt
    return run


def _ask(options: argparse.Namespace) -> None:
    from bizassist_nb.assistant.assistant import Assistant

    generation, run = chosen(options), open_run(options.run, options.runs_dir)
    who = (BASE,) if options.base else (BASE, TUNED)
    _say(list(Assistant(run).stream(options.question, generation, who=who))[-1])


def _evaluate(options: argparse.Namespace) -> None:
    from bizassist_nb.core.rendering import sections_text
    from bizassist_nb.results.verdict_card import sections
    from bizassist_nb.training.evaluation import evaluate

    run = open_run(options.run, options.runs_dir)
    result = evaluate(run)
    _say(json.dumps(result, indent=1) if options.json else sections_text(sections(run)))


def _votes(options: argparse.Namespace) -> None:
    from bizassist_nb.results.ballot import export_preferences, tally

    run = open_run(options.run, options.runs_dir)
    _say(tally(run).sentence)
    if options.to:
        _say(f"{export_preferences(run, Path(options.to))} preference pairs in {options.to}")


def _export(options: argparse.Namespace) -> None:
    run = open_run(options.run, options.runs_dir)
    where = run.export(
        options.to,
        base=options.base,
        repo=options.repo,
        private=options.private,
        show=lambda line: _say(line, to=sys.stderr),
    )
    _say(where)


def _runs(options: argparse.Namespace) -> None:
    from bizassist_nb.results.run_comparison import runs_text

    _say(runs_text(list_runs(options.runs_dir)))


def _doctor(_: argparse.Namespace) -> None:
    from bizassist_nb.training import doctor

    _say(doctor.as_text(doctor.report()))


if __name__ == "__main__":
    sys.exit(main())
