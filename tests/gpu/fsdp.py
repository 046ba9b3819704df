"""A base sharded by FSDP2 over the one GPU there is, against a whole one: whether all of that way works with CUDA.

Usage: fsdp.py MODEL_FOLDER ROWS.json FOLDER. Trains the same 100 rows twice, 4 a step and 2 at once, from scoring to
answers, side by side: by a worker as a user's run has it, and by one that accelerate starts for FSDP with a single
process (which a run refuses, as there is nothing to share). So weights go through RAM to the GPU, are gathered by NCCL,
and unpacked from what was gathered; what is not shown is two GPUs. Prints JSON: how far losses are apart at most (the
aim is 1 %), held-out losses, answers that are equal, and peaks of GPU memory.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bizassist_nb import Settings, finetune
from bizassist_nb.api import Run
from bizassist_nb.runs import records
from bizassist_nb.runs.run import WORKER

CONFIG = """
distributed_type: FSDP
num_machines: 1
num_processes: 1
fsdp_config:
  fsdp_version: 2
"""


def sharded(settings: Settings, path: Path) -> subprocess.Popen[bytes]:
    """A worker that accelerate starts for FSDP, which makes a run there."""
    path.mkdir(parents=True)
    (path / "settings.toml").write_text(settings.to_toml(), "utf-8")
    config = path.parent / "fsdp.yaml"
    config.write_text(CONFIG + ("" if torch.cuda.is_available() else "use_cpu: true\n"), "utf-8")
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--mixed_precision",
        "no",
    ]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([*command, "--module", WORKER, str(path)], stdin=subprocess.DEVNULL, env=environment)


def main(model: str, rows: str, folder: str) -> None:
    """Train, compare and print."""
    settings = Settings(
        model=model, data=rows, subset=100, held_out=16, batch_size=4, micro_batch=2, engine="transformers",
        evaluate_every=12, checkpoint_minutes=60.0, runs_dir=folder,
    )  # fmt: skip
    process = sharded(settings, Path(folder) / "sharded")
    whole = finetune(settings, "whole")
    assert process.wait() == 0
    other = Run(Path(folder) / "sharded")
    apart = [abs(a.loss - b.loss) / b.loss for a, b in zip(other.steps, whole.steps, strict=True)]
    scores = [[getattr(run.evaluation, who).loss for who in ("base", "tuned")] for run in (other, whole)]
    answers = [
        [getattr(answer, who).text for answer in run.answers for who in ("base", "tuned")] for run in (other, whole)
    ]
    found = {
        "device": other.environment.device,
        "versions": other.environment.versions,
        "sharded": {name: getattr(other.last(records.Sharded), name) for name in ("shard", "whole")},
        "largest_difference_of_losses": max(apart),
        "held_out_losses": scores,
        "equal_answers": f"{sum(a == b for a, b in zip(*answers, strict=True))} of {len(answers[0])}",
        "peak_gib": [round(run.last(records.Memory).peak / 2**30, 2) for run in (other, whole)],
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
