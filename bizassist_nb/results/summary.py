"""A run in words and tables: what the cell, the panel, the terminal and the model card say about it."""

import dataclasses
import html
import re
import time
from typing import Any, Final

from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.rendering import duration
from bizassist_nb.data.tokens import MaskedText
from bizassist_nb.results import ballot
from bizassist_nb.results.verdict_card import rising, sections
from bizassist_nb.runs.run import ENDED, RunDirectory

_RECENT: Final = 20
"""Steps over which speed is taken."""
_CELL: Final = "%%finetune"
_DIVERGED: Final = re.compile(r"\bbecame (nan|-?inf)\b")
"""What the error says of a loss or a gradient that is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int
    total: int
    loss: float
    tokens_per_second: float
    seconds_left: float

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return self.step / self.total


def progress(run: RunDirectory) -> Progress | None:
    """How far training is, its speed over the last steps; None before the first step."""
    steps, total = run.steps, run.total_steps
    if not steps or not total:
        return None
    recent = steps[-_RECENT:]
    seconds = sum(step.seconds for step in recent) or 1e-9
    return Progress(
        step=steps[-1].step,
        total=total,
        loss=steps[-1].loss,
        tokens_per_second=sum(step.tokens for step in recent) / seconds,
        seconds_left=(total - steps[-1].step) * seconds / len(recent),
    )


def headline(run: RunDirectory) -> str:
    """Name, status and where it stands, in one line."""
    status, now = run.status, progress(run)
    line = f"{run.name}: {_status_words(run)}"
    if now is None:
        return line
    line += f" · step {now.step}/{now.total} · loss {now.loss:.3f}"
    if held_out := run.held_out:
        line += f" · held-out loss {held_out[-1][1]:.3f}"
    line += f" · {now.tokens_per_second:,.0f} tokens/s"
    return line if status in ENDED or not now.seconds_left else f"{line} · {duration(now.seconds_left)} left"


def facts(run: RunDirectory) -> list[tuple[str, str]]:
    """(what, how it was resolved) for everything decided so far, as label and text."""
    found: list[tuple[str, str]] = []
    if model := run.last("model"):
        found.append(("model", f"{model['name']} ({model['reason']})"))
    if engine := run.last("engine"):
        found.append(("engine", f"{engine['name']} ({engine['reason']})"))
    if processes := run.last("processes"):
        count, rows = processes["count"], run.settings.batch_size
        found.append(("processes", f"{count}, each with {rows // count} of the {rows} examples of a step"))
    if sharded := run.last("sharded"):
        held, whole = (sharded[name] / 2**20 for name in ("held", "whole"))
        found.append(("base", f"sharded: of its {whole:,.1f} MiB each process holds {held:,.1f} (the first)"))
    if data := run.last("data"):
        found.append(("data", _data_words(data)))
    if expected := run.last("preflight"):
        found.append(("expected to take", expected["sentence"]))
    found += [("fit", _fit_words(event)) for event in run.events if event["event"] == "fit"]
    if unscored := [event for event in run.events if event["event"] == "unscored"]:
        after = ", ".join(map(str, sorted({event["step"] for event in unscored})))
        found.append(("held-out rows", f"not scored after step {after}: memory ran out ({unscored[-1]['reason']})"))
    if unread := run.unread:
        found.append(("events.jsonl", f"{unread} lines cannot be read, cut off or damaged, and are passed over"))
    found += _troubles(run)
    if counted := run.last("parameters"):
        share = counted["trainable"] / counted["total"]
        found.append(("trainable parameters", f"{counted['trainable']:,} of {counted['total']:,} ({share:.2%})"))
    return found


def _troubles(run: RunDirectory) -> list[tuple[str, str]]:
    """What could not be read or written on the way, and what was done about it."""
    found = []
    for event in run.events:
        when = time.strftime("%H:%M:%S", time.localtime(event["time"]))
        if event["event"] == "away":
            found.append(("not written", f"from {when} on; what was done was kept on this machine ({event['reason']})"))
        elif event["event"] == "back":
            found.append(("written", f"at {when}: what had been kept on this machine"))
        elif event["event"] == "unsaved":
            found.append(("not saved", f"{event['what']} was not saved ({event['reason']})"))
        elif event["event"] == "damaged":
            found.append(("damaged", f"{event['checkpoint']}: {event['reason']}; the one before it was used"))
    return found


def rejected(run: RunDirectory) -> list[tuple[str, str]]:
    """(row number, reason) of the rows that could not be used."""
    data = run.last("data")
    return [(str(bad["number"]), bad["reason"]) for bad in data["rejected_rows"]] if data else []


def masked_row(run: RunDirectory) -> tuple[int, MaskedText] | None:
    """(number, text) of a training row of median length, with what is learned marked."""
    data = run.last("data")
    if not data:
        return None
    return data["shown"]["number"], MaskedText(tuple((text, learned) for text, learned in data["shown"]["runs"]))


def settings_rows(run: RunDirectory) -> list[tuple[str, str]]:
    """(name, value) of the settings a person looks for first, then of all that differ from their defaults."""
    settings = run.settings
    names = [
        "model",
        "data",
        "subset",
        "held_out",
        "rank",
        "epochs",
        "batch_size",
        "learning_rate",
        "max_length",
        "seed",
    ]
    names += [name for name in settings.changed() if name not in names]
    return [(name, str(getattr(settings, name))) for name in names]


def diverged(run: RunDirectory) -> bool:
    """Whether it failed because of a loss that is no longer a number: resumed, it takes the same steps to the same."""
    error = run.last("error") if run.status == "failed" else None
    return error is not None and bool(_DIVERGED.search(error["message"]))


def how_to_go_on(run: RunDirectory, typed: str = _CELL) -> str | None:
    """What to do next, where that is not plain; `typed` is what stands before a run's name where it is typed."""
    if run.status not in ("stopped", "lost", "failed"):
        return None
    if diverged(run):
        lower = f"a lower learning_rate than {run.settings.learning_rate:g}"
        return f"resumed, it would end in the same way; begin anew under a new name, with {lower}"
    saved = run.last("checkpoint")
    if not saved:
        # Without steps it can be begun anew, with other settings, too: a cell has them, a command line may have had.
        resume = "" if typed == _CELL and not run.steps else " --resume"
        return f"it had no checkpoint yet; begin from the start with: {typed} {run.name}{resume}"
    return f"the checkpoint at step {saved['step']} is kept; go on with: {typed} {run.name} --resume"


