"""The run directory: what a run is, was and has done, readable by anyone while its worker writes it.

runs/NAME/  settings.toml     as asked for
            data.parquet      the rows, where they were a table in a notebook
            environment.json  versions, device, resolved model and engine, fingerprint of the data
            events.jsonl      append-only, one JSON object a line: "time" (seconds since 1970), "event", its fields
            checkpoints/      optimizer, scheduler, random state and adapter, to resume from
            best/             the adapter that scored best while training, where the last one did not
            adapter/          LoRA weights with the tokenizer and its chat template
            merged/           16-bit model, once asked for and compared
            evaluation.json   losses of base and tuned, row by row, counts of their answers' faults, and the verdict
            answers.json      the answers of base and tuned to the fixed prompts
            votes.jsonl       blind votes, one a line (see `bizassist_nb.results.ballot`)
            heartbeat.json    the machine that trains it, with the time, twice a minute
            note.txt          what a person has noted about it
            loss.png  verdict.png  README.md  worker.log  worker.lock
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import shutil
import signal
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar, cast

from bizassist_nb.core.errors import RunError, SettingsError, brief
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.settings import Settings, user_path
from bizassist_nb.data.sources import KEPT
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import EVENTS, Journal, elsewhere, is_locked, spool_folder, take_lock

Status = Literal[
    "starting", "loading", "scoring", "training", "answering", "saving", "finished", "stopped", "failed", "lost",
    "out of reach",
]  # fmt: skip
NOTE: Final = "note.txt"
ENDED: Final[frozenset[Status]] = frozenset({"finished", "stopped", "failed", "lost"})

_TAIL: Final = 64 * 1024
"""Bytes of a log, from its end, that are looked at."""
WORKER: Final = "bizassist_nb.training.worker"
"""The module that a worker is started as, followed by its run's directory."""
SEVERAL: Final = "bizassist_nb.training.distributed.launcher"
"""The module that launches the workers of a run in several processes; it is the one that is stopped and killed."""

_ROOM: Final = 1_000_000
"""A disk with fewer free bytes than this is full."""

_BEGUN: Final = {".settings.toml.part", KEPT, f".{KEPT}.part"}
"""All that may be in the directory of a run whose launcher was killed while it made it."""
_BLANK: Final = records.Environment(model="", data="", fingerprint="", device="", python="", versions={})
_NAME: Final = re.compile(r"\w[\w.-]{0,62}\w|\w")


T = TypeVar("T")
E = TypeVar("E", bound=records.Event)


