"""Shared parts: real ones, made once a session."""

import json
import os
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

# Nothing here reaches a hub; a test that tries is told so at once instead of after minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


# What takes longest begins first, so that processes side by side end at about the same time; and before all that what
# makes `trained`, for which the others would wait.
LONGEST = (
    "test_training", "test_hurt", "test_panel", "mistral-business-assistant-lora", "test_export", "test_assistant",
    "quickstart", "test_kills", "test_several", "test_looks", "test_outages",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def dolly() -> str:
    """The published Dolly file; set as BIZASSIST_DOLLY for the whole session."""
    path = os.environ.get("BIZASSIST_DOLLY")
    if not path and os.environ.get("CI"):
        pytest.fail("CI has to set BIZASSIST_DOLLY")
    if not path:
        pytest.skip("BIZASSIST_DOLLY does not name the Dolly file")
    return path


@pytest.fixture(scope="session")
def embedded() -> Path:
    """Folder of the embedded model."""
    from bizassist_nb.models import embedded_folder

    return embedded_folder()


@pytest.fixture(scope="session")
def chat(embedded):
    """The embedded model's chat tokenizer."""
    from bizassist_nb.models import load_tokenizer

    return load_tokenizer(embedded)


@pytest.fixture(scope="session")
def tiny(embedded, tmp_path_factory) -> Path:
    """A model with the embedded one's tokenizer, two small random layers and nothing to say: for speed only."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def mistral_chat(tmp_path_factory):
    """Mistral-7B-Instruct-v0.3's own tokenizer, made from the SentencePiece model that mistral-common ships."""
    from mistral_tokenizer import build

    from bizassist_nb.models import load_tokenizer

    return load_tokenizer(build(tmp_path_factory.mktemp("mistral")))


@pytest.fixture
def rows_file(tmp_path):
    """Write rows to a .jsonl file and give its path."""

    def write(rows, name="rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return write


@pytest.fixture
def ended(tmp_path):
    """Ends what a test that failed has left running in its folder."""
    yield
    for process in psutil.process_iter(["cmdline"]):
        if str(tmp_path) in " ".join(process.info["cmdline"] or []):
            process.kill()


@pytest.fixture(scope="session")
def trained(embedded, tmp_path_factory, worker_id):
    """A real run: the embedded model, fine-tuned on 16 of the package's rows, by the engine that "auto" takes.

    One for all processes of the test session, so no test may change it.
    """
    from bizassist_nb import Settings, finetune, open_run

    folder = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        folder = folder.parent
    settings = Settings(
        data="sample", subset=16, held_out=8, max_length=384, learning_rate=2e-3, runs_dir=str(folder / "runs")
    )
    with FileLock(folder / "trained.lock"):
        if (folder / "runs" / "trained" / "evaluation.json").exists():
            return open_run("trained", folder / "runs")
        return finetune(settings, "trained")
