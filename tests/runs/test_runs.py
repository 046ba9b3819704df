"""The run directory: the journal and its readers, status, names, and the lock."""

import json
import os
import subprocess
import tracemalloc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_run import environment

from bizassist_nb.api import Run, open_run
from bizassist_nb.core.errors import RunError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.summary import run_text
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal, is_locked, take_lock, write_worker
from bizassist_nb.runs.run import check_name, list_runs

STEP = {"loss": 2.0, "learning_rate": 1e-4, "gradient_norm": 0.5, "tokens": 100, "seconds": 1.0}


def make_run(folder, name="r", **fields) -> Run:
    path = folder / name
    path.mkdir()
    (path / "settings.toml").write_text(Settings(**fields).to_toml(), "utf-8")
    return Run(path)


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path)


@pytest.fixture
def journal(run) -> Journal:
    return Journal(run.path)


@pytest.fixture
def lock(run):
    """The run's lock, held as a worker holds it."""
    descriptor = take_lock(run.path)
    yield descriptor
    os.close(descriptor)


def kinds(run: Run) -> list[str]:
    """The kinds of a run's events, or for states which they are."""
    return [event.state if isinstance(event, records.State) else type(event).__name__.lower() for event in run.events]


def test_a_folder_without_settings_is_no_run(tmp_path):
    with pytest.raises(RunError, match=r"holds no run \(it has no settings.toml\)"):
        Run(tmp_path)


def test_settings_are_those_it_was_started_with(tmp_path):
    asked = {"rank": 4, "system_prompt": "é\n\"'", "columns": {"context": "c"}}
    assert make_run(tmp_path, **asked).settings == Settings(**asked)


def test_a_run_without_events_knows_nothing_yet(run):
    assert (run.events, run.steps, run.held_out, run.total_steps, run.evaluation) == ([], [], [], None, None)
    assert (run.environment, run.adapter, run.last(records.Step), run.log(5)) == (
        records.Environment(model="", data="", fingerprint="", device="", python="", versions={}),
        None,
        None,
        [],
    )


def test_journal_is_read_while_it_is_written(run, journal):
    for count in range(1, 4):
        journal.write(records.Step(step=count, **STEP))
        assert [step.step for step in run.steps] == list(range(1, count + 1))
        assert [step.step for step in Run(run.path).steps] == list(range(1, count + 1))


def test_half_written_line_is_left_until_it_is_complete(run, journal):
    journal.write(records.State(state="one"))
    line = json.dumps({"time": 0, "event": "state", "state": "twö🦜"}, ensure_ascii=False).encode()
    with (run.path / "events.jsonl").open("ab", buffering=0) as file:
        for byte in line:
            file.write(bytes([byte]))
            assert kinds(run) == ["one"]
        file.write(b"\n")
    assert kinds(run) == ["one", "twö🦜"]


@pytest.mark.parametrize(
    "torn", [b'{"time": 1, "event": "step", "lo', b'{"event": "\xf0\x9f', b"{", b'"event"', b"[1]"]
)
def test_torn_line_is_passed_over_and_the_next_journal_begins_a_new_one(run, journal, torn):
    journal.write(records.State(state="before"))
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(torn)
    assert kinds(run) == ["before"]
    Journal(run.path).write(records.State(state="after"))
    assert kinds(run) == ["before", "after"]
    assert kinds(Run(run.path)) == ["before", "after"]


