"""Ten faults, planted in a copy of the package one at a time: does a test catch each?

Usage: python tests/faults.py [NAME ...]. A fault is one replacement of text. For each, the test named beside it has to
pass without it and to fail with it. Tests that are marked "slow" run in `make test-slow`, all others in `make test`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with the package, and the test that says so."""

    name: str
    file: str
    right: str
    wrong: str
    test: str


FAULTS = [
    Fault(
        "a wrong label mask",
        "data/tokens.py",
        "(earlier or [IGNORED] * len(prompt)) + learned",
        "(earlier or [IGNORED] * (len(prompt) - 1) + prompt[-1:]) + learned",
        "data/test_tokens.py",
    ),
    Fault(
        "a learning rate off by 10",
        "training/trainer.py",
        "learning_rate=rate,",
        "learning_rate=rate / 10,",
        "training/test_training.py::test_the_learning_rate_is_the_one_asked_for",
    ),
    Fault(
        "an unsynced checkpoint",
        "core/files.py",
        "    sync(part)\n",
        "",
        "training/test_checkpoints.py::test_a_checkpoint_is_on_the_disk_before_it_is_in_its_place",
    ),
    Fault(
        "an unescaped answer",
        "core/rendering.py",
        'anywhere">{html.escape(_whole(text))}</div>',
        'anywhere">{_whole(text)}</div>',
        "results/test_views.py",
    ),
    Fault(
        "base and tuned swapped",
        "assistant/assistant.py",
        "generation.strength if each is run else 0.0",
        "0.0 if each is run else generation.strength",
        "assistant/test_assistant.py::test_each_row_of_the_batch_is_answered_by_whom_it_is_named_after",
    ),
    Fault(
        "a lost resume step",
        "runs/run.py",
        "if step.step <= event.step]",
        "if step.step < event.step]",
        "runs/test_runs.py",
    ),
    Fault(
        "a wrong interval", "results/verdict.py", "stats.t.ppf(0.025,", "stats.t.ppf(0.05,", "results/test_verdict.py"
    ),
    Fault(
        "a stale lock",
        "runs/journal.py",
        "return not try_lock(file.fileno(), fcntl.LOCK_SH)",
        "return True",
        "runs/test_runs.py",
    ),
    Fault(
        "a merge without one tensor",
        "export/merge.py",
        "for filename, names in shards.filename_to_tensors.items():\n",
        "for filename, (_, *names) in shards.filename_to_tensors.items():\n",
        "export/test_export.py::test_merging_again_is_refused",
    ),
    Fault(
        "a button without effect",
        "notebook/panel/train.py",
        "self._stop.on_click(lambda _: self._on_stop())",
        "self._stop.on_click(lambda _: None)",
        "browser/test_panel.py::test_a_person_trains_stops_resumes_chats_and_comes_back",
    ),
]


def run_test(test: str, package: Path) -> bool:
    """Whether the test passes on the package in that folder."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]
    # Without PYTHONSAFEPATH the working directory would come first, with the package as it is.
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0


def main(names: list[str]) -> int:
    """Plant the faults of those names, or all; 0 if each was caught."""
    missed = 0
    for fault in FAULTS:
        if names and fault.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            package = shutil.copytree(ROOT / "bizassist_nb", Path(folder) / "bizassist_nb")
            before = run_test(fault.test, Path(folder))
            text = (package / fault.file).read_text("utf-8")
            if (places := text.count(fault.right)) != 1:
                raise SystemExit(f"{fault.name}: {places} places for it in {fault.file}, not 1")
            (package / fault.file).write_text(text.replace(fault.right, fault.wrong), "utf-8")
            caught = before and not run_test(fault.test, Path(folder))
        missed += not caught
        said = "caught by" if caught else "NOT caught by" if before else "this fails without it, too:"
        print(f"{fault.name}: {said} {fault.test}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
