"""Killed at any moment, a run goes on, and ends with the same adapter, byte for byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bizassist_nb import Settings

KILLS = int(os.environ.get("KILLS", "10"))
"""100 in the long mode: `make kills`."""


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been(tiny, tmp_path):
    settings = Settings(
        model=str(tiny), data="sample", subset=12, held_out=4, max_length=256, epochs=3, dropout=0.1,
        engine="transformers", checkpoint_minutes=0.0, evaluate_every=2, keep="best", runs_dir=str(tmp_path),
    )  # fmt: skip
    (tmp_path / "settings.toml").write_text(settings.to_toml())
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path / "settings.toml"), "run"]
    result = subprocess.run([*command, str(KILLS), "1"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))
    assert len(found["deaths"]) == KILLS
    for death in found["deaths"]:
        assert death["steps"] - death["checkpoint"] <= 1  # a checkpoint a step: no more than that is lost
    for end in found["ends"]:
        assert end == {"status": "finished", "same": True, "steps": end["steps"], "left": []}