def run_text(run: RunDirectory, typed: str = _CELL) -> str:
    """The run as plain text; `typed` as for `how_to_go_on`."""
    if damage := run.damage:
        return printable(f"{headline(run)}\n  {damage}")
    lines = [headline(run), *(f"  {label}: {text}" for label, text in facts(run))]
    lines += [f"  row {number} is not used: {reason}" for number, reason in rejected(run)]
    shown = [section for section in _verdict(run) if not section.folded]
    lines += [f"  {line}" for line in rendering.sections_text(shown).splitlines()]
    if hint := how_to_go_on(run, typed):
        lines.append(f"  {hint}")
    return printable("\n".join(lines))


def run_html(run: RunDirectory) -> str:
    """The run for a notebook, static: it needs neither kernel nor widgets to be seen again."""
    if damage := run.damage:
        return f"<p><b>{html.escape(headline(run))}</b></p><p>⚠ {html.escape(damage)}</p>"
    parts = [f"<p><b>{html.escape(headline(run))}</b></p>"]
    if now := progress(run):
        parts.append(_bar(now.share))
    parts.append(rendering.sections_html(_verdict(run)))
    if hint := how_to_go_on(run):
        parts.append(f"<p>{html.escape(hint)}</p>")
    if error := run.error:
        parts.append(f"<pre>{html.escape(error)}</pre>")
    parts.append(rendering.table([*facts(run), ("settings", "; ".join(f"{k} = {v}" for k, v in settings_rows(run)))]))
    if masked := masked_row(run):
        number, text = masked
        parts.append(f"<details><summary>row {number} as the model reads it; what is learned is marked</summary>")
        parts.append(f"{text._repr_html_()}</details>")
    if bad := rejected(run):
        parts.append(f"<details><summary>rows that cannot be used</summary>{rendering.table(bad)}</details>")
    return "".join(parts)


def _verdict(run: RunDirectory) -> list[rendering.Section]:
    """The verdict card and the votes; before there is a verdict, what training says about held-out loss."""
    words = rising(run)
    early = [rendering.Section("Held-out loss", (words,), (), ())] if words else []
    return [*(sections(run) or early), *ballot.sections(run)]


def _status_words(run: RunDirectory) -> str:
    scored = (run.last("state") or {}).get("who", "base")
    return {
        "starting": "starting",
        "loading": "reading the rows and loading the model",
        "scoring": f"scoring {scored} on held-out and general rows",
        "answering": "answering the fixed prompts as base and as tuned",
        "saving": "saving",
        "lost": "lost (its process is gone)",
        "out of reach": "out of reach (its folder cannot be read; what it does is kept on this machine)",
    }.get(run.status, run.status)


def _data_words(data: dict[str, Any]) -> str:
    training = data["training"]
    words = (
        f"{data['source']}: {training['rows']:,} rows to train on ({training['tokens']:,} tokens, "
        f"{training['trained_tokens']:,} of them learned; a row has {training['median']} in the middle, "
        f"{training['longest']} at most), {data['held_out']['rows']} held out"
    )
    if training["truncated"]:
        words += (
            f"; {training['truncated']} rows ({training['truncated'] / training['rows']:.1%}) are cut at max_length"
        )
    if data["rejected"]:
        words += f"; {data['rejected']} rows cannot be used"
    return words


def _fit_words(fit: dict[str, Any]) -> str:
    rows = "1 row" if fit["micro_batch"] == 1 else f"{fit['micro_batch']} rows"
    when = f"from step {fit['step'] + 1} on " if fit["step"] else ""
    checkpointing = "on" if fit["checkpointing"] else "off"
    if fit["checkpointing"] and fit.get("kept"):
        checkpointing = f"where more than {fit['kept']:,} tokens go through at once"
    return f"{when}{rows} at once, checkpointing {checkpointing}, {fit['precision']} ({fit['reason']})"


def _bar(share: float) -> str:
    return (
        f'<div style="width: 100%; max-width: 640px; background: #8884"><div style="width: {share:.1%}; height: 8px; '
        f'background: #0072B2" role="progressbar" aria-label="training" aria-valuenow="{share:.0%}"></div></div>'
    )
