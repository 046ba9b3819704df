"""Merge a full-size model on the GPU and on the CPU, and run the parity gate. Prints one JSON object.

Usage: merge.py BASE WORK     a folder with a base (Mistral-7B in NF4); makes a run in WORK with a random r = 16 adapter
       merge.py RUN WORK      a run directory without merged/; it has merged/ afterwards

Each step is a process of its own, so that its peaks are its own. WORK needs room for two merged models.
Memory is in bytes. "rss" is all of a process's memory, "anonymous" what of it is not a mapped file: the kernel takes
the pages of mapped files back when memory is short.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

# In the manner of Mistral v0.3, for a tokenizer that has no template of its own.
TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
[INST] {{ message['content'] }}[/INST]{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

STATUS = Path("/proc/self/status")


class Peaks(threading.Thread):
    """Watches this process's memory while it lives."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before, self.most = self.read(), {}
        self.start()

    def run(self):
        while True:
            for name, value in self.read().items():
                self.most[name] = max(self.most.get(name, 0), value)
            time.sleep(0.01)

    @staticmethod
    def read():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        names = {"rss": "VmRSS", "rss_peak": "VmHWM", "anonymous": "RssAnon"}
        return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items()}


def prepared(base, work):
    """A run of that base with a random adapter of rank 16, about a tenth as strong as the weights."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from bizassist_nb import models
    from bizassist_nb.export.weights import Weights
    from bizassist_nb.runs import Journal, write_json
    from bizassist_nb.settings import Settings

    tokenizer = AutoTokenizer.from_pretrained(base)
    if not tokenizer.chat_template:
        folder = work / "base"
        folder.mkdir()
        for path in base.iterdir():
            (folder / path.name).symlink_to(path.resolve())
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        base = folder
    run = work / "run"
    (run / "adapter").mkdir(parents=True)
    settings = Settings(model=str(base), data="sample", subset=64, held_out=32, runs_dir=str(work))
    (run / "settings.toml").write_text(settings.to_toml())
    write_json(
        run / "environment.json",
        {
            "model": str(base), "source": str(base), "engine": "transformers", "data": "sample", "fingerprint": "",
            "device": models.device(), "python": "", "versions": {},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {}
    for name, shape in Weights(str(base), nf4=True).shapes().items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in models.TARGETS:
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(16, shape[1]) / shape[1] ** 0.5
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(shape[0], 16) * 0.03
    save_file(tensors, run / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=list(models.TARGETS))
    config.base_model_name_or_path = str(base)
    config.save_pretrained(run / "adapter")
    models.load_tokenizer(base).tokenizer.save_pretrained(run / "adapter")
    Journal(run).write("state", state="finished")
    return run


def measured(work_on):
    """What it returns, with seconds and peaks."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the start of CUDA is not the merge's
    import bizassist_nb.export.merge  # noqa: F401 - nor are the imports

    peaks, start = Peaks(), time.perf_counter()
    found = work_on()
    return {
        "seconds": time.perf_counter() - start,
        "before": peaks.before,
        "peak": peaks.most,
        "gpu_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        **found,
    }


def step_gpu(run, _work):
    def merge():
        folder = run.merge()
        return {"event": run.last("merge"), "largest_shard": largest(folder)}

    return measured(merge)


def step_cpu(run, work):
    from bizassist_nb.export.merge import write

    folder = work / "cpu"
    folder.mkdir()

    def merge():
        size = write(run, "trained", folder)
        return {"bytes": size, "largest_shard": largest(folder)}

    return measured(merge)


def step_gate(run, work):
    """The gate on what the CPU wrote; the same with one tensor's adapter left out, and with one tensor zeroed."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from bizassist_nb import models
    from bizassist_nb.export import parity
    from bizassist_nb.export.weights import Weights

    folder, conversations = work / "cpu", parity.conversations(run)
    found, seconds = {}, {}

    def compare(name):
        start = time.perf_counter()
        found[name] = parity.compare(run, folder, conversations)
        seconds[name] = time.perf_counter() - start

    compare("cpu")
    apart = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as ours, safe_open(run.path / "merged" / path.name, "pt") as theirs:
            for name in ours.keys():  # noqa: SIM118 - not a dict
                a, b = (file.get_tensor(name).to(models.device()).float() for file in (ours, theirs))
                apart[name] = float(((a - b).abs() / (b.abs() + 1e-4)).max())
    source = Weights(models.resolve(run.environment["model"]).source, nf4=True)
    middle = [name for name in apart if name.endswith("mlp.down_proj.weight")]
    name = middle[len(middle) // 2]
    path = next(path for path in folder.glob("model*.safetensors") if name in safe_open(path, "pt").keys())  # noqa: SIM118
    tensors = load_file(path)
    for what in ("without_adapter", "zeroed"):
        weight = source.read(name).to(tensors[name].dtype).cpu()
        save_file(
            tensors | {name: weight if what == "without_adapter" else weight * 0}, path, metadata={"format": "pt"}
        )
        compare(what)
    return {"gate": found, "seconds": seconds, "gpu_and_cpu_apart": max(apart.values()), "changed": name}


def largest(folder):
    return max(path.stat().st_size for path in folder.glob("model*.safetensors"))


def in_process(step, run, work, **environment):
    command = [sys.executable, __file__, "--step", step, str(run), str(work)]
    start = time.perf_counter()
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env={**os.environ, **environment})
    if result.returncode:
        return {"failed": result.returncode, "said": result.stdout[-2000:]}
    return {**json.loads(result.stdout.splitlines()[-1]), "process_seconds": time.perf_counter() - start}


def main(base_or_run, work):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run = base_or_run if (base_or_run / "settings.toml").is_file() else prepared(base_or_run, work)
    found = {"gpu": in_process("gpu", run, work)}
    found["cpu"] = in_process("cpu", run, work, CUDA_VISIBLE_DEVICES="")
    found["gate"] = in_process("gate", run, work)
    import bitsandbytes
    import peft
    import torch
    import transformers

    found["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, peft, bitsandbytes)}
    found["device"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    print(json.dumps(found, indent=1))


if sys.argv[1] == "--step":
    from bizassist_nb.runs import Run

    print(json.dumps(globals()[f"step_{sys.argv[2]}"](Run(Path(sys.argv[3])), Path(sys.argv[4]))))
else:
    main(Path(sys.argv[1]), Path(sys.argv[2]))
