"""What a run's launcher decides before there is a worker, and how it ends."""

import os
import subprocess
import threading
from types import SimpleNamespace

import pytest

from bizassist_nb.api import Run
from bizassist_nb.core.settings import Settings
from bizassist_nb.runs.journal import take_lock
from bizassist_nb.runs.run import check_name, free_name
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


def test_the_number_of_an_earlier_worker_is_gone_before_there_is_a_new_one(tmp_path, monkeypatch):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "settings.toml").write_text(Settings().to_toml())
    (tmp_path / "r" / "worker.lock").write_text("12345678")
    seen = []

    def popen(*_arguments, **_named):
        seen.append((tmp_path / "r" / "worker.lock").read_text())
        return SimpleNamespace(pid=77)

    monkeypatch.setattr(subprocess, "Popen", popen)
    launch.start(Settings(runs_dir=str(tmp_path)), "r", resume=True)
    assert seen == [""]
    assert (tmp_path / "r" / "worker.lock").read_text() == "77"


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
