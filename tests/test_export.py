"""What is taken home: the merged model, and the adapter on a hub."""

import base64
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from bizassist_nb import models
from bizassist_nb.errors import ModelError, RunError
from bizassist_nb.runs import Run

TOKEN = "hf_markerTokenThatMustNotBeSeen"


@pytest.fixture(scope="module")
def merged(trained):
    return trained.merge()


def test_merged_model_is_the_tuned_one_in_16_bits(trained, merged):
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    assert (plain.generation_config.eos_token_id, plain.generation_config.pad_token_id) == (2, 0)
    tuned = PeftModel.from_pretrained(models.load_nf4(models.embedded_folder()), trained.adapter).eval()
    chat = models.load_tokenizer(merged)
    ids = torch.tensor([chat.prompt([{"role": "user", "content": "How should we price a feature?"}])])
    with torch.inference_mode():
        ours, theirs = plain.float()(input_ids=ids).logits[0], tuned(input_ids=ids).logits[0]
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.9
    assert (ours - theirs).abs().mean() < 0.1  # bfloat16 has eight bits


def test_merged_weights_are_base_plus_adapter_to_rounding(trained, merged):
    base = PeftModel.from_pretrained(models.load_nf4(models.embedded_folder()).dequantize(), trained.adapter)
    reference = base.merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(merged)
    for name, tensor in plain.named_parameters():
        torch.testing.assert_close(tensor, reference[name].to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def test_merged_tokenizer_keeps_template_and_special_tokens(trained, merged):
    ours, theirs = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(trained.adapter)
    assert ours.chat_template == theirs.chat_template
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|im_end|>", "<|endoftext|>", "<|im_start|>")


def test_merging_again_is_refused(trained, merged):
    with pytest.raises(RunError, match="exists already"):
        trained.merge()


def test_a_run_without_an_adapter_is_refused(trained, tmp_path):
    copy = Run(shutil.copytree(trained.path, tmp_path / "bare", ignore=shutil.ignore_patterns("adapter", "merged")))
    with pytest.raises(ModelError, match="has no adapter"):
        copy.merge()


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload of small files uses."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body))
        answer = {"url": f"http://127.0.0.1:{self.server.server_port}/me/ours"}
        if self.path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif self.path.endswith("/commit/main"):
            answer = {
                "commitUrl": f"http://127.0.0.1:{self.server.server_port}/me/ours/commit/1",
                "commitOid": "1",
                "hookOutput": "",
            }
        self.reply(answer)

    def do_GET(self):
        self.reply({"id": "me/ours", "sha": "0", "siblings": []})

    def reply(self, answer):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def export(run, *arguments, **environment):
    command = [sys.executable, "-m", "bizassist_nb", "export", run.name, "--to", "hub", *arguments]
    command += ["--runs-dir", str(run.path.parent)]
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_upload_sends_adapter_tokenizer_and_card_in_one_commit(trained, hub):
    result = export(trained, "--repo", "me/ours", "--private", HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("/me/ours")
    assert TOKEN not in result.stdout + result.stderr
    paths = [path for path, _, _ in hub.seen]
    assert paths[0] == "/api/repos/create"
    created = json.loads(hub.seen[0][2])
    assert created.get("visibility") == "private" or created.get("private") is True  # it changed within 1.x
    assert all(header == f"Bearer {TOKEN}" for _, header, _ in hub.seen)
    (commit,) = [body for path, _, body in hub.seen if path.endswith("/commit/main")]
    sent = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in map(json.loads, commit.splitlines())
        if line["key"] == "file"
    }
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert sent[name] == (trained.adapter / name).read_bytes()
    assert sent["README.md"] == (trained.path / "README.md").read_bytes()
    assert TOKEN.encode() not in b"".join(sent.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "OWNER/NAME"), (["--repo", "no slash"], "OWNER/NAME"), (["--repo", "me/ours"], "failed")],
)
def test_upload_that_cannot_be_says_why(trained, arguments, words):
    result = export(trained, *arguments, HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert TOKEN not in result.stderr