def test_a_new_journal_adds_nothing_to_whole_lines(run, journal):
    journal.write(records.State(state="one"))
    before = (run.path / "events.jsonl").read_bytes()
    Journal(run.path)
    assert (run.path / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused_and_leave_the_journal_whole(run, journal, number):
    with pytest.raises(ValueError, match="JSON"):
        journal.write(records.Step(step=1, **{**STEP, "loss": number}))
    journal.write(records.State(state="next"))
    assert kinds(run) == ["next"]


def test_an_error_about_half_a_character_can_be_journalled(run, journal):
    # File names that are not UTF-8 come as lone surrogates (PEP 383), and so into messages.
    journal.write(records.Error(message=os.fsdecode(b"no file \xff.jsonl"), expected=True))
    assert kinds(run) == ["error"]
    assert b"no file" in run.events[0].message.encode()  # and can be shown


finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**63 - 1)
kinds_of_events = (
    st.builds(records.State, state=st.text())
    | st.builds(records.Step, step=counts, loss=finite, learning_rate=finite, gradient_norm=st.none() | finite,
                tokens=counts, seconds=finite)
    | st.builds(records.Error, message=st.text(), expected=st.booleans())
    | st.builds(records.Checkpoint, step=counts, spool=st.none() | st.text())
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(kinds_of_events, max_size=6), st.integers(0, 10_000))
def test_events_come_back_equal_and_any_cut_gives_the_first_of_them(tmp_path_factory, written, cut):
    run = make_run(tmp_path_factory.mktemp("runs"))
    journal = Journal(run.path)
    for event in written:
        journal.write(event)
    read = list(Run(run.path).events)
    assert [msgspec.structs.replace(event, time=0.0) for event in read] == written
    file = run.path / "events.jsonl"
    file.touch()  # where there was nothing to write
    whole = file.read_bytes()
    cut %= len(whole) + 1
    file.write_bytes(whole[:cut])
    assert run.events == read[: whole[:cut].count(b"\n")]
    # A reader that was there at the cut reads on from it; a new journal goes on behind what was cut off.
    file.write_bytes(whole)
    assert run.events == read
    file.write_bytes(whole[:cut])
    Journal(run.path).write(records.State(state="next"))
    again = list(Run(run.path).events)
    assert again.pop().state == "next"
    assert again == read[: len(again)]
    assert len(again) - whole[:cut].count(b"\n") in (0, 1)


def test_events_of_a_later_version_are_passed_over_and_are_no_damage(run, journal):
    journal.append(
        b'{"time": 1.0, "event": "teleported", "where": []}\n{"time": 1.0, "event": "plan", "steps": 3, "x": 1}\n'
    )
    assert (run.total_steps, len(run.events), run.unread) == (3, 1, 0)


def test_steps_after_a_resume_replace_those_done_before(run, journal):
    for step in range(1, 6):
        journal.write(records.Step(step=step, **{**STEP, "loss": 1.0}))
    journal.write(records.Resumed(step=3))
    assert [step.step for step in run.steps] == [1, 2, 3]
    journal.write(records.Step(step=4, **{**STEP, "loss": 9.0, "gradient_norm": None}))
    assert [(step.step, step.loss, step.gradient_norm) for step in run.steps] == [
        (1, 1.0, 0.5),
        (2, 1.0, 0.5),
        (3, 1.0, 0.5),
        (4, 9.0, None),
    ]
    journal.write(records.Resumed(step=0))
    assert run.steps == []


def test_newest_plan_and_evaluations_count(run, journal):
    for steps in (10, 20):
        journal.write(records.Plan(steps=steps))
    for step, loss in ((0, 3.0), (20, 2.5), (0, 2.9)):
        journal.write(records.Evaluation(step=step, loss=loss))
    assert run.total_steps == 20
    assert run.held_out == [(0, 2.9), (20, 2.5)]


STATES = ["starting", "loading", "scoring", "training", "saving"]


@pytest.mark.usefixtures("lock")
@pytest.mark.parametrize("state", [*STATES, "finished", "stopped", "failed"])
def test_status_of_a_locked_run_is_its_last_state(run, journal, state):
    assert run.status == "starting"
    journal.write(records.State(state="loading"))
    journal.write(records.State(state=state))
    journal.write(records.Step(step=1, **STEP))
    assert run.status == state


@pytest.mark.parametrize("state", [None, *STATES])
def test_a_run_whose_worker_went_away_without_a_word_is_lost(run, journal, state):
    descriptor = take_lock(run.path)
    if state:
        journal.write(records.State(state=state))
    assert run.status == (state or "starting")
    os.close(descriptor)
    (run.path / "worker.log").write_bytes(b"first\n" + b"line\n" * 11 + b"Killed \xff\n")
    assert run.status == "lost"
    assert run.error.startswith("its process ended without a word")
    assert run.error.endswith("    Killed \ufffd")
    assert "first" not in run.error


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_ended_with_a_word_keeps_its_status(run, journal, state):
    journal.write(records.State(state=state))
    assert run.status == state


