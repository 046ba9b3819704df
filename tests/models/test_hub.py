"""The adapter given away: its folder with a model card, and the upload to a local stand-in for the hub."""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import msgspec
import pytest
import yaml
from huggingface_hub import ModelCard
from random_run import random_run

from bizassist_nb.api import Run
from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.loaded import LoadedBase
from bizassist_nb.core.errors import brief
from bizassist_nb.core.files import write_json
from bizassist_nb.models import base as models
from bizassist_nb.models.embedded import embedded_folder
from bizassist_nb.results.model_card import card

TOKEN = "hf_markerTokenThatMustNotBeSeen"


@pytest.fixture
def run(tiny, tmp_path):
    return random_run(tmp_path / "ours", tiny)


# The card


def test_card_is_in_the_hub_s_format_and_says_what_matters(trained):
    text = (trained.path / "README.md").read_text("utf-8")
    head = ModelCard(text).data
    assert head.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (head.library_name, head.pipeline_tag) == ("peft", "text-generation")
    assert {"lora", "qlora", "bizassist-nb"} == set(head.tags)
    assert trained.evaluation.sentence in text
    assert "**licence of the data**: Apache-2.0" in text
    assert "| rank | 16 |" in text
    for package in ("torch", "peft", "transformers", "bizassist-nb"):
        assert f"{package} {trained.environment.versions[package]}" in text
    assert str(trained.path.parent) not in text


@pytest.mark.parametrize(
    ("data", "datasets", "licence"),
    [
        ("dolly", ["databricks/databricks-dolly-15k"], "CC BY-SA 3.0"),
        ("owner/rows", ["owner/rows"], "see the data set's page"),
        ("/home/somebody/secret/rows.csv", None, "ask the data's owner"),
    ],
)
def test_card_names_data_and_licence_but_no_path(run, data, datasets, licence):
    settings = (run.path / "settings.toml").read_text("utf-8").replace('data = "sample"', f'data = "{data}"')
    (run.path / "settings.toml").write_text(settings)
    write_json(run.path / "environment.json", msgspec.structs.replace(run.environment, data=data, model="owner/base"))
    text = card(run)
    assert ModelCard(text).data.datasets == datasets
    assert ModelCard(text).data.base_model == "owner/base"
    assert licence in text
    assert "somebody" not in text


