"""A run's directory that goes away, fills up or may not be written: nothing is lost, and it is said."""

import errno
import fcntl
import os
import resource
import shutil
import time
from contextlib import contextmanager

import psutil
import pytest
from live_kernel import wait_until

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.rendering import duration
from bizassist_nb.notebook.panel.state import State
from bizassist_nb.results.summary import progress, run_text
from bizassist_nb.runs import journal as journals
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import EVENTS, HEARTBEAT, Journal, spool_folder, take_lock
from bizassist_nb.training import launch
from bizassist_nb.training.checkpoints import checkpoints, newest_checkpoint
from bizassist_nb.training.spool import SpoolingJournal


@pytest.fixture(autouse=True)
def cache(ended, tmp_path, monkeypatch):
    """What this machine keeps, apart from what it keeps for others."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings(tiny, folder, **changes) -> Settings:
    values = {
        "model": str(tiny), "data": "sample", "subset": 8, "held_out": 4, "max_length": 160, "batch_size": 2,
        "system_prompt": "", "engine": "transformers", "checkpoint_minutes": 0.0, "evaluate_every": 3,
        "runs_dir": str(folder),
    }  # fmt: skip
    return Settings(**(values | changes))


@contextmanager
def away(folder):
    """A Drive that has dropped: nothing that was mounted there can be seen."""
    folder.rename(folder.with_name("elsewhere"))
    try:
        yield
    finally:
        folder.with_name("elsewhere").rename(folder)


@contextmanager
def limited(worker: int, limit: int, most: int):
    """A process that may not have more: files of more bytes, or more open files."""
    before = resource.prlimit(worker, limit)
    resource.prlimit(worker, limit, (most, before[1]))
    try:
        yield
    finally:
        resource.prlimit(worker, limit, before)


@pytest.mark.slow
def test_a_run_goes_on_while_its_directory_cannot_be_written_and_then_on_another_machine(tiny, tmp_path, monkeypatch):
    drive = tmp_path / "drive" / "runs"
    run = launch.start(settings(tiny, drive, epochs=400), "run")
    wait_until(lambda: len(run.steps) >= 3)
    (worker,) = run.workers()
    assert worker == int((run.path / "worker.lock").read_text("utf-8"))

    def works(seconds: float = 1.0) -> None:
        """Until the worker has done as much again."""
        process = psutil.Process(worker)
        before = process.cpu_times().user
        wait_until(lambda: process.cpu_times().user > before + seconds)

    panel = State(str(drive))
    with away(tmp_path / "drive"):
        seen = len(run.steps)
        wait_until(lambda: len(run.steps) > seen + 2)  # as it is kept on this machine
        assert run.status == "out of reach"
        assert run.alive
        assert "cannot be read. A worker goes on without it" in run.error
        assert "out of reach" in run_text(run)
        panel.looked = 0.0
        panel.look()
        assert panel.followed is panel.live is panel.runs["run"]
        wait_until(lambda: checkpoints(spool_folder(run.path)) != [])
    wait_until(lambda: run.last(records.Back) is not None)
    wait_until(lambda: not spool_folder(run.path).exists())
    with limited(worker, resource.RLIMIT_FSIZE, 100):  # as on a full disk, log and events included
        works()
    wait_until(lambda: sum(isinstance(event, records.Back) for event in run.events) == 2)
    with limited(worker, resource.RLIMIT_NOFILE, 3):
        works()
    wait_until(lambda: sum(isinstance(event, records.Back) for event in run.events) == 3)
    run.stop()
    wait_until(lambda: run.status == "stopped" and not run.alive)
    assert [step.step for step in run.steps] == list(range(1, len(run.steps) + 1))
    assert Run(run.path).steps == run.steps  # read there, and read here first
    reasons = [event.reason for event in run.events if type(event).__name__.lower() in ("away", "unsaved")]
    for words in ("No such file", "File too large", "Too many open files"):
        assert any(words in reason for reason in reasons), words
    assert newest_checkpoint(run.path).step == len(run.steps)
    assert [path for path in run.path.rglob(".*") if path.suffix in (".part", ".old", ".probe")] == []
    assert "it is saved on this machine for now" in run_text(run)

    # A new machine: the Drive is mounted elsewhere, and there is nothing but it.
    other = tmp_path / "mnt" / "runs"
    other.parent.mkdir()
    shutil.copytree(drive, other)
    shutil.rmtree(tmp_path / "drive")
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    moved = launch.start(Settings(runs_dir=str(other)), "run", resume=True)
    done = len(run.steps)
    wait_until(lambda: len(moved.steps) > done)
    assert moved.last(records.Resumed).step == done
    moved.kill()


def test_a_run_that_is_trained_on_another_machine_is_neither_lost_nor_taken(tiny, tmp_path, monkeypatch):
    run = launch.start(settings(tiny, tmp_path / "here", epochs=100), "run")
    wait_until(lambda: run.steps and run.alive)
    other = tmp_path / "there" / "run"
    shutil.copytree(run.path, other)  # as a Drive does, without locks
    assert Run(other).status == "lost"  # of this machine's own it is seen that no lock is held
    with monkeypatch.context() as there:
        there.setattr(journals, "machine", lambda: ("other-vm", "another start"))
        seen = Run(other)
        assert seen.status == "training"
        assert seen.alive
        panel = State(str(other.parent))
        assert list(panel.runs) == ["run"]
        assert panel.live is None  # nothing is in the way of a run here
        again = Settings(runs_dir=str(other.parent))
        with pytest.raises(RunError, match=r"trained on another machine \(.*since 20.*stop it there.*try again after"):
            launch.start(again, "run", resume=True)
        for end in (seen.stop, seen.kill):
            with pytest.raises(RunError, match="trained on another machine"):
                end()
        assert seen.last(records.Killed) is None
        later = time.time() + 301
        there.setattr(journals.time, "time", lambda: later)
        assert seen.status == "lost"
        os.close(take_lock(other))
    run.stop()
    wait_until(lambda: run.status == "stopped" and not run.alive)
    assert not (run.path / HEARTBEAT).exists()  # so that another machine may go on at once


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused_in_words_and_its_runs_can_be_read(tmp_path, monkeypatch, code):
    run = new_run(tmp_path / "run")
    os.close(take_lock(run.path))

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert run.status == "lost"
    with pytest.raises(RunError, match=r"the file system has no locks .*take a runs_dir on another disk"):
        launch.start(Settings(runs_dir=str(tmp_path)), "run", resume=True)


def test_a_directory_that_cannot_be_made_or_written_is_said(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    for folder, words in ((tmp_path / "file", "Not a directory"), (closed, "Permission denied")):
        with as_nobody(tmp_path), pytest.raises(RunError, match=f"cannot be written .*{words}.*another runs_dir"):
            finetune(settings(tiny, folder), "run")
        assert not folder.is_dir() or list(folder.iterdir()) == []


@contextmanager
def as_nobody(place):
    """Without root's leave to write everywhere, should a test have it."""
    if os.geteuid():
        yield
        return
    for folder in (place, *place.parents[:3]):
        if folder.owner() == "root" and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def kinds(run: Run) -> list[str]:
    """The kinds of a run's events, or for states which they are."""
    return [event.state if isinstance(event, records.State) else type(event).__name__.lower() for event in run.events]