def test_error_is_the_message_and_for_a_surprise_the_end_of_the_log(run, journal):
    (run.path / "worker.log").write_text("Traceback\nKeyError: 'x'\n")
    journal.write(records.Error(message="no rows", expected=True))
    assert run.error.startswith("its process ended")  # lost: it did not say that it failed
    journal.write(records.State(state="failed"))
    assert run.error == "no rows"
    journal.write(records.Error(message="KeyError: 'x'", expected=False))
    assert run.error.startswith("KeyError: 'x'\nThe end of ")
    assert run.error.endswith("    Traceback\n    KeyError: 'x'")
    journal.write(records.State(state="stopped"))
    assert run.error is None


def test_taken_lock_is_refused_and_free_again_after_its_holder(run):
    assert not is_locked(run.path)
    first = take_lock(run.path)
    assert is_locked(run.path)
    with pytest.raises(RunError, match="'r' is being trained by another process"):
        take_lock(run.path)
    os.close(first)
    assert not is_locked(run.path)
    os.close(take_lock(run.path))


def test_looking_at_the_lock_does_not_take_it(run, lock):
    for _ in range(3):
        assert is_locked(run.path)
    os.close(os.dup(lock))  # closing one of several descriptors gives the lock up only with flock's cousin, lockf
    assert is_locked(run.path)


def test_stop_and_kill_send_nothing_where_nobody_holds_the_lock(run):
    # The number in the lock file may be another process's by now: here that of a cat.
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as cat:
        (run.path / "worker.lock").write_text(str(cat.pid))
        run.stop()
        run.kill()
        assert cat.communicate(b"alive")[0] == b"alive"


@pytest.mark.parametrize("name", ["a", "_", "run-1", "Lauf.2", "Größe_3", "a..b", "x" * 64])
def test_fit_names_are_taken(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "/",
        "a\\b",
        "-a",
        ".a",
        "a.",
        "a-",
        " a",
        "a b",
        "a\n",
        "a\0",
        "~",
        "a:b",
        "x" * 65,
    ],
)
def test_names_unfit_for_a_folder_are_refused(name, tmp_path):
    with pytest.raises(RunError, match="cannot be the name of a run: take up to 64 letters"):
        check_name(name)
    with pytest.raises(RunError, match="cannot be the name of a run"):
        open_run(name, tmp_path)


@pytest.mark.parametrize("letter", ["é", "漢", "𐐀"])
def test_a_name_of_wide_letters_is_refused_or_fits_a_folder(letter, tmp_path):
    try:
        name = check_name(letter * 64)
    except RunError:
        return
    (tmp_path / name).mkdir()


def test_open_run_lists_the_runs_there_are(tmp_path):
    with pytest.raises(RunError, match=f"there is no run 'b' in {tmp_path}; the runs there: none yet"):
        open_run("b", tmp_path)
    for name in ("one", "two"):
        make_run(tmp_path, name)
    (tmp_path / "b").mkdir()
    with pytest.raises(RunError, match=r"there is no run 'b' in .*; the runs there: (one, two|two, one)$"):
        open_run("b", tmp_path)
    assert open_run("two", str(tmp_path)).name == "two"


def test_runs_are_listed_oldest_first(tmp_path):
    ages = {"b": 30, "d": 10, "a": 20, "c": 40}
    for name, age in ages.items():
        os.utime(make_run(tmp_path, name).path / "settings.toml", (10**9 - age, 10**9 - age))
    for name, age in (("d", 35), ("b", 30)):  # d's settings were copied later than the run was begun
        Journal(tmp_path / name).append(json.dumps({"time": 10**9 - age, "event": "state", "state": "x"}).encode())
    (tmp_path / "c" / "events.jsonl").write_text("damaged\n")
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert [run.name for run in list_runs(tmp_path)] == ["c", "d", "b", "a"]
    assert list_runs(tmp_path / "nowhere") == []


