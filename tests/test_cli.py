"""The command line, in this process where it can be and in one of its own where it must."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
from live_kernel import wait_until
from random_run import random_run

from bizassist_nb.__main__ import main
from bizassist_nb.api import Run, open_run
from bizassist_nb.runs.journal import take_lock
from bizassist_nb.training import launch


@pytest.fixture
def file(tiny, tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(
        f'model = "{tiny}"\ndata = "sample"\nsubset = 99\nheld_out = 4\nmax_length = 512\nengine = "transformers"\n'
    )
    return path


def test_finetune_trains_from_a_file_with_overrides(file, tmp_path, capsys):
    arguments = ["finetune", str(file), "--name", "one", "--set", "subset=8", "--runs-dir", str(tmp_path / "r")]
    assert main(arguments) == 0
    run = open_run("one", tmp_path / "r")
    assert (run.status, run.settings.subset, len(run.steps)) == ("finished", 8, 2)
    out = capsys.readouterr().out
    assert "one: training" in out
    assert run.evaluation.sentence in out
    assert main(["runs", "--runs-dir", str(tmp_path / "r")]) == 0
    assert "one" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "move it to the bin with --replace" in capsys.readouterr().err
    assert main([*arguments, "--set", "subset=4", "--replace"]) == 0
    assert open_run("one", tmp_path / "r").settings.subset == 4
    assert [len(Run(path).steps) for path in (tmp_path / "r" / ".bin").iterdir()] == [2]


def test_ask_evaluate_and_doctor(tiny, tmp_path, capsys, monkeypatch):
    run = random_run(tmp_path / "random", tiny)
    where = ["--runs-dir", str(tmp_path)]
    assert main(["ask", "random", "How should we price?", "--max-new-tokens", "5", *where]) == 0
    out = capsys.readouterr().out
    assert f"--- base ({tiny.name}), stopped at the limit of 5 tokens ---" in out
    assert "--- tuned (random), stopped at the limit of 5 tokens ---" in out
    assert main(["ask", "random", "Why?", "--max-new-tokens", "5", "--strength", "0", *where]) == 0
    assert "--- tuned (random), strength 0, stopped at the limit of 5 tokens ---" in capsys.readouterr().out
    asked = ["--system", "Be brief.", "--stop", "\n\n", "--stop", "END"]
    assert main(["ask", "random", "Why?", "--max-new-tokens", "5", *asked, *where]) == 0
    assert 'System prompt: "Be brief.".' in capsys.readouterr().out
    assert main(["ask", "random", "Why?", "--base", "--max-new-tokens", "5", *where]) == 0
    assert "tuned" not in capsys.readouterr().out
    assert main(["evaluate", "random", *where]) == 0
    card = capsys.readouterr().out
    assert re.match(rf"Did it help\?\n\[. .*\] .*\n{re.escape(run.evaluation.sentence)}\n", card)
    assert "answers that loop" in card
    assert main(["evaluate", "random", "--json", *where]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run.path / "evaluation.json").read_text("utf-8"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor", *where]) == 0
    report = capsys.readouterr().out
    for words in ("Mistral-7B takes", "float32", "GiB free; can be written and locked", "hub token", str(tmp_path)):
        assert words in report
    assert "hf_secret" not in report
    assert "⚠" not in report  # every version is within its range


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ask", "nosuch", "Hi?"], "there is no run 'nosuch'"),
        (["evaluate", "nosuch"], "there is no run 'nosuch'"),
        (["export", "nosuch", "--to", "merged"], "there is no run 'nosuch'"),
        (["finetune", "nosuch.toml"], "nosuch.toml cannot be read"),
        (["finetune", "--set", "rnak=3"], "did you mean rank?"),
        (["finetune", "--set", "rank"], "KEY=VALUE"),
        (["finetune", "--name", "a/b"], "cannot be the name of a run"),
    ],
)
def test_errors_are_one_message_on_stderr(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_setting(capsys):
    from bizassist_nb.core.settings import reference

    with pytest.raises(SystemExit) as ended:
        main(["finetune", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for name, _, text in reference():
        assert f"  {name} = " in out
        assert text in out


def test_demo_shows_loss_verdict_and_both_answers(tiny, tmp_path, capsys):
    changes = [f"model={tiny}", "subset=8", "held_out=4", "engine=transformers"]
    settings = [part for change in changes for part in ("--set", change)]
    assert main(["demo", *settings, "--runs-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in (
        "training loss:",
        "95 % interval",
        f"--- base ({tiny.name}), stopped at the limit of 200 tokens ---",
        "--- tuned (sample-1), stopped at the limit of 200 tokens ---",
    ):
        assert text in out


def test_ctrl_c_stops_cleanly(file, tmp_path):
    command = [sys.executable, "-m", "bizassist_nb", "finetune", str(file), "--name", "halted", "--set", "epochs=50"]
    process = subprocess.Popen([*command, "--runs-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    path = tmp_path / "halted"
    wait_until(lambda: (path / "settings.toml").exists() and Run(path).steps)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert Run(path).status == "stopped"
    assert f"go on with: bizassist finetune --runs-dir {tmp_path} --name halted --resume\n" in out


def test_a_second_ctrl_c_ends_the_run_and_exits_as_interrupted(tmp_path, monkeypatch):
    """A worker that does not mind a stop, and the first interrupt before the launcher has it."""

    def start(settings, name, **_):
        path = settings.run_path(name)
        path.mkdir()
        (path / "settings.toml").write_text(settings.to_toml())
        lock = take_lock(path)
        command = ["bash", "-c", "trap '' TERM; echo ready; sleep 600"]
        worker = subprocess.Popen(command, pass_fds=(lock,), start_new_session=True, stdout=subprocess.PIPE)
        worker.stdout.readline()  # from here on it does not mind SIGTERM
        os.write(lock, str(worker.pid).encode())
        os.close(lock)
        workers.append(worker)
        os.kill(os.getpid(), signal.SIGINT)
        second.start()
        return Run(path)

    workers = []
    second = threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT))
    monkeypatch.setattr(launch, "start", start)
    try:
        assert main(["finetune", "--name", "ended", "--runs-dir", str(tmp_path)]) == 130
    finally:
        second.cancel()
    assert Run(tmp_path / "ended").status == "lost"
    with workers[0] as worker:
        assert worker.wait() == -signal.SIGKILL


def test_data_are_checked_without_training(rows_file, capsys):
    file = rows_file([{"text": f"Text {i}", "label": True} for i in range(3)] + [{"text": "Call 555-123-4567"}])
    template = 'template = { user = "{text}?", assistant = "{label}" }'
    assert main(["data", str(file), "--set", template]) == 0
    out = capsys.readouterr().out
    assert f"{file}: 3 rows can be used" in out
    assert "1  cannot be used: has no column 'label' (named in template)" in out
    assert "rows 4" in out
    assert main(["data", str(file)]) == 1
    assert "no usable row among 4: row 1: has no instruction column" in capsys.readouterr().err
    assert main(["data", "sample"]) == 0
    assert capsys.readouterr().out == "the sample rows of this package: 120 rows can be used\nnothing odd\n"