class RunDirectory:
    """A run, read from its directory; every property is what is on the disk now.

    Raises:
        RunError: where the directory holds no run.
    """

    def __init__(self, path: Path):
        """Look at the run in `path`."""
        self.path, self.name = path, path.name
        if _age(path) is None:
            raise RunError(f"{path} holds no run (it has no settings.toml)")
        self._files: dict[str, tuple[object, Any]] = {}  # what was read from each, and at which state of it
        self._unread = 0
        self._spool = spool_folder(path)
        self._offsets = {path: 0, self._spool: 0}
        self._seen: set[int] = set()  # hashes of the lines read: what was spooled comes again when it is delivered
        self._events: list[records.Event] = []
        self._by_kind: defaultdict[type[records.Event], list[records.Event]] = defaultdict(list)
        self._steps: list[records.Step] = []
        self._held_out: dict[int, float] = {}

    @classmethod
    def create(cls, path: Path, settings: Settings, *, replace: bool = False, kept: Path | None = None) -> Self:
        """Make the directory of a new run, with a copy of `kept`, the Parquet file of a table in a notebook.

        An older run of that name is moved to the bin if it has no contents, or with `replace`.

        Raises:
            RunError: if there is another run already, it is being trained, or there is something else.
        """
        if (path / "settings.toml").is_file():
            run = cls(path)
            contents = run.contents()
            if contents and not replace:
                raise RunError(
                    f"there is a run {path.name!r} already ({run.status}, with {', '.join(contents)}); take another "
                    "name, go on with it with --resume, or move it to the bin with --replace"
                )
            run.move_to_bin()
        elif path.exists() and not (path.is_dir() and {inner.name for inner in path.iterdir()} <= _BEGUN):
            raise RunError(f"{path} exists and holds no run; take another name")
        shutil.rmtree(spool_folder(path), ignore_errors=True)  # of a run of that name that was deleted
        path.mkdir(parents=True, exist_ok=True)
        if kept:
            write_atomic(path / KEPT, lambda part: shutil.copyfile(kept, part))
        write_atomic(path / "settings.toml", lambda part: part.write_text(settings.rooted().to_toml(), "utf-8"))
        return cls(path)

    @classmethod
    def resume(cls, path: Path, settings: Settings) -> Self:
        """The run in that directory, to go on with; `settings` are its own, or the defaults with its `runs_dir`.

        Raises:
            RunError: if there is none, it has finished, or it was started with other settings.
        """
        if not (path / "settings.toml").is_file():
            raise RunError(f"there is no run {path.name!r} in {path.parent.absolute()} to resume")
        run = cls(path)
        if run.status == "finished":
            raise RunError(f"the run {path.name!r} has finished; there is nothing to resume")
        ours, asked = run.settings.rooted().changed(), settings.rooted().changed()
        if (run.settings.learning_rate, settings.learning_rate) == (2e-4, "auto"):  # 2e-4 was the default once
            del ours["learning_rate"]
        differing = sorted(key for key in ours | asked if ours.get(key) != asked.get(key) and key != "runs_dir")
        if differing and asked.keys() - {"runs_dir"}:
            raise RunError(
                f"the run {path.name!r} was started with other settings ({', '.join(differing)}); resume it with none, "
                "or give a new name to start anew"
            )
        return run

    def contents(self) -> list[str]:
        """What is in it that training or a person made, in words; empty for a run that has only begun."""
        found = [f"{len(self.steps)} steps"] if self.steps else []
        try:
            (self.path / EVENTS).read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            found.append(f"events that cannot be read: {brief(error)}")
        for pattern in ("adapter", "best", "checkpoints/*", "merged", "*.gguf", "evaluation.json", "votes.jsonl"):
            found += [str(path.relative_to(self.path)) for path in sorted(self.path.glob(pattern))]
        return found

    def move_to_bin(self) -> Path:
        """Move it into the folder .bin beside it, from where `move` takes it back; the new path.

        Raises:
            RunError: if it is being trained.
        """
        (self.path.parent / ".bin").mkdir(exist_ok=True)
        target = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.path.parent / ".bin"))
        return self.move(target)

    def move(self, target: Path) -> Path:
        """Move it, and what was spooled of it, to a path where nothing is; that path.

        Raises:
            RunError: if it is being trained, or if something is there.
        """
        lock = take_lock(self.path)
        try:
            if target.is_dir() and any(target.iterdir()):
                raise RunError(f"{target} is there already; take another name")
            self.path.rename(target)
            if spool_folder(self.path).is_dir():
                shutil.move(spool_folder(self.path), spool_folder(target))
        finally:
            os.close(lock)
        return target

    @property
    def note(self) -> str:
        """What a person has noted about it."""
        try:
            return (self.path / NOTE).read_text("utf-8", "replace")
        except OSError:  # there is none, or it is out of reach
            return ""

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings it was started with; they do not change."""
        try:
            return Settings.from_toml((self.path / "settings.toml").read_text("utf-8"))
        except (OSError, ValueError, SettingsError) as error:
            raise self._unreadable("settings.toml", error) from error

    @property
    def environment(self) -> records.Environment:
        """Versions, device, resolved model and engine, data fingerprint; blank until the worker has written it."""
        return self._json("environment.json", records.Environment) or _BLANK

    @property
    def model(self) -> str:
        """Name of its base model, as the worker resolved it; as it was asked for before that."""
        return self.environment.model or self.settings.model

    @property
    def learning_rate(self) -> float | str:
        """Its peak learning rate, as the worker resolved it; as it was asked for before that."""
        rate = self.last(records.Rate)
        return rate.learning_rate if rate else self.settings.learning_rate

    @property
    def resolved(self) -> Settings:
        """Its settings, with the base that the worker found for `model`."""
        return dataclasses.replace(self.settings, model=self.model)

    @property
    def evaluation(self) -> records.Result | None:
        """Held-out scores of base and tuned and the verdict; None before both exist."""
        return self._json("evaluation.json", records.Result)

    @property
    def answers(self) -> list[records.Answers]:
        """The fixed prompts with the answers of base and tuned; empty before."""
        return self._json("answers.json", list[records.Answers]) or []

    def _json(self, name: str, kind: type[T]) -> T | None:
        """What a JSON file of the run holds, read when it has changed; None without one."""
        path = self.path / name
        try:
            state = path.stat()
            now = (state.st_mtime_ns, state.st_size, state.st_ino)
            if self._files.get(name, (None, None))[0] != now:
                self._files[name] = (now, records.decode(path.read_bytes(), kind))
        except FileNotFoundError:
            return None
        except (PermissionError, ValueError) as error:
            raise self._unreadable(name, error) from error
        except OSError:  # out of reach: what was known stays known
            pass
        return cast("T | None", self._files.get(name, (None, None))[1])

    def _unreadable(self, name: str, error: Exception) -> RunError:
        path = self.path / name
        if isinstance(error, OSError):
            return RunError(f"{path} cannot be read ({brief(error)}); see that its folder is there and may be read")
        what = "; ".join(error.problems) if isinstance(error, SettingsError) else str(error)
        again = name in ("evaluation.json", "answers.json")
        remedy = f"make it anew with: bizassist evaluate {self.name}" if again else "put it back from a copy of the run"
        return RunError(
            f"the run {self.name!r} is damaged: {path} is not what it was ({what}); {remedy}, or delete its folder"
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
    def events(self) -> list[records.Event]:
        """All events so far. A line still being written is left for later, one that a kill cut off is passed over."""
        self._read()
        return self._events

    def _read(self) -> None:
        """Read the new events in its directory and, while that cannot be reached, in the spool."""
        for folder in (self.path, self._spool):
            for line in self._new_lines(folder):
                if hash(line) in self._seen or not line.strip():
                    continue
                self._seen.add(hash(line))
                try:
                    event = records.parse_event(line)
                except ValueError:  # also the half of a character that a cut leaves
                    self._unread += 1
                else:
                    if event:
                        self._take(event)

    def _new_lines(self, folder: Path) -> list[bytes]:
        """Whole lines of its events that have not been read yet."""
        try:
            with (folder / EVENTS).open("rb") as file:
                file.seek(self._offsets[folder])
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # out of reach, or a spool that was delivered: what is there another time may be another file
            self._offsets[folder] = 0
            return []
        self._offsets[folder] += len(whole) + len(newline)
        return whole.splitlines()

    def _take(self, event: records.Event) -> None:
        """Fold one event into what is known: looking at a long run again costs only what is new."""
        self._events.append(event)
        self._by_kind[type(event)].append(event)
        if isinstance(event, records.Resumed):
            self._steps = [step for step in self._steps if step.step <= event.step]
            self._held_out = {step: loss for step, loss in self._held_out.items() if step <= event.step}
        elif isinstance(event, records.Step):
            self._steps.append(event)
        elif isinstance(event, records.Evaluation):
            self._held_out[event.step] = event.loss

    def every(self, kind: type[E]) -> list[E]:
        """The events of that kind, the oldest first."""
        self._read()
        return cast("list[E]", self._by_kind[kind])

    def last(self, kind: type[E]) -> E | None:
        """The newest event of that kind."""
        events = self.every(kind)
        return events[-1] if events else None

    @property
    def steps(self) -> list[records.Step]:
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
        plan = self.last(records.Plan)
        return plan.steps if plan else None

    @property
    def status(self) -> Status:
        """What it is doing; "lost" if its worker ended without writing why.

        "out of reach" where its folder cannot be read (a Drive that has dropped): a worker goes on without it.
        """
        if not self._in_reach():
            return "out of reach"
        alive = self.alive
        state = self.last(records.State)  # read after the lock: what a worker wrote before it ended is then seen
        status = cast("Status", state.state if state else "starting")
        return status if alive or status in ENDED else "lost"

    @property
    def alive(self) -> bool:
        """Whether a worker of it lives, here or on another machine."""
        if not self._in_reach():
            return bool(self.workers())
        return is_locked(self.path) or self.elsewhere is not None

    @property
    def elsewhere(self) -> str | None:
        """Name of the other machine that trains it, if one does."""
        other = elsewhere(self.path)
        return other.host if other else None

    def _in_reach(self) -> bool:
        return _age(self.path) is not None

    @property
    def error(self) -> str | None:
        """Why it failed or was lost, with the last lines of its log; None if it did neither."""
        status = self.status
        if status == "out of reach":
            return (
                f"{self.path} cannot be read. A worker goes on without it, and what it does is saved on this machine, "
                f"in {self._spool}; bring the folder back (mount the Drive again)"
            )
        if status not in ("failed", "lost"):
            return None
        if status == "failed" and (event := self.last(records.Error)):
            if event.expected:
                return event.message
            reason = event.message
        elif self.killed:
            reason = "it was ended at once, as somebody asked"
        elif (free := shutil.disk_usage(self.path).free) < _ROOM:
            reason = f"its process ended without a word, and its disk is full ({free:,} bytes free): make room there"
        else:
            reason = "its process ended without a word (killed, or out of memory)"
        log = "\n".join(f"    {line}" for line in self.log(12))
        return f"{reason}\nThe end of {self.path / 'worker.log'}:\n{log}"

    @property
    def over(self) -> bool:
        """Whether it has ended and its worker is gone: only then can it be resumed."""
        return self.status in ENDED and not self.alive

    @property
    def stopping(self) -> bool:
        """Whether it was asked to stop and has not ended yet."""
        starts = [state.time for state in self.every(records.State) if state.state == "starting"]
        asked = self.last(records.Stopping)
        return self.status not in ENDED and asked is not None and asked.time >= max(starts, default=0.0)

    @property
    def killed(self) -> bool:
        """Whether the last that happened to it is that a person had it ended at once."""
        killed, state = self.last(records.Killed), self.last(records.State)
        return killed is not None and (state is None or killed.time >= state.time)

    def log(self, lines: int) -> list[str]:
        """The last lines that the worker's libraries printed."""
        try:
            with (self.path / "worker.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                return file.read().decode("utf-8", "replace").splitlines()[-lines:]
        except OSError:  # not there yet, or out of reach
            return []

    def stop(self) -> None:
        """Ask the worker to finish its step, save a checkpoint and end; nothing happens if it has ended.

        Raises:
            RunError: if it is on another machine.
        """
        self._end(records.Stopping(), signal.SIGTERM)

    def kill(self) -> None:
        """End the worker at once, and every process it started; nothing happens if it has ended.

        Raises:
            RunError: if it is on another machine.
        """
        self._end(records.Killed(), signal.SIGKILL)

    def _end(self, event: records.Event, number: signal.Signals) -> None:
        if not self.alive:
            return
        if other := self.elsewhere:
            raise RunError(f"the run {self.name!r} is being trained on another machine ({other}); stop it there")
        with contextlib.suppress(OSError):  # out of reach, or on a full disk: then nobody will know who it was
            Journal(self.path).write(event)
        send = os.killpg if number is signal.SIGKILL else os.kill
        if not self._in_reach():
            for pid in self.workers():
                send(pid, number)
            return
        # The lock is held by that very process as long as it lives, so the number cannot be another's by now.
        while is_locked(self.path):
            if worker := (self.path / "worker.lock").read_text():
                send(int(worker), number)
                return
            time.sleep(0.01)  # it is being started; its number is there in a moment

    def workers(self) -> list[int]:
        """Ids of its processes to stop or kill, found by their command lines; the lock goes away with its folder."""
        found = [(pid, module) for pid, module, path in _processes() if path == str(self.path.absolute())]
        launchers = [pid for pid, module in found if module == SEVERAL]
        return launchers or [pid for pid, _ in found]

    def __repr__(self) -> str:
        """Name and status."""
        return f"<Run {self.name}: {self.status}>"


def _processes() -> Iterator[tuple[int, str, str]]:
    """(process id, module, run directory) of the workers of this machine and what launches them."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[-2:-1] and line[-2] in (SEVERAL, WORKER):
            yield process.pid, line[-2], line[-1]


def running() -> list[RunDirectory]:
    """The runs that are trained on this machine, wherever they are; those whose folder is away are left out."""
    paths = sorted({Path(path) for _, _, path in _processes()})
    return [RunDirectory(path) for path in paths if _age(path) is not None]


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
    names = (f"{stem}-{number}" for number in itertools.count(1))
    return next(name for name in names if not settings.run_path(name).exists())


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


def check_alone(runs_dir: str | Path, but: str | None = None) -> None:
    """Refuse to begin what needs a GPU's memory while a run in that folder, other than `but`, is being trained.

    Raises:
        RunError: if one is, or the folder cannot be read.
    """
    if live := next((run for run in reversed(list_runs(runs_dir)) if run.name != but and run.alive), None):
        raise RunError(
            f"{live.name!r} is being trained, and both would need the same GPU's memory: wait until it has ended, or "
            "stop it; for another GPU take another runs_dir"
        )


def _first_time(path: Path) -> float | None:
    """Time of its first event, which is the same in a copy of the run, unlike its files' times; None without one."""
    try:
        with (path / EVENTS).open("rb") as file:
            return records.decode(file.readline(_TAIL), records.Head).time
    except (OSError, ValueError):  # not there yet, out of reach, or damaged
        return None


def _age(path: Path) -> float | None:
    """When the settings in that folder were written; None where no run is, or where it may not be looked for."""
    try:
        found = (path / "settings.toml").stat()
    except (OSError, ValueError):  # the latter for a name that no file can have
        return None
    return found.st_mtime if stat.S_ISREG(found.st_mode) else None
