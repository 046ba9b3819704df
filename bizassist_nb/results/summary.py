"""A run in words and tables, for the cell, the panel, the terminal and the model card."""

import dataclasses
import html
import itertools
import re
import time
from typing import Final

from bizassist_nb.core import rendering
from bizassist_nb.core.errors import printable
from bizassist_nb.core.rendering import Section, duration
from bizassist_nb.core.terms import explain
from bizassist_nb.data.tokens import MaskedText
from bizassist_nb.results.ballot import tally
from bizassist_nb.results.verdict_card import rising, sections
from bizassist_nb.runs import records
from bizassist_nb.runs.run import ENDED, RunDirectory

_RECENT: Final = 20
"""Steps over which speed is taken."""
_MAIN: Final = (
    "model", "data", "subset", "held_out", "rank", "epochs", "batch_size", "learning_rate", "max_length", "seed",
)  # fmt: skip
"""The settings that are always shown."""
_CELL: Final = "%%finetune"
_DIVERGED: Final = re.compile(r"\bbecame (nan|-?inf)\b")
"""Found in the error of a run whose loss or gradient is no longer a number."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is; the seconds left are those of training."""

    step: int
    total: int
    loss: float
    tokens_per_second: float
    seconds_left: float


def progress(run: RunDirectory) -> Progress | None:
    """How far training is, and its speed over the last steps; None before the first step."""
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
    """Name, status and progress, in one line."""
    now = progress(run)
    line = f"{run.name}: {status_words(run)}"
    if now is None:
        return line
    line += f" · step {now.step}/{now.total} · loss {now.loss:.3f}"
    if held_out := run.held_out:
        line += f" · held-out loss {held_out[-1][1]:.3f}"
    line += f" · {now.tokens_per_second:,.0f} tokens/s"
    training = run.status == "training" and now.seconds_left  # resumed, it loads and scores before it trains on
    return f"{line} · {duration(now.seconds_left)} of training left" if training else line


def elapsed(run: RunDirectory) -> str:
    """The time that a run at work has taken for its phase, and since it was started; empty for one that has ended."""
    states = _states(run)
    if run.status in ENDED or not states:
        return ""
    now = time.time()
    return f"for {duration(now - states[-1].time)}, {duration(now - states[0].time)} since its start"


def phases(run: RunDirectory) -> dict[str, float]:
    """Seconds of each phase since it was last started; of training, those beside its steps (scores, checkpoints)."""
    states, found = _states(run), dict[str, float]()
    for state, following in itertools.pairwise(states):
        found[state.state] = found.get(state.state, 0.0) + max(0.0, following.time - state.time)
    if "training" in found:
        steps = sum(step.seconds for step in run.steps if step.time >= states[0].time)
        found["training"] = max(0.0, found["training"] - steps)
    return found


def _states(run: RunDirectory) -> list[records.State]:
    """Its states since it was last started."""
    states = run.every(records.State)
    starts = [number for number, state in enumerate(states) if state.state == "starting"]
    return states[starts[-1] if starts else 0 :]