@pytest.mark.slow
def test_the_card_s_own_code_loads_the_adapter_and_answers_as_the_tuned_assistant(trained, tmp_path):
    folder = shutil.copytree(trained.export("adapter"), tmp_path / "given")
    text = (folder / "README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(embedded_folder()))
    for gpu, cpu in (("torch.bfloat16", "torch.float32"), ('"auto"', '"cpu", dtype=torch.float32'), ("=256", "=6")):
        assert gpu in code
        code = code.replace(gpu, cpu)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    # Of few tokens, as further on two may be as likely to a hundredth, and arithmetic in another order takes the other.
    tuned = Assistant(trained).ask("How should we price a new feature?", who=("tuned",), max_new_tokens=6).tuned
    assert result.stdout.strip() == tuned


def test_exported_adapter_is_whole_and_names_no_path_of_this_machine(run):
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    folder = run.export("adapter")
    assert folder == run.path / "adapter"
    assert {path.name for path in folder.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md",
    }  # fmt: skip
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    base = run.environment.model
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == base.split("/")[-1]
    for name in ("README.md", "adapter_config.json"):
        assert base not in (folder / name).read_text("utf-8")


def test_an_exported_adapter_is_still_the_run_s_own(trained):
    """The base goes by its hub name in it then."""
    folder = trained.export("adapter")
    made_for = json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"]
    assert made_for == "HuggingFaceTB/SmolLM2-135M-Instruct"
    loaded = LoadedBase(models.resolve("smollm2-135m"))
    assert loaded.adapter(trained)


# The upload


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's interface as an upload uses; large files go to its store, the rest into the commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization"), body))
        if hub.refuse and self.path.endswith(hub.refuse):
            self.reply({}, 403, {"X-Error-Message": f"not for {self.headers.get('Authorization')}"})
        elif self.path.endswith("/api/validate-yaml"):
            content = json.loads(body)["content"]
            yaml.safe_load(content.split("---")[1])
            self.reply({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.reply(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.reply({"transfer": "basic", "objects": [self.place(each) for each in json.loads(body)["objects"]]})
        elif self.path.endswith("/commit/main"):
            self.reply({"commitUrl": f"{hub.address}/me/ours/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self.reply({"url": f"{hub.address}/me/ours"}, 409 if hub.exists else 200)

    def place(self, file):
        """Where a large file is to be put; nowhere if the store has it."""
        known = file["oid"] in self.server.store
        actions = {} if known else {"actions": {"upload": {"href": f"{self.server.address}/store/{file['oid']}"}}}
        return {"oid": file["oid"], "size": file["size"], **actions}

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.put.append(len(body))
        if self.server.busy:
            self.server.busy -= 1
            self.reply({}, 503)
            return
        self.server.store[self.path.rpartition("/")[2]] = body
        self.reply({})

    def do_GET(self):
        self.reply({"id": "me/ours", "sha": "0", "siblings": [], "private": self.server.private})

    def reply(self, answer, status=200, headers=None):
        body = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.seen, server.put, server.store, server.refuse, server.busy = [], [], {}, "", 0
    server.exists, server.private = False, True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def upload(run: Run, *arguments, endpoint):
    command = [sys.executable, "-m", "bizassist_nb", "export", run.name, "--to", "hub", *arguments]
    command += ["--runs-dir", str(run.path.parent)]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",  # the stand-in has no such store
        "HF_ENDPOINT": endpoint,
    }
    result = subprocess.run(command, capture_output=True, encoding="utf-8", env=env, check=False)
    assert TOKEN not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


def committed(hub):
    """(name: content) of small files, (name: SHA-256) of large ones, in the one commit."""
    (commit,) = [body for path, _, body in hub.seen if path.endswith("/commit/main")]
    lines = [json.loads(line) for line in commit.splitlines()]
    small = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    return small, {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}


def test_upload_sends_adapter_tokenizer_and_card_in_one_commit(run, hub):
    result = upload(run, "--repo", "me/ours", "--private", endpoint=hub.address)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{hub.address}/me/ours"
    assert "adapter_model.safetensors: 100%" in result.stderr  # huggingface_hub's progress
    paths = [path for path, _, _ in hub.seen]
    assert paths[0] == "/api/repos/create"
    created = json.loads(hub.seen[0][2])
    assert created.get("visibility") == "private" or created.get("private") is True  # it changed within 1.x
    assert all(header == f"Bearer {TOKEN}" for _, header, _ in hub.seen)
    small, large = committed(hub)
    assert set(small) | set(large) == {path.name for path in run.adapter.iterdir()}
    for name, content in small.items():
        assert content == (run.adapter / name).read_bytes()
    weights = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert large == {"adapter_model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert list(hub.store.values()) == [weights]
    assert TOKEN.encode() not in b"".join(small.values())
    (validated,) = {json.loads(body)["content"] for path, _, body in hub.seen if path.endswith("/validate-yaml")}
    assert validated.encode() == small["README.md"]


def test_nothing_private_goes_into_a_repository_that_is_public(run, hub):
    hub.exists, hub.private = True, False
    result = upload(run, "--repo", "me/ours", "--private", endpoint=hub.address)
    assert result.returncode == 1
    assert "me/ours is on the hub already and is public, so nothing was uploaded" in result.stderr
    assert [path for path, _, _ in hub.seen] == ["/api/repos/create"]


@pytest.mark.slow
def test_an_upload_that_was_cut_off_goes_on_where_it_was(run, hub):
    hub.refuse = "/commit/main"
    result = upload(run, "--repo", "me/ours", endpoint=hub.address)
    assert result.returncode == 1
    assert "what the hub has already is not sent twice" in result.stderr
    assert len(hub.put) == 1
    hub.refuse = ""
    hub.seen.clear()
    assert upload(run, "--repo", "me/ours", endpoint=hub.address).returncode == 0
    assert len(hub.put) == 1
    small, large = committed(hub)
    assert len(large) == 1
    assert "README.md" in small


@pytest.mark.slow
def test_a_hub_that_is_busy_for_a_moment_is_tried_again(run, hub):
    hub.busy = 1
    assert upload(run, "--repo", "me/ours", endpoint=hub.address).returncode == 0
    assert len(hub.put) == 2
    assert len(hub.store) == 1


def test_a_refusal_that_repeats_the_token_is_shown_without_it(run, hub):
    hub.refuse = "/preupload/main"
    result = upload(run, "--repo", "me/ours", endpoint=hub.address)
    assert result.returncode == 1
    assert "not for Bearer (the token)" in result.stderr


@pytest.mark.parametrize("before", [0, 180, 199, 300])
def test_no_part_of_a_token_stays_where_an_error_is_cut(before, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = brief(ValueError("x" * before + TOKEN + "y" * 300))
    assert TOKEN[:3] not in said
    assert len(said) == len("ValueError: ") + 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [([], "OWNER/NAME"), (["--repo", "no slash"], "OWNER/NAME"), (["--repo", "me/ours"], "failed")],
)
def test_upload_that_cannot_be_says_why(run, arguments, words):
    result = upload(run, *arguments, endpoint="http://127.0.0.1:9")
    assert result.returncode == 1
    assert words in result.stderr
