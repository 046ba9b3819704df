"""Killed at any moment, a run goes on, and ends with the same adapter, byte for byte."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from live_kernel import kernel, wait_until

from bizassist_nb import Settings
from bizassist_nb.api import Run
from bizassist_nb.core.errors import RunError
from bizassist_nb.runs import records
from bizassist_nb.training import launch

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "10"))
"""100 in the long mode: `make kills`."""


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tiny, tmp_path):
    settings = Settings(
        model=str(tiny), data="sample", subset=8, held_out=4, max_length=160, epochs=2, batch_size=2, dropout=0.1,
        system_prompt="", engine="transformers", checkpoint_minutes=0.0, evaluate_every=2, keep="best",
        runs_dir=str(tmp_path),
    )  # fmt: skip
    (tmp_path / "settings.toml").write_text(settings.to_toml())
    command = [sys.executable, str(Path(__file__).parents[1] / "killed.py"), str(tmp_path / "settings.toml"), "run"]
    result = subprocess.run([*command, str(KILLS), "1"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found["deaths"]) == KILLS
    for death in found["deaths"]:
        assert death["steps"] - death["checkpoint"] <= 1  # a checkpoint a step: no more than that is lost
    for end in found["ends"]:
        assert end == {"status": "finished", "same": True, "steps": end["steps"], "left": []}


def test_a_run_outlives_its_kernel_and_the_next_one_follows_it(tiny, tmp_path, ended):
    """Kernels are killed, the second one together with the worker."""
    body = (
        f'model = "{tiny}"\ndata = "sample"\nsubset = 8\nheld_out = 4\nmax_length = 160\nbatch_size = 2\n'
        'system_prompt = ""\nengine = "transformers"\nepochs = 400\ncheckpoint_minutes = 0.0\n'
    )
    with kernel(tmp_path) as first:
        first.run("%load_ext bizassist_nb")
        first.start(f"%%finetune run\n{body}")
        wait_until(lambda: (tmp_path / "runs" / "run" / "settings.toml").exists())
        run = Run(tmp_path / "runs" / "run")
        wait_until(lambda: len(run.steps) >= 2)
        (worker,) = run.workers()
        first.manager.signal_kernel(signal.SIGKILL)
        wait_until(lambda: not first.manager.is_alive())
    done = len(run.steps)
    wait_until(lambda: len(run.steps) > done + 1)
    with kernel(tmp_path) as second:
        second.run("%load_ext bizassist_nb")
        with pytest.raises(RunError, match="being trained by another process"):
            launch.start(Settings(runs_dir=str(tmp_path / "runs")), "run", resume=True)
        cell = second.start("%%finetune run --resume")
        shown = second.client.get_iopub_msg(timeout=60)
        while "run: training" not in str(shown["content"]):
            shown = second.client.get_iopub_msg(timeout=60)
        assert run.workers() == [worker]
        second.manager.signal_kernel(signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: run.status == "lost")
    done = len(run.steps)
    with kernel(tmp_path) as third:
        third.run("%load_ext bizassist_nb")
        cell = third.start("%%finetune run --resume")
        wait_until(lambda: len(run.steps) > done and run.last(records.Resumed) is not None)
        third.interrupt()
        assert third.finish(cell).status == "ok"
    assert (run.status, run.alive, run.workers()) == ("stopped", False, [])
    assert run.last(records.Resumed).step >= done - 1