def facts(run: RunDirectory) -> list[tuple[str, str]]:
    """(label, text) of everything that has been decided so far."""
    chosen = {"model": run.last(records.Model), "engine": run.last(records.Engine)}
    found = [(what, f"{event.name} ({event.reason})") for what, event in chosen.items() if event]
    if processes := run.last(records.Processes):
        count, rows = processes.count, run.settings.batch_size
        found.append(("processes", f"{count}, each with {rows // count} of the {rows} examples of a step"))
    if sharded := run.last(records.Sharded):
        shard, whole = sharded.shard / 2**20, sharded.whole / 2**20
        found.append(("base", f"sharded: of its {whole:,.1f} MiB each process holds {shard:,.1f} (the first)"))
    if data := run.last(records.Data):
        found.append(("data", _data_words(data)))
        found += [("⚠ rows", warning) for warning in data.warnings]
    if expected := run.last(records.Preflight):
        found.append(("expected to take", expected.sentence))
    if telling := run.last(records.Power):
        found.append(("what it can show", telling.sentence))
    if rate := run.last(records.Rate):
        found.append(("learning rate", f"{rate.learning_rate:g} ({rate.reason})"))
    rise, total = run.settings.warmup_steps, run.total_steps
    if isinstance(rise, int) and total and rise > total:
        words = f"still rises at the last of the {total} steps: warmup_steps = {rise} is more than there are"
        found.append(("learning rate", words))
    found += [("how a step is cut", _fit_words(fit)) for fit in run.every(records.Fit)]
    if ended := run.last(records.Ended):
        lowest = f"the loss on the validation rows was lowest after step {ended.best}"
        found.append(("ended early", f"after step {ended.step} of {total}: {lowest}"))
    if unscored := run.every(records.Unscored):
        after = ", ".join(map(str, sorted({event.step for event in unscored})))
        found.append(("held-out rows", f"not scored after step {after}: memory ran out ({unscored[-1].reason})"))
    if unread := run.unread:
        found.append(("events.jsonl", f"{unread} damaged lines are left out"))
    found += _troubles(run)
    if counted := run.last(records.Parameters):
        share = counted.trainable / counted.total
        found.append(("trainable parameters", f"{counted.trainable:,} of {counted.total:,} ({share:.2%})"))
    return found


def _troubles(run: RunDirectory) -> list[tuple[str, str]]:
    """What could not be read or written, and what was done about it."""
    found = []
    kinds = (records.Away, records.Back, records.Unsaved, records.Damaged)
    for event in sorted((event for kind in kinds for event in run.every(kind)), key=lambda event: event.time):
        when = time.strftime("%H:%M:%S", time.localtime(event.time))
        match event:
            case records.Away():
                found.append(("not written", f"from {when} on; it is saved on this machine for now ({event.reason})"))
            case records.Back():
                found.append(("written", f"at {when}: what had been saved on this machine"))
            case records.Unsaved():
                found.append(("not saved", f"{event.what} was not saved ({event.reason})"))
            case records.Damaged():
                found.append(("damaged", f"{event.checkpoint}: {event.reason}; {event.instead}"))
    return found


def rejected(run: RunDirectory) -> list[tuple[str, str]]:
    """(row number, reason) of the rows that cannot be used."""
    data = run.last(records.Data)
    return [(str(bad.number), bad.reason) for bad in data.rejected_rows] if data else []


def settings_rows(run: RunDirectory) -> list[tuple[str, str]]:
    """(name, value) of the main settings, then of all others that differ from their defaults."""
    names = dict.fromkeys([*_MAIN, *run.settings.changed()])
    resolved = {"learning_rate": run.learning_rate}
    return [(name, str(resolved.get(name, getattr(run.settings, name)))) for name in names]


def diverged(run: RunDirectory) -> bool:
    """Whether it failed because its loss is no longer a number: if resumed, it would do so again."""
    error = run.last(records.Error) if run.status == "failed" else None
    return error is not None and bool(_DIVERGED.search(error.message))


def how_to_go_on(run: RunDirectory, typed: str = _CELL) -> str | None:
    """How a run that stopped or failed goes on; `typed` is the command before the run's name."""
    if run.status not in ("stopped", "lost", "failed"):
        return None
    if diverged(run):
        lower = f"a lower learning_rate than {run.learning_rate}"
        return f"if resumed, it would fail again; begin anew under a new name, with {lower}"
    saved = run.last(records.Checkpoint)
    if not saved:
        # A run without steps can be begun anew. A cell has its settings in it; a command line may not, so it resumes.
        resume = "" if typed == _CELL and not run.steps else " --resume"
        return f"it had no checkpoint yet; begin from the start with: {typed} {run.name}{resume}"
    return f"the checkpoint at step {saved.step} is kept; go on with: {typed} {run.name} --resume"


