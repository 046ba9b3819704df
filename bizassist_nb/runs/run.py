"""The run directory: what a run is, was and has done, readable by anyone while its worker writes it.

runs/NAME/  settings.toml     as asked for
            environment.json  versions, device, resolved model and engine, fingerprint of the data
            events.jsonl      append-only, one JSON object a line: "time" (seconds since 1970), "event", its fields
            checkpoints/      optimizer, scheduler, random state and adapter, to resume from
            best/             the adapter that scored best while training, where the last one did not
            adapter/          LoRA weights with the tokenizer and its chat template
            merged/           16-bit model, once asked for and compared
            evaluation.json   losses of base and tuned, row by row, counts of their answers' faults, and the verdict
            answers.json      the answers of base and tuned to the fixed prompts
            votes.jsonl       blind votes, one a line (see `bizassist_nb.runs.votes`)
            loss.png  README.md  worker.log  worker.lock
"""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any, Final, Literal, Self, cast

from bizassist_nb.core.errors import RunError, SettingsError, brief
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import EVENTS, is_locked, spool_folder

Status = Literal[
    "starting", "loading", "scoring", "training", "answering", "saving", "finished", "stopped", "failed", "lost",
    "out of reach",
]  # fmt: skip
ENDED: Final[frozenset[Status]] = frozenset({"finished", "stopped", "failed", "lost"})

_TAIL: Final = 64 * 1024
"""Bytes of a log, from its end, that are looked at."""
WORKER: Final = "bizassist_nb.training.worker"
"""The module that a worker is started as, followed by its run's directory."""
SEVERAL: Final = "bizassist_nb.training.distributed.launcher"
"""The module that launches the workers of a run in several processes; it is the one that is stopped and killed."""

_ROOM: Final = 1_000_000
"""Bytes with less of which free a disk is full."""

_BEGUN: Final = ".settings.toml.part"
"""All that is in the directory of a run whose launcher was killed while it made it."""
_NAME: Final = re.compile(r"\w[\w.-]{0,62}\w|\w")


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean over the step's trained tokens, in nats."""
    learning_rate: float
    gradient_norm: float | None
    """Before clipping; None where it overflowed in float16 and the step was skipped."""
    tokens: int
    """Input tokens of the step, without padding."""
    seconds: float
    """From the end of the step before, or from the start of training."""


_STEP_FIELDS: Final = tuple(field.name for field in dataclasses.fields(Step))


