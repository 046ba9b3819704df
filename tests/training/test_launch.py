"""What a run's launcher decides before there is a worker, and how it ends."""

import os
import shutil
import subprocess
import threading
from types import SimpleNamespace

import huggingface_hub
import pytest
from random_run import random_run

from bizassist_nb.api import Run
from bizassist_nb.core.errors import DataError
from bizassist_nb.core.settings import Settings
from bizassist_nb.models.base import resolve
from bizassist_nb.notebook.panel.export import Job
from bizassist_nb.runs.journal import take_lock
from bizassist_nb.runs.rows import rows_of
from bizassist_nb.runs.run import RunDirectory, check_name, free_name
from bizassist_nb.training import launch


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("sample", "sample-1"),
        ("sales (2024).csv", "sales-2024-1"),
        ("Größe & Preis.jsonl", "Größe-Preis-1"),
        ("-.x-.csv", "x-1"),
        ("???.csv", "run-1"),
        ("漢" * 200 + ".csv", "漢" * 50 + "-1"),
    ],
)
def test_a_name_that_is_made_up_can_be_a_runs(data, name, tmp_path):
    settings = Settings(data=data, runs_dir=str(tmp_path))
    assert check_name(free_name(settings)) == name
    (tmp_path / name).mkdir()
    assert free_name(settings) == name[:-1] + "2"


def test_relative_paths_hold_from_another_directory(tiny, tmp_path, rows_file, monkeypatch):
    base, data = (
        shutil.copytree(tiny, tmp_path / "models" / "base"),
        rows_file([{"prompt": f"q{i}", "answer": "a"} for i in range(9)]),
    )
    asked = Settings(model="models/base", data=data.name, subset=4, held_out=2, runs_dir="runs")
    monkeypatch.chdir(tmp_path)
    path = RunDirectory.create(tmp_path / "runs" / "r", asked).path
    assert RunDirectory.resume(path, asked).name == "r"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = RunDirectory(path)
    assert resolve(run.model).source == str(base)
    assert len(rows_of(run)[1]) == 4


@pytest.mark.parametrize(
    ("data", "columns", "words"),
    [
        ("row.jsonl", {}, 'there is no file row.jsonl .*did you mean data = "rows.jsonl"'),
        ("rows.txt", {}, "neither .* nor a path ending in"),
        (
            "rows.jsonl",
            {"response": "answers"},
            'row 1: has no column .*did you mean columns = { response = "answer" }',
        ),
        ("broken.csv", {}, "two columns named 'prompt'"),
        ("rows.jsonl", {}, "has 9 usable rows.* set subset to at most 7"),
    ],
)
def test_bad_data_is_told_before_a_worker_is_started(data, columns, words, tmp_path, rows_file, monkeypatch):
    rows_file([{"prompt": f"q{i}", "answer": "a"} for i in range(9)])
    (tmp_path / "broken.csv").write_text("prompt,prompt\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=words):
        launch.start(Settings(data=data, columns=columns, subset=8, held_out=2, runs_dir="runs"), "r")
    assert not (tmp_path / "runs").exists()


def test_the_number_of_an_earlier_worker_is_gone_before_there_is_a_new_one(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "settings.toml").write_text(Settings().to_toml())
    (tmp_path / "r" / "worker.lock").write_text("12345678")
    seen = []

    def popen(*_arguments, **_named):
        seen.append((tmp_path / "r" / "worker.lock").read_text("utf-8"))
        return SimpleNamespace(pid=77)

    monkeypatch.setattr(subprocess, "Popen", popen)
    launch.start(Settings(runs_dir=str(tmp_path)), "r", resume=True)
    assert seen == [""]
    assert (tmp_path / "r" / "worker.lock").read_text("utf-8") == "77"


def test_unsloth_imports_no_modules_from_a_run_directory(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "settings.toml").write_text(Settings().to_toml())
    given = {}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **named: given.update(named["env"]) or SimpleNamespace(pid=77))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    launch.start(Settings(runs_dir=str(tmp_path)), "r", resume=True)
    assert given["UNSLOTH_COMPILE_LOCATION"] == str(tmp_path / "cache" / "bizassist_nb" / "unsloth")


def test_a_token_of_this_kernel_alone_reaches_the_worker_and_exports(tiny, tmp_path, monkeypatch):
    """As in Colab, whose Secrets huggingface_hub can read only where there is an IPython."""
    seen = []

    def popen(*_arguments, env, **_named):
        seen.append(env["HF_TOKEN"])
        return SimpleNamespace(pid=77, poll=lambda: 0)

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    run = random_run(tmp_path / "done", tiny)
    monkeypatch.setattr(subprocess, "Popen", popen)
    launch.start(Settings(runs_dir=str(tmp_path)), "r")
    Job.begin(tmp_path / "export", run, "hub", [])
    assert seen == ["hf_secret", "hf_secret"]
    assert "HF_TOKEN" not in os.environ


def test_a_stop_while_the_worker_is_being_started_goes_to_it(tmp_path, monkeypatch):
    (tmp_path / "settings.toml").write_text(Settings().to_toml())
    lock = take_lock(tmp_path)
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, _number: sent.append(pid))
    stopping = threading.Thread(target=Run(tmp_path).stop)
    stopping.start()
    assert sent == []
    os.write(lock, b"77")
    stopping.join(20)
    os.close(lock)
    assert sent == [77]