def run_text(run: RunDirectory, typed: str = _CELL) -> str:
    """The run as plain text; `typed` as for `how_to_go_on`."""
    if damage := run.damage:
        return printable(f"{headline(run)}\n  {damage}")
    lines = [headline(run), *(f"  {label}: {text}" for label, text in facts(run))]
    lines += [f"  row {number} is not used: {reason}" for number, reason in rejected(run)]
    shown = "\n\n".join(repr(section) for section in _verdict(run) if not section.folded)
    lines += [f"  {line}" for line in shown.splitlines()]
    if hint := how_to_go_on(run, typed):
        lines.append(f"  {hint}")
    return printable("\n".join(lines))


def facts_html(run: RunDirectory) -> str:
    """The table of its facts and settings."""
    return explain(rendering.table([*facts(run), ("settings", "; ".join(f"{k} = {v}" for k, v in settings_rows(run)))]))


def run_html(run: RunDirectory) -> str:
    """The run as static HTML, which a saved notebook shows without a kernel or widgets."""
    so_long = f" ({since})" if (since := elapsed(run)) else ""
    parts = [f"<p><b>{html.escape(headline(run))}</b>{so_long}</p>"]
    if damage := run.damage:
        return rendering.untypeset(f"{parts[0]}<p>⚠ {html.escape(damage)}</p>")
    if now := progress(run):
        parts.append(rendering.bar(now.step / now.total))
    parts += [section.page() for section in _verdict(run)]
    if hint := how_to_go_on(run):
        parts.append(f"<p>{html.escape(hint)}</p>")
    if error := run.error:
        parts.append(f"<pre>{html.escape(error)}</pre>")
    parts = [explain("".join(parts)), facts_html(run)]
    if data := run.last(records.Data):  # it shows a training row of median length
        number, text = data.shown.number, MaskedText(tuple(data.shown.runs))
        title = f"row {number} as the model reads it; what is learned is marked"
        parts.append(f"<details><summary>{title}</summary>{text._repr_html_()}</details>")
    if bad := rejected(run):
        parts.append(Section("rows that cannot be used", rows=bad, folded=True).page())
    return rendering.untypeset("".join(parts))


def _verdict(run: RunDirectory) -> list[Section]:
    """The verdict card; before there is a verdict, whether held-out loss rises, and the votes."""
    words = rising(run)
    early = [Section("Held-out loss", (words,))] if words else []
    votes = tally(run)
    early += [Section("Blind votes", (votes.sentence,))] if votes.cast else []
    return sections(run) or early


def status_words(run: RunDirectory) -> str:
    """What the run is doing, or how it ended."""
    if run.stopping:
        return "stopping: it finishes its step, saves and ends; asked again, it ends at once, without saving"
    state = run.last(records.State)
    return {
        "loading": "reading the rows and loading the model",
        "scoring": "measuring base on rows kept out of training"
        if not state or state.who == "base"
        else "measuring base and tuned on rows kept out of training and on general questions",
        "answering": "answering the fixed prompts as base and as tuned",
        "lost": "ended at once, as asked" if run.killed else "lost (its process is gone)",
        "out of reach": "out of reach (its folder cannot be read; what it does is saved on this machine)",
    }.get(run.status, run.status)


def _data_words(data: records.Data) -> str:
    training = data.training
    words = (
        f"{data.source}: {training.rows:,} rows to train on ({training.tokens:,} tokens, "
        f"{training.trained_tokens:,} of them learned; tokens a row: median {training.median}, "
        f"most {training.longest}), {data.held_out.rows} held out"
    )
    if data.validation:
        words += f" ({data.validation} for validation, the others for the test)"
    if training.truncated:
        words += f"; {training.truncated} rows ({training.truncated / training.rows:.1%}) are cut at max_length"
    if data.rejected:
        words += f"; {data.rejected} rows cannot be used"
    return words


def _fit_words(fit: records.Fit) -> str:
    rows = "1 row" if fit.micro_batch == 1 else f"{fit.micro_batch} rows"
    when = f"from step {fit.step + 1} on " if fit.step else ""
    checkpointing = "on" if fit.checkpointing else "off"
    if fit.checkpointing and fit.checkpoint_above:
        checkpointing = f"where more than {fit.checkpoint_above:,} tokens go through at once"
    return f"{when}{rows} at once, checkpointing {checkpointing}, {fit.precision} ({fit.reason})"
