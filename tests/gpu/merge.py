"""Merge a full-size model and compare it, on a GPU; break it; write it on the CPU. Prints a JSON line for each step.

Usage: merge.py BASE WORK     a folder with a base (Mistral-7B in NF4); makes a run in WORK with a random r = 16 adapter
       merge.py RUN WORK      a run directory without merged/; it has merged/ afterwards

Each step is a process of its own, so that its peaks are its own. WORK needs room for two merged models. The aims are
60 s and 6 GB of memory for the merge with its comparison.
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

import msgspec

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
        lines = dict(line.split(":", 1) for line in STATUS.read_text("utf-8").splitlines())
        names = {"rss": "VmRSS", "rss_peak": "VmHWM", "anonymous": "RssAnon"}
        return {name: int(lines[key].split()[0]) * 1024 for name, key in names.items()}


def prepared(base, work):
    """A run of that base with a random adapter of rank 16, about a tenth as strong as the weights."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from bizassist_nb.core.files import write_json
    from bizassist_nb.core.settings import Settings
    from bizassist_nb.models import base as models
    from bizassist_nb.runs import records
    from bizassist_nb.runs.journal import Journal

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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    for layer, module in model.named_modules():
        if layer.rpartition(".")[2] in models.linear_layers(model):
            inner, outer = module.in_features, module.out_features
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(16, inner) / inner**0.5
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(outer, 16) * 0.03
    save_file(tensors, run / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=models.linear_layers(model))
    config.base_model_name_or_path = str(base)
    config.save_pretrained(run / "adapter")
    models.load_tokenizer(base).tokenizer.save_pretrained(run / "adapter")
    Journal(run).write(records.State(state="finished"))
    return run


def measured(work_on):
    """What it returns, with seconds and peaks."""
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # the start of CUDA is not the merge's
    import bizassist_nb.export.merge  # noqa: F401 - nor are the imports

    peaks, start = Peaks(), time.perf_counter()
    found = work_on()
    cuda = {"gpu_peak": torch.cuda.max_memory_allocated(), "gpu_peak_reserved": torch.cuda.max_memory_reserved()}
    return {
        "seconds": time.perf_counter() - start,
        "before": peaks.before,
        "peak": peaks.most,
        **(cuda if torch.cuda.is_available() else {}),
        **found,
    }


def step_merge(run, _work):
    """`Run.merge()` as a user calls it: written, loaded again and compared."""
    from bizassist_nb.core.errors import BizassistError
    from bizassist_nb.runs import records

    said = []

    def merge():
        start = time.perf_counter()
        try:
            run.export("merged", show=lambda line: said.append([round(time.perf_counter() - start, 2), line]))
        except BizassistError as error:
            return {"error": str(error), "event": msgspec.to_builtins(run.last(records.Merge))}
        return {"event": msgspec.to_builtins(run.last(records.Merge)), "largest_shard": largest(run.path / "merged")}

    return {**measured(merge), "said": said}


def step_gate(run, _work):
    """What was merged, broken in several ways one after the other: each has to fail."""
    from bitsandbytes.functional import dequantize_4bit
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from bizassist_nb.export import parity
    from bizassist_nb.export.weights import TunedWeights

    folder, conversations = run.path / "merged", parity.conversations(run)
    model = TunedWeights(run, "trained").loaded.model
    name = f"model.layers.{model.config.num_hidden_layers // 2}.mlp.down_proj.weight"
    base = model.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.base_layer.weight")
    path = next(path for path in folder.glob("model*.safetensors") if name in safe_open(path, "pt").keys())  # noqa: SIM118
    tensors, found = load_file(path), {}
    tokenizer, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"

    def compare(what):
        start = time.perf_counter()
        result = parity.compare(run, folder, conversations)
        found[what] = {**msgspec.to_builtins(result), "seconds": time.perf_counter() - start}

    def save(weight):
        save_file(tensors | {name: weight}, path, metadata={"format": "pt"})

    compare("whole")
    save(dequantize_4bit(base.data, base.quant_state).to(tensors[name].dtype).cpu())
    compare("one tensor without its adapter")
    save(tensors[name] * 0)
    compare("one tensor zeroed")
    save(tensors[name])
    for file, change in (
        (tokenizer, lambda text: json.dumps(json.loads(text) | {"eos_token": "[INST]"})),
        (template, lambda text: text.replace("[INST]", "[INST] ")),
    ):
        whole = file.read_text("utf-8")
        file.write_text(change(whole), "utf-8")
        compare(f"changed {file.name}")
        file.write_text(whole, "utf-8")
    return {"gate": found, "changed": name}


