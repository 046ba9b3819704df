"""Verdicts of real runs of the embedded model. Usage: verdict_runs.py DOLLY.jsonl FOLDER [RUNS [AT_ONCE]]

*The adapter's seed*: runs on the same 200 Dolly rows that differ in nothing else, scored on the same 900 rows. Of every
two, 12, 24, 64 and 256 of these rows are drawn again and again and judged as if one were the other's base: the share of
"helped" or "hurt", where there is next to nothing to tell. `change` is how far the two are apart on all 900.
*One narrow kind*: a run on rows of one category of Dolly each, three times over at three times the learning rate, and
its verdict. Prints JSON lines. FOLDER keeps the runs, for verdict.py; those that are there are not trained anew.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bizassist_nb.api import Run
from bizassist_nb.core.settings import Settings
from bizassist_nb.results.verdict import Score, judge
from bizassist_nb.runs.run import RunDirectory

DRAWS = 40
PLAIN = {"model": "smollm2-135m", "engine": "transformers", "max_length": 512}


def trained(folder: Path, name: str, adapter_seed: int, **changes) -> Run:
    """A run, in a process of its own, which sees one GPU."""
    if (folder / name).exists():
        return Run(folder / name)
    path = RunDirectory.create(folder / name, Settings(**PLAIN, **changes, runs_dir=str(folder))).path
    with (path / "worker.log").open("wb") as log:
        command = [sys.executable, __file__, "--worker", str(path), str(adapter_seed)]
        one_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
        subprocess.run(command, env=one_gpu, stdout=log, stderr=log, check=False)
    return Run(path)


def work(path: str, adapter_seed: str) -> None:
    from bizassist_nb.training import engines, worker

    load = engines.load

    def seeded(engine, base, settings, **options):
        return load(engine, base, dataclasses.replace(settings, seed=int(adapter_seed)), **options)

    engines.load = seeded
    sys.exit(worker.main(path))


def scores(run: Run, numbers) -> list[Score]:
    rows = {row.row: row for row in run.evaluation.rows}
    return [Score(i, rows[i].tuned * rows[i].tokens, rows[i].tokens) for i in numbers]


def main(dolly: str, folder: str, runs: str = "8", at_once: str = "4") -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in Path(dolly).read_text("utf-8").splitlines()]
    kinds = {category: out / f"{category}.jsonl" for category in sorted({row["category"] for row in rows})}
    for category, path in kinds.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["category"] == category))
    narrow = {"subset": 300, "held_out": 64, "epochs": 3, "learning_rate": 2.8e-3}
    with ThreadPoolExecutor(int(at_once)) as pool:
        alike = [
            pool.submit(trained, out, f"seed-{i}", i, data=dolly, subset=200, held_out=900) for i in range(int(runs))
        ]
        kind = [pool.submit(trained, out, name, 42, data=str(path), **narrow) for name, path in kinds.items()]
    done = [run for each in alike if (run := each.result()).evaluation]
    random = np.random.default_rng(0)
    numbers = [row.row for row in done[0].evaluation.rows]
    pairs = list(itertools.combinations(done, 2))
    apart = [judge(scores(a, numbers), scores(b, numbers), seed=0).difference for a, b in pairs]
    print(json.dumps({"pairs": len(pairs), "change": [round(each, 4) for each in apart]}))
    for count in (12, 24, 64, 256):
        said: Counter[str] = Counter()
        for (a, b), seed in itertools.product(pairs, range(DRAWS)):
            chosen = [int(i) for i in random.choice(numbers, count, replace=False)]
            said[judge(scores(a, chosen), scores(b, chosen), seed=seed).verdict] += 1
        print(json.dumps({"rows": count, "said": {word: n / said.total() for word, n in said.items()}}), flush=True)
    for each in kind:
        run = each.result()
        if (found := run.evaluation) is None:
            print(json.dumps({"run": run.name, "failed": str(run.error)[-600:]}))
            continue
        general = (found.general.difference, *found.general.interval, found.general.verdict)
        print(json.dumps({"run": run.name, "verdict": found.verdict, "general": general, "said": found.sentence}))


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1] == "--worker" else main(*sys.argv[1:])