def test_readers_of_a_file_that_is_replaced_see_the_old_or_the_new_one(run):
    first, second = (environment(model, "f") for model in ("one", "another"))
    write_json(run.path / "environment.json", first)
    with (run.path / "environment.json").open() as old:
        write_json(run.path / "environment.json", second)
        assert json.load(old) == msgspec.to_builtins(first)
    assert run.environment == second
    with pytest.raises(TypeError):
        write_json(run.path / "environment.json", {"model": object()})
    assert run.environment == second


def test_adapter_is_there_once_it_is_saved(run):
    (run.path / "adapter").mkdir()
    assert run.adapter is None
    (run.path / "adapter" / "adapter_config.json").write_text("{}")
    assert run.adapter == run.path / "adapter"


def test_repr_is_name_and_status(run):
    assert repr(run) == "<Run r: lost>"


@pytest.mark.parametrize(
    "file",
    ["adapter/adapter_model.safetensors", "checkpoints/checkpoint-4/state", "best/x", "merged/x", "r.gguf",
     "evaluation.json", "votes.jsonl"],
)  # fmt: skip
def test_a_run_whose_events_are_gone_is_not_replaced_unasked(run, file):
    (run.path / file).parent.mkdir(parents=True, exist_ok=True)
    (run.path / file).write_text("trained")
    with pytest.raises(RunError, match=r"there is a run 'r' already \(lost, with .*--resume, or move it .* --replace"):
        Run.create(run.path, Settings(rank=8))
    assert (run.path / file).read_text("utf-8") == "trained"
    made = Run.create(run.path, Settings(rank=8), replace=True)
    assert (made.settings.rank, made.contents()) == (8, [])
    [binned] = (run.path.parent / ".bin").iterdir()
    assert (binned / file).read_text("utf-8") == "trained"
    assert [run.name for run in list_runs(run.path.parent)] == ["r"]


def test_a_run_whose_events_cannot_be_read_is_not_replaced_unasked(run, monkeypatch):
    (run.path / "events.jsonl").mkdir()  # reading it gives EISDIR, as a flaky mount gives EIO
    with pytest.raises(RunError, match=r"with events that cannot be read: IsADirectoryError"):
        Run.create(run.path, Settings())


def test_a_run_that_is_being_trained_is_not_replaced_even_if_asked(run, lock):
    for replace in (False, True):
        with pytest.raises(RunError, match="is being trained by another process"):
            Run.create(run.path, Settings(), replace=replace)
    assert run.path.is_dir()


def test_a_run_that_has_only_begun_is_replaced_and_can_be_taken_back(run, journal):
    journal.write(records.State(state="failed"))
    Run.create(run.path, Settings(rank=8))
    [binned] = (run.path.parent / ".bin").iterdir()
    assert Run(binned).settings == Settings()


def test_a_run_that_a_person_ended_says_so(run, journal):
    command = ["sleep", "600"]
    descriptor = take_lock(run.path)
    with subprocess.Popen(command, stdin=descriptor, start_new_session=True) as worker:
        write_worker(descriptor, worker.pid)
        os.close(descriptor)
        journal.write(records.State(state="training"))
        assert not run.killed
        run.kill()
        worker.wait()
    assert run.status == "lost"
    assert run.error.startswith("it was ended at once, as somebody asked")
    assert "r: ended at once, as asked" in run_text(run)
    journal.write(records.State(state="starting"))  # resumed, and then killed by the system
    assert run.error.startswith("its process ended without a word")


def test_a_long_run_takes_little_memory(run, journal):
    lines = [json.dumps({"time": 1.0, "event": "step", "step": step, **STEP}) for step in range(1, 20_001)]
    journal.append("".join(f"{line}\n" for line in lines).encode())
    tracemalloc.start()
    assert len(run.steps) == 20_000
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / 20_000 < 500  # bytes a step; as dictionaries they took 1,250


def test_a_run_of_the_time_when_2e_4_was_the_default_resumes_by_the_cell_that_started_it(tmp_path):
    run = make_run(tmp_path, rank=8, learning_rate=2e-4)
    assert Run.resume(run.path, Settings(rank=8)).learning_rate == 2e-4
    with pytest.raises(RunError, match=r"other settings \(learning_rate\)"):
        Run.resume(make_run(tmp_path, "other", rank=8, learning_rate=1e-3).path, Settings(rank=8))