def step_cpu(run, work):
    """Written on a CPU, from weights dequantised in float32, not rounded to bfloat16 before the adapter is added."""
    from bizassist_nb.export.merge import write

    folder = work / "cpu"
    folder.mkdir()

    def merge():
        size = write(run, "trained", folder)
        return {"bytes": size, "largest_shard": largest(folder)}

    return measured(merge)


def step_apart(run, work):
    """The largest difference of what GPU and CPU wrote, in units of 2**-8 of each weight."""
    from safetensors import safe_open

    from bizassist_nb.models import base as models

    worst = 0.0
    for path in sorted((work / "cpu").glob("model*.safetensors")):
        with safe_open(path, "pt") as ours, safe_open(run.path / "merged" / path.name, "pt") as theirs:
            for name in ours.keys():  # noqa: SIM118 - not a dict
                a, b = (file.get_tensor(name).to(models.device()).float() for file in (ours, theirs))
                least = b.square().mean().sqrt() * 2**-12
                worst = max(worst, float(((a - b).abs() / (b.abs() * 2**-8 + least)).max()))
    return {"apart": worst}


def largest(folder):
    return max(path.stat().st_size for path in folder.glob("model*.safetensors"))


def in_process(step, run, work, seconds, **environment):
    command = [sys.executable, __file__, "--step", step, str(run), str(work)]
    start = time.perf_counter()
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=False, timeout=seconds, env={**os.environ, **environment}
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {seconds} s"}
    took = time.perf_counter() - start
    if result.returncode:
        return {"failed": result.returncode, "said": result.stdout[-2000:], "process_seconds": took}
    return {**json.loads(result.stdout.splitlines()[-1]), "process_seconds": took}


def tell(step, **found):
    print(json.dumps({"step": step, **found}), flush=True)


def main(base_or_run, work):
    import bitsandbytes
    import peft
    import safetensors
    import torch
    import transformers

    modules = (torch, transformers, peft, bitsandbytes, safetensors)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    tell("machine", device=device, versions={module.__name__: module.__version__ for module in modules})
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run = base_or_run if (base_or_run / "settings.toml").is_file() else prepared(base_or_run, work)
    merged = in_process("merge", run, work, 300)
    tell("merge", **merged)
    if "event" in merged:
        ram, anonymous = merged["peak"]["rss_peak"], merged["peak"]["anonymous"]
        tell("aims", seconds=[merged["seconds"], 60], rss=[ram, 6e9], anonymous=[anonymous, 6e9],
             passed=merged["event"]["parity"]["passed"])  # fmt: skip
    tell("gate", **in_process("gate", run, work, 240))
    tell("cpu", **in_process("cpu", run, work, 240, CUDA_VISIBLE_DEVICES=""))
    tell("apart", **in_process("apart", run, work, 120))
    shutil.rmtree(work / "cpu", ignore_errors=True)


if sys.argv[1] == "--step":
    from bizassist_nb.runs.run import Run

    print(json.dumps(globals()[f"step_{sys.argv[2]}"](Run(Path(sys.argv[3])), Path(sys.argv[4]))))
else:
    main(Path(sys.argv[1]), Path(sys.argv[2]))
