"""`bizassist finetune` against a plain TRL script, on a CPU. Usage: against_trl.py [ROWS]

Both train the embedded model in NF4 on the same tokenised rows in the same order, from the same seed, with the same
hyper-parameters. They take turns three times; of each step the fastest time counts: a shared machine only adds to it.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bizassist_nb import Settings, finetune
from bizassist_nb.data.rows import read_table, split
from bizassist_nb.models import base as models
from bizassist_nb.models.embedded import embedded_folder

PLAIN = """
import json, sys, time, torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer
folder, rows = sys.argv[1], json.load(open(sys.argv[2]))
torch.manual_seed(42)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.float32)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, dtype=torch.float32)
layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules=layers))
seconds, last = [], 0
class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        global last
        last = time.monotonic()
    def on_log(self, a, s, c, logs=None, **_):
        global last
        if "loss" in logs:
            seconds.append(time.monotonic() - last)
            last = time.monotonic()
steps = -(-len(rows) // 4)
config = SFTConfig(output_dir=sys.argv[3], per_device_train_batch_size=4, max_steps=steps, learning_rate=2e-4,
    warmup_steps=0, lr_scheduler_type="linear", optim="adamw_torch", seed=42, train_sampling_strategy="sequential",
    max_length=2048, bf16=False, gradient_checkpointing=False, use_cpu=True, save_strategy="no", logging_steps=1,
    report_to="none", disable_tqdm=True)
trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
    processing_class=AutoTokenizer.from_pretrained(folder))
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"losses": losses, "seconds": seconds}))
"""


def ours(count: int, folder: Path) -> tuple[list[float], list[float]]:
    settings = Settings(
        model="smollm2-135m", data="sample", subset=count, held_out=2, warmup_steps=0, engine="transformers",
        runs_dir=str(folder),
    )  # fmt: skip
    run = finetune(settings)
    return [step.loss for step in run.steps], [step.seconds for step in run.steps]


def plain(rows: Path, folder: Path) -> tuple[list[float], list[float]]:
    command = [sys.executable, "-c", PLAIN, str(embedded_folder()), str(rows), str(folder)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    found = json.loads(out.splitlines()[-1])
    return found["losses"], found["seconds"]


def main(count: int) -> None:
    chat = models.load_tokenizer(embedded_folder())
    training, _ = split(read_table("sample").rows, subset=count, held_out=2, seed=42)
    examples, _ = chat.examples(training, system_prompt=Settings().system_prompt, max_length=2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows.json"
        rows.write_text(json.dumps([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]))
        turns = [(ours(count, folder), plain(rows, folder / "plain")) for _ in range(3)]
    apart = max(abs(a - b) for a, b in zip(turns[0][0][0], turns[0][1][0], strict=True))
    fastest = [[min(step) for step in zip(*(turn[who][1] for turn in turns), strict=True)] for who in (0, 1)]
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")
    }
    print(
        json.dumps(
            {
                "largest_loss_difference": apart,
                "seconds_a_step": {
                    "ours": sum(fastest[0]) / len(fastest[0]),
                    "plain": sum(fastest[1]) / len(fastest[1]),
                },
                "ratio": sum(fastest[0]) / sum(fastest[1]),
                "versions": versions,
            }
        )
    )


main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