def new_run(folder) -> Run:
    folder.mkdir()
    (folder / "settings.toml").write_text(Settings().to_toml())
    return Run(folder)


def test_where_there_is_no_room_at_all_training_goes_on_and_says_what_was_not_saved(tmp_path):
    run = new_run(tmp_path / "run")
    journal = SpoolingJournal(run.path)
    journal.checkpoint(1, lambda folder: (folder / "weights").write_text("1"))
    journal.checkpoint(2, full)
    assert "the checkpoint of step 2 was not saved (in" in run_text(run)
    assert "No space left on device" in run.last(records.Unsaved).reason
    assert [checkpoint.step for checkpoint in checkpoints(run.path)] == [1]
    assert newest_checkpoint(run.path).step == 1
    with pytest.raises(RunError, match=r"the adapter could not be written to .*No space left.*--resume"):
        journal.insist("the adapter", full)


def test_what_a_killed_worker_could_not_write_is_written_by_the_next(tmp_path):
    run = new_run(tmp_path / "run")
    journal = SpoolingJournal(run.path)
    journal.write(records.State(state="one"))
    assert len(run.events) == 1
    with away(run.path):
        journal.write(records.State(state="two"))
        journal.checkpoint(7, lambda folder: (folder / "weights").write_text("7"))
        assert kinds(run) == ["one", "away", "two", "checkpoint"]
    # Killed here, or right after it has written the events and before it has forgotten them.
    kept = (spool_folder(run.path) / EVENTS).read_bytes()
    with (run.path / EVENTS).open("ab") as file:
        file.write(kept[: kept.index(b"two") + 2])
    again = SpoolingJournal(run.path)
    again.write(records.State(state="three"))
    assert kinds(Run(run.path)) == ["one", "away", "two", "checkpoint", "back", "three"]
    assert kinds(run) == ["one", "away", "two", "checkpoint", "back", "three"]
    assert newest_checkpoint(run.path).step == 7
    assert not spool_folder(run.path).exists()


