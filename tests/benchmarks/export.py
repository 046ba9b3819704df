"""The merge against PEFT's `merge_and_unload`, and its memory. Usage: export.py RUN_DIRECTORY [GIGABYTES]

RUN_DIRECTORY is a run of the embedded model. Both write its merged 16-bit model and take turns three times, each in a
process of its own; the fastest counts. Then a base of so many gigabytes (default 1.5) of random weights is merged
with a random adapter, and the memory of writing alone and of writing and comparing is taken.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from random_run import large_base, random_run

from bizassist_nb.models.embedded import embedded_folder

OURS = """
import bizassist_nb.export.merge, bitsandbytes, peft, transformers, json, sys, time, pathlib
from bizassist_nb.api import Run
start = time.perf_counter()
folder = pathlib.Path(sys.argv[2]); folder.mkdir()
bizassist_nb.export.merge.write(Run(pathlib.Path(sys.argv[1])), "trained", folder)
print(json.dumps(time.perf_counter() - start))
"""
PEFT = """
import bizassist_nb.models.base, bitsandbytes, peft, transformers, json, sys, time, pathlib, torch
from bizassist_nb.api import Run
run = Run(pathlib.Path(sys.argv[1]))
start = time.perf_counter()
base = bizassist_nb.models.base.load_nf4(bizassist_nb.models.base.resolve(run.environment.model).source).dequantize()
merged = peft.PeftModel.from_pretrained(base, run.adapter).merge_and_unload().to(torch.bfloat16)
merged.save_pretrained(sys.argv[2])
transformers.AutoTokenizer.from_pretrained(run.adapter).save_pretrained(sys.argv[2])
print(json.dumps(time.perf_counter() - start))
"""
MEMORY = """
import bizassist_nb.export.merge, bitsandbytes, msgspec, peft, transformers, json, sys, time, pathlib, re
from bizassist_nb.api import Run
from bizassist_nb.export import merge
from bizassist_nb.runs import records
merge.SHARD = int(sys.argv[3])
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text("utf-8"))[1]) * 1024
run = Run(pathlib.Path(sys.argv[1]))
before, start = peak(), time.perf_counter()
part = pathlib.Path(sys.argv[2]); part.mkdir()
merge.write(run, "trained", part)
written, seconds = peak(), time.perf_counter() - start
merge.merge(run)
parity = msgspec.to_builtins(run.last(records.Merge).parity)
print(json.dumps({"write_peak": written - before, "write_s": seconds, "merge_peak": peak() - before,
    "merge_s": time.perf_counter() - start - seconds, "imports": before, "parity": parity}))
"""


def python(code: str, *arguments: object) -> object:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def apart(ours: Path, theirs: Path) -> float:
    """The largest difference of two weights, in units of 2**-8 of themselves: both are rounded to bfloat16."""
    from safetensors.torch import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    return max(
        float(((left[name].float() - right[name].float()).abs() / (right[name].float().abs() * 2**-8 + 1e-6)).max())
        for name in left.keys() & right.keys()
    )


def main(run: Path, gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        turns = [(python(OURS, run, work / f"ours{i}"), python(PEFT, run, work / f"peft{i}")) for i in range(3)]
        ours, theirs = (min(seconds) for seconds in zip(*turns, strict=True))
        found = {
            "ours_s": ours,
            "peft_s": theirs,
            "ratio": ours / theirs,
            "apart": apart(work / "ours0", work / "peft0"),
        }
        shard = 200_000_000
        layers = round((gigabytes * 1e9 - 4 * 49152 * 1536) / (2 * (2.5 + 9) * 1536**2))
        size = large_base(work / "base", embedded_folder(), layers=layers, hidden=1536, shard=shard)
        memory = python(MEMORY, random_run(work / "large", work / "base").path, work / "written", shard)
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers", "peft")}
    print(json.dumps({"against_peft": found, "large": {"bytes": size, "shard": shard, **memory}, "versions": versions}))


main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.5)