class RunDirectory:
    """A run as its directory has it; what is shown is what is on disk now.

    Raises:
        RunError: where the directory holds no run.
    """

    def __init__(self, path: Path):
        """Look at the run in `path`."""
        self.path = path
        if _age(path) is None:
            raise RunError(f"{path} holds no run (it has no settings.toml)")
        self._files: dict[str, tuple[object, Any]] = {}  # what was read from each, and at which state of it
        self._unread = 0
        self._kept = spool_folder(path)
        self._offsets = {path: 0, self._kept: 0}
        self._ahead: set[bytes] = set()  # lines already read from the spool; skipped when they reach the directory
        self._events: list[dict[str, Any]] = []
        self._newest: dict[str, dict[str, Any]] = {}  # of each kind
        self._steps: list[Step] = []
        self._held_out: dict[int, float] = {}

    @classmethod
    def create(cls, path: Path, settings: Settings) -> Self:
        """Make the directory of a new run.

        Raises:
            RunError: if there is a run already that has taken a step, or something else.
        """
        if (path / "settings.toml").is_file():
            run = cls(path)
            if run.status not in ENDED or run.steps:
                raise RunError(
                    f"there is a run {path.name!r} already ({run.status}, {len(run.steps)} steps); "
                    "take another name, or go on with it with --resume"
                )
            shutil.rmtree(path)  # it ended before its first step: there is nothing in it to keep
        elif path.exists() and not (path.is_dir() and {inner.name for inner in path.iterdir()} <= {_BEGUN}):
            raise RunError(f"{path} exists and holds no run; take another name")
        shutil.rmtree(spool_folder(path), ignore_errors=True)  # of a run of that name that was deleted
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "settings.toml", lambda part: part.write_text(settings.to_toml(), "utf-8"))
        return cls(path)

    @classmethod
    def resume(cls, path: Path, settings: Settings) -> Self:
        """The run in that directory, to go on with; `settings` are its own, or none but the folder of runs.

        Raises:
            RunError: if there is none, it has finished, or it was started with other settings.
        """
        if not (path / "settings.toml").is_file():
            raise RunError(f"there is no run {path.name!r} in {path.parent.absolute()} to resume")
        run = cls(path)
        if run.status == "finished":
            raise RunError(f"the run {path.name!r} has finished; there is nothing to resume")
        ours, asked = run.settings.changed(), settings.changed()
        differing = sorted(key for key in ours | asked if ours.get(key) != asked.get(key) and key != "runs_dir")
        if differing and asked.keys() - {"runs_dir"}:
            raise RunError(
                f"the run {path.name!r} was started with other settings ({', '.join(differing)}); resume it with none, "
                "or give a new name to start anew"
            )
        return run

    @property
    def name(self) -> str:
        """Name of the run and of its folder."""
        return self.path.name

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings it was started with; they do not change."""
        try:
            return Settings.from_toml((self.path / "settings.toml").read_text("utf-8"))
        except (OSError, ValueError, SettingsError) as error:
            raise self._unreadable("settings.toml", error) from error

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, device, resolved model and engine, data fingerprint; empty until the worker has written it."""
        return cast("dict[str, Any]", self._json("environment.json", records.ENVIRONMENT) or {})

    @property
    def model(self) -> str:
        """Name of its base model, as the worker resolved it; as it was asked for before that."""
        return str(self.environment.get("model", self.settings.model))

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """Held-out scores of base and tuned and the verdict (see `results.verdict`); None before both exist."""
        return cast("dict[str, Any] | None", self._json("evaluation.json", records.EVALUATION))

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The fixed prompts with the answers of base and tuned (see `results.degeneration`); empty before."""
        return cast("list[dict[str, Any]]", self._json("answers.json", records.ANSWERS) or [])

    def _json(self, name: str, shape: Any) -> Any:
        """What a JSON file of the run holds, read when it has changed; None without one."""
        path = self.path / name
        try:
            state = path.stat()
            now = (state.st_mtime_ns, state.st_size, state.st_ino)
            if self._files.get(name, (None, None))[0] != now:
                self._files[name] = (now, _read_json(path, shape))
        except FileNotFoundError:
            return None
        except (PermissionError, ValueError, RecursionError) as error:
            raise self._unreadable(name, error) from error
        except OSError:  # out of reach: what was known stays known
            pass
        return self._files.get(name, (None, None))[1]

    def _unreadable(self, name: str, error: Exception) -> RunError:
        if isinstance(error, OSError):
            return RunError(
                f"{self.path / name} cannot be read ({brief(error)}); see that its folder is there and may be read"
            )
        what = "; ".join(error.problems) if isinstance(error, SettingsError) else str(error)
        again = name in ("evaluation.json", "answers.json")
        remedy = f"make it anew with: bizassist evaluate {self.name}" if again else "put it back from a copy of the run"
        return RunError(
            f"the run {self.name!r} is damaged: {self.path / name} is not what it was ({what}); "
            f"{remedy}, or delete the run's folder"
        )

    @property
    def damage(self) -> str | None:
        """What in its directory cannot be read, and what to do about it; None if all can."""
        try:
            check_name(self.name)
            _ = self.settings, self.environment, self.evaluation, self.answers, self.events
        except RunError as error:
            return str(error)
        return None

    @property
    def unread(self) -> int:
        """Lines of events.jsonl that were passed over: cut off by a kill, or damaged."""
        self._read()
        return self._unread

    @property
    def adapter(self) -> Path | None:
        """Folder of the trained adapter, if it has been saved."""
        folder = self.path / "adapter"
        return folder if (folder / "adapter_config.json").is_file() else None

    @property
    def events(self) -> list[dict[str, Any]]:
        """All events so far. A line still being written is left for later, one that a kill cut off is passed over."""
        self._read()
        return self._events

    def _read(self) -> None:
        """Take in what has been written since the last time: in its directory, and while that is away, beside it."""
        for line in self._new_lines(self.path):
            if line not in self._ahead:
                self._take_line(line)
        if kept := self._new_lines(self._kept):
            delivered = self._delivered()
            for line in kept:
                if line not in delivered:
                    self._ahead.add(line)
                    self._take_line(line)

    def _delivered(self) -> set[bytes]:
        try:
            return set(_lines_of(self.path, 0)[0])
        except OSError:
            return set()

    def _new_lines(self, folder: Path) -> list[bytes]:
        try:
            lines, self._offsets[folder] = _lines_of(folder, self._offsets[folder])
        except FileNotFoundError:
            if folder == self._kept:  # delivered; what is kept there another time is another file
                self._offsets[folder] = 0
            return []
        except OSError:  # out of reach
            return []
        return lines

    def _take_line(self, line: bytes) -> None:
        if (event := _parse_event(line)) is not None:
            self._take(event)
        else:
            self._unread += bool(line.strip())

    def _take(self, event: dict[str, Any]) -> None:
        """Fold one event into what is known: looking at a long run again costs only what is new."""
        kind = event["event"]
        self._events.append(event)
        self._newest[kind] = event
        if kind == "resumed":
            self._steps = [step for step in self._steps if step.step <= event["step"]]
            self._held_out = {step: loss for step, loss in self._held_out.items() if step <= event["step"]}
        elif kind == "step":
            self._steps.append(Step(**{name: event[name] for name in _STEP_FIELDS}))
        elif kind == "evaluation":
            self._held_out[event["step"]] = event["loss"]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The newest event of that kind."""
        self._read()
        return self._newest.get(kind)

    @property
    def steps(self) -> list[Step]:
        """The steps that count: where a run was resumed, those done again replace those done before."""
        self._read()
        return list(self._steps)

    @property
    def held_out(self) -> list[tuple[int, float]]:
        """(step, held-out loss in nats an answer token), the base's at step 0 first; like steps, those that count."""
        self._read()
        return sorted(self._held_out.items())

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run, once the rows have been read."""
        plan = self.last("plan")
        return plan["steps"] if plan else None

    @property
    def status(self) -> Status:
        """What it is doing; "lost" if its worker went away without a word.

        "out of reach" where its folder cannot be read (a Drive that has dropped): a worker goes on without it.
        """
        if not self._in_reach():
            return "out of reach"
        alive = is_locked(self.path)
        state = self.last("state")  # read after the lock: what a worker wrote before it ended is then seen
        status = cast("Status", state["state"] if state else "starting")
        return status if alive or status in ENDED else "lost"

    @property
    def alive(self) -> bool:
        """Whether a worker of it lives."""
        return is_locked(self.path) if self._in_reach() else bool(self._workers())

    def _in_reach(self) -> bool:
        return _age(self.path) is not None

    @property
    def error(self) -> str | None:
        """Why it failed or was lost, with the last lines of its log; None if it did neither."""
        status = self.status
        if status == "out of reach":
            return (
                f"{self.path} cannot be read. A worker goes on without it, and what it does is kept on this machine, "
                f"in {self._kept}; bring the folder back (mount the Drive again)"
            )
        if status not in ("failed", "lost"):
            return None
        event = self.last("error") if status == "failed" else None
        reason = event["message"] if event else self._lost()
        if event and event["expected"]:
            return str(reason)
        log = "\n".join(f"    {line}" for line in self.log(12))
        return f"{reason}\nThe end of {self.path / 'worker.log'}:\n{log}"

    def _lost(self) -> str:
        free = shutil.disk_usage(self.path).free
        if free < _ROOM:
            return f"its process ended without a word, and its disk is full ({free:,} bytes are free): make room there"
        return "its process ended without a word (killed, or out of memory)"

    def log(self, lines: int) -> list[str]:
        """The last lines that the worker's libraries printed."""
        try:
            with (self.path / "worker.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                return file.read().decode("utf-8", "replace").splitlines()[-lines:]
        except OSError:  # not there yet, or out of reach
            return []

    def stop(self) -> None:
        """Ask the worker to finish its step, save a checkpoint and end; nothing happens if it has ended."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the worker at once, and every process it started."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        send = os.killpg if number is signal.SIGKILL else os.kill
        if not self._in_reach():
            for pid in self._workers():
                send(pid, number)
            return
        # The lock is held by that very process as long as it lives, so the number cannot be another's by now.
        while is_locked(self.path):
            if worker := (self.path / "worker.lock").read_text():
                send(int(worker), number)
                return
            time.sleep(0.01)  # it is being started; its number is there in a moment

    def _workers(self) -> list[int]:
        """Process ids of its workers, found by their command lines: while its folder is away, so is the lock in it."""
        import psutil

        found = [(process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        for module in (SEVERAL, WORKER):
            command = [module, str(self.path.absolute())]
            if workers := [pid for pid, line in found if line[-2:] == command]:
                return workers
        return []

    def __repr__(self) -> str:
        """Name and status."""
        return f"<Run {self.name}: {self.status}>"


def check_name(name: str) -> str:
    """The name, if it is fit to be a folder's.

    Raises:
        RunError: if it is not.
    """
    if not _NAME.fullmatch(name) or len(name.encode()) > 255:  # bytes a folder's name may have
        raise RunError(
            f"{name!r} cannot be the name of a run: take up to 64 letters, digits, '.', '-' and '_', "
            "beginning and ending with a letter, digit or '_'"
        )
    return name


def free_name(settings: Settings) -> str:
    """A name, made from the data's, that no run in the folder has."""
    stem = re.sub(r"[^\w.-]+", "-", Path(settings.data).stem)[:50].strip(".-") or "run"
    number = 1
    while settings.run_path(f"{stem}-{number}").exists():
        number += 1
    return f"{stem}-{number}"


def open_run(name: str, runs_dir: str | Path = "runs") -> RunDirectory:
    """The run of that name.

    Raises:
        RunError: if there is none; the message lists those there are.
    """
    path = user_path(runs_dir) / check_name(name)
    if _age(path) is None:
        known = ", ".join(run.name for run in list_runs(runs_dir)) or "none yet"
        raise RunError(f"there is no run {name!r} in {Path(runs_dir).absolute()}; the runs there: {known}")
    return RunDirectory(path)


def list_runs(runs_dir: str | Path = "runs") -> list[RunDirectory]:
    """All runs in that folder, oldest first, damaged ones too; none if there is no such folder.

    Raises:
        RunError: if it cannot be read.
    """
    folder = user_path(runs_dir)
    try:
        paths = list(folder.iterdir())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RunError(f"the folder of runs {folder} cannot be read ({brief(error)}); name another") from error
    made = {path: age for path in paths if (age := _age(path)) is not None}
    return [RunDirectory(path) for path in sorted(made, key=lambda path: _first_time(path) or made[path])]


def _first_time(path: Path) -> float | None:
    """When its first event was written, which a copy of the run keeps, unlike its files' times; None before that."""
    try:
        with (path / EVENTS).open("rb") as file:
            first = _parse_event(file.readline(_TAIL))
    except OSError:  # not there yet, or out of reach
        return None
    return first["time"] if first else None


def _age(path: Path) -> float | None:
    """When the settings in that folder were written; None where no run is, or where it may not be looked for."""
    try:
        found = (path / "settings.toml").stat()
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None


def _read_json(path: Path, shape: Any) -> Any:
    value = json.loads(path.read_text("utf-8"))
    if wrong := records.misfit(value, shape):
        raise ValueError(wrong)
    return value


def _lines_of(folder: Path, offset: int) -> tuple[list[bytes], int]:
    """(whole lines of its events from that byte on, the byte behind them)."""
    with (folder / EVENTS).open("rb") as file:
        file.seek(offset)
        whole, newline, _ = file.read().rpartition(b"\n")
    return whole.splitlines(), offset + len(whole) + len(newline)


def _parse_event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # also the half of a character that a cut leaves
        return None
    if records.misfit(event, {"event": str, "time": float}):
        return None
    return None if records.misfit(event, records.EVENTS.get(event["event"], {})) else event