def test_what_has_to_be_written_is_tried_again_after_an_error_that_passes(tmp_path, monkeypatch):
    pauses, left, asked = [], [2], []
    monkeypatch.setattr("bizassist_nb.training.spool.time.sleep", pauses.append)
    journal = SpoolingJournal(new_run(tmp_path / "run").path, between=lambda: asked.append("a stop?"))

    def write():
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")

    journal.insist("the adapter", write)
    assert pauses == [1, 1]
    assert len(asked) == 2
    left[0] = 100
    with pytest.raises(RunError, match=r"the adapter could not be written to .*Input/output error.*--resume"):
        journal.insist("the adapter", write)
    assert sum(pauses) == pytest.approx(62)
    left[0], tried = 1, len(pauses)
    with pytest.raises(RunError, match="No space left"):
        journal.insist("the adapter", full)
    assert len(pauses) == tried


def test_a_damaged_checkpoint_does_not_keep_the_whole_one_of_its_step_from_being_delivered(tmp_path):
    run = new_run(tmp_path / "run")
    journal = SpoolingJournal(run.path)
    journal.checkpoint(7, lambda folder: (folder / "weights").write_text("7"))
    (run.path / "checkpoints" / "checkpoint-7" / "weights").write_text("8")
    with away(run.path):
        journal.checkpoint(7, lambda folder: (folder / "weights").write_text("7"))
    assert journal.deliver(now=True)
    assert journal.newest_checkpoint().path == run.path / "checkpoints" / "checkpoint-7"


def test_what_was_kept_for_a_run_that_was_deleted_is_not_the_next_ones(tiny, tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    with away(run.path):
        SpoolingJournal(run.path).write(records.State(state="old"))
    shutil.rmtree(run.path)
    made = Run.create(run.path, Settings())
    SpoolingJournal(made.path).write(records.State(state="new"))
    assert kinds(made) == ["new"]


def test_a_run_whose_launcher_was_killed_while_it_made_it_can_be_made(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".settings.toml.part").write_text("hal")
    assert Run.create(tmp_path / "run", Settings(rank=8)).settings.rank == 8


def test_a_clock_that_is_set_back_is_no_matter(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run")
    journal, start = Journal(run.path), time.time()
    clock = iter([start, start - 3600, start - 7200, start - 7100, start - 7000])
    monkeypatch.setattr("bizassist_nb.runs.journal.time.time", lambda: next(clock))
    journal.write(records.State(state="training"))
    journal.write(records.Plan(steps=4, tokens=9))
    for number in (1, 2, 3):
        journal.write(records.Step(step=number, loss=2.0, learning_rate=1e-4, gradient_norm=1.0, tokens=9, seconds=2.0))
    monkeypatch.undo()
    assert [step.step for step in run.steps] == [1, 2, 3]
    assert progress(run).seconds_left == 2.0
    assert duration(-3600) == "0 s"
