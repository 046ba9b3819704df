"""Base models: the embedded one's conversion, which base is taken, and its 4-bit weights."""

import errno
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import httpx
import huggingface_hub.constants
import msgspec
import psutil
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from huggingface_hub.errors import GatedRepoError
from peft import LoraConfig, get_peft_model
from random_run import random_run, save
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

from bizassist_nb.__main__ import main
from bizassist_nb.assistant import loaded
from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import ModelError
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import NAMES
from bizassist_nb.data.tokens import Example
from bizassist_nb.models import base as models
from bizassist_nb.models import embedded as making
from bizassist_nb.models.base import HUB_IDS, load_nf4, load_tokenizer, pinned, resolve, unpack
from bizassist_nb.models.embedded import embedded_folder
from bizassist_nb.models.named import NAMED
from bizassist_nb.training import preflight
from bizassist_nb.training.scoring import score


def adapted(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear"))


@pytest.fixture(scope="module")
def nf4(embedded):
    return load_nf4(embedded)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The embedded model converted here and now, whatever an earlier version left in the cache."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        folder = embedded_folder()
    yield folder
    shutil.rmtree(cache)  # 270 MB, which pytest would keep


def special_tokens(tokenizer) -> dict[str, tuple[str, int]]:
    roles = ("bos", "eos", "pad")
    return {role: (getattr(tokenizer, f"{role}_token"), getattr(tokenizer, f"{role}_token_id")) for role in roles}


RIGHT = {"bos": ("<|im_start|>", 1), "eos": ("<|im_end|>", 2), "pad": ("<|endoftext|>", 0)}


@pytest.mark.slow
def test_special_tokens_of_the_embedded_model_are_those_of_its_gguf_file(converted, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert special_tokens(tokenizer) == RIGHT
    tokenizer.save_pretrained(tmp_path)
    assert special_tokens(AutoTokenizer.from_pretrained(tmp_path)) == RIGHT
    load_tokenizer(converted).tokenizer.save_pretrained(tmp_path)
    chat = load_tokenizer(tmp_path)
    assert special_tokens(chat.tokenizer) == RIGHT
    assert (chat.end_id, chat.pad_id, chat.stop_ids) == (2, 0, {2})


@pytest.mark.slow
def test_the_embedded_model_generates_by_the_same_special_tokens(converted):
    for config in (AutoConfig.from_pretrained(converted), GenerationConfig.from_pretrained(converted)):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


@pytest.mark.slow
def test_conversion_leaves_only_the_finished_folder_and_gives_the_same_each_time(converted, embedded):
    assert {path.name for path in converted.parent.iterdir()} == {converted.name, ".lock"}
    names = {path.name for path in converted.iterdir()}
    assert names >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert names == {path.name for path in embedded.iterdir()}
    names.remove("tokenizer_config.json")  # transformers notes in it whether it was offline
    assert [name for name in names if not filecmp.cmp(converted / name, embedded / name, shallow=False)] == []


def test_the_embedded_model_answers(embedded, chat):
    """Its weights and tokenizer fit each other: an end token after an answer, and a word that is to be expected."""
    model = AutoModelForCausalLM.from_pretrained(embedded, dtype=torch.float32)
    prompt = chat.prompt([{"role": "user", "content": "What is the capital of France?"}])
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
    assert "Paris" in chat.decode(ids)
    assert ids[-1] == chat.end_id


KILLED = """
import os, signal
from pathlib import Path
from bizassist_nb.models import embedded
def convert(gguf, target):
    (target / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
embedded.convert_gguf = convert
embedded.embedded_folder()
"""


def test_a_conversion_that_is_killed_leaves_no_half_of_a_model(tmp_path, monkeypatch):
    killed = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert killed.returncode == -signal.SIGKILL
    cache = tmp_path / "bizassist_nb" / "2"
    assert {path.name for path in cache.iterdir()} == {".part", ".lock"}
    # The next one is not misled by what is left, and finishes.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(making, "convert_gguf", lambda gguf, target: (target / "config.json").write_text(gguf.name))
    folder = embedded_folder()
    assert {path.name for path in cache.iterdir()} == {folder.name, ".lock"}
    assert (folder / "config.json").read_text("utf-8") == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_conversion_that_fails_leaves_nothing_and_is_done_again(tmp_path, monkeypatch):
    def fail(_, target):
        (target / "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(making, "convert_gguf", fail)
    with pytest.raises(ModelError, match=r"No space left.*takes 0.3 GB there"):
        embedded_folder()
    assert [path.name for path in (tmp_path / "bizassist_nb" / "2").iterdir()] == [".lock"]
    monkeypatch.setattr(making, "convert_gguf", lambda _, target: (target / "config.json").touch())
    assert (embedded_folder() / "config.json").exists()


def test_names_stand_for_their_bases(embedded, tiny, monkeypatch):
    assert (resolve("mistral-7b").source, resolve("mistral-7b").reason) == (HUB_IDS["mistral-7b"], "asked for")
    assert (resolve("smollm2-135m").name, resolve("smollm2-135m").source) == ("smollm2-135m", str(embedded))
    assert (resolve("owner/name").name, resolve("owner/name").source) == ("owner/name", "owner/name")
    assert (resolve(str(tiny)).name, resolve(str(tiny)).source) == (str(tiny), str(tiny.resolve()))
    monkeypatch.chdir(tiny.parent)
    assert resolve(f"./{tiny.name}").source == str(tiny.resolve())


def test_the_named_bases_are_listed_alike_everywhere(capsys):
    assert main(["models"]) == 0
    rows = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(HUB_IDS) == list(NAMES[1:-2])
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
    for name, room, licence, hub, why in rows:
        assert f"| `{name}` | {room} | {licence} | `{hub}` | {why.split('; its weights')[0]}" in page
    assert all(("untested" in row[4]) == (row[0] != "smollm2-135m") for row in rows)


def test_numbers_of_the_named_bases_are_those_of_their_configs(embedded):
    assert preflight.Shape(**NAMED["smollm2-135m"].numbers) == preflight.shape(str(embedded))
    assert preflight.Shape(**NAMED["mistral-7b"].numbers) == preflight.Shape.of(MistralConfig(vocab_size=32768))
    # Without norms, which are thousands; as each model's page says, in billions.
    for name, size in (("qwen3-4b", 4.02), ("llama-3.2-3b", 3.21), ("smollm3-3b", 3.08), ("gemma-3-1b", 1.00)):
        shape = preflight.Shape(**NAMED[name].numbers)
        assert (shape.linear + shape.embeddings) / 1e9 == pytest.approx(size, abs=0.01)


def test_a_model_that_reads_images_is_refused(tmp_path):
    Gemma3Config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="gemma3 reads more than text"):
        preflight.shape(str(tmp_path))


def test_a_gated_base_says_how_to_get_access_before_it_is_loaded(monkeypatch):
    def gated(*_, **__):
        request = httpx.Request("GET", "https://huggingface.co")
        raise OSError("gated") from GatedRepoError("no", response=httpx.Response(403, request=request))

    monkeypatch.setattr("transformers.utils.cached_file", gated)
    with pytest.raises(ModelError, match=r"owner/name is gated: .*https://huggingface.co/owner/name.*hf auth login"):
        pinned(resolve("owner/name"))


@pytest.fixture
def hub_cache(tiny, tmp_path, monkeypatch):
    """Two commits of owner/base in the hub's cache, the second the newest, with another end token; their hashes."""
    first, second = "1" * 40, "2" * 40
    repository = tmp_path / "hub" / "models--owner--base"
    for commit in (first, second):
        shutil.copytree(tiny, repository / "snapshots" / commit)
    (repository / "snapshots" / second / "generation_config.json").write_text('{"eos_token_id": 17}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(second)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return first, second


def test_a_run_keeps_the_commit_of_its_base(hub_cache):
    first, second = hub_cache
    base = resolve("owner/base")
    assert pinned(base).revision == second
    assert load_tokenizer("owner/base", pinned(base).commit).stop_ids == {2, 17}
    old = loaded_base("owner/base", first)
    assert old.base.revision == first
    assert old.chat.stop_ids == {2}
    assert loaded_base("owner/base") is loaded_base("owner/base", second)


def test_a_folder_with_other_weights_than_a_run_was_made_on_is_refused(tiny, tmp_path):
    folder = Path(shutil.copytree(tiny, tmp_path / "base"))
    run = random_run(tmp_path / "run", folder)
    known = pinned(resolve(str(folder))).revision
    write_json(run.path / "environment.json", msgspec.structs.replace(run.environment, revision=known))
    assert Assistant(run).ask("Why?", max_new_tokens=1).tuned is not None
    loaded.bases.clear()
    weights = load_file(folder / "model.safetensors")
    save({name: each + 1 for name, each in weights.items()}, folder / "model.safetensors")
    for use in (lambda: Assistant(run).ask("Why?"), run.merge):
        with pytest.raises(ModelError, match="are not those that the run was trained on; bring these back"):
            use()
    assert not (run.path / "merged").exists()


def test_auto_without_a_gpu_takes_the_embedded_model_and_says_why(embedded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = resolve("auto")
    assert (base.name, base.source) == ("smollm2-135m", str(embedded))
    assert base.reason == "there is no CUDA GPU; Mistral-7B takes 7 GiB"


def test_auto_follows_the_free_memory_of_the_gpu(embedded, monkeypatch):
    monkeypatch.setattr(models, "free_gpu_memory", lambda: (6.5, "Tesla T4"))
    assert resolve("auto").source == str(embedded)
    assert resolve("auto").reason.startswith("Tesla T4 has only 6.5 GiB free")
    monkeypatch.setattr(models, "free_gpu_memory", lambda: (14.6, "Tesla T4"))
    assert (resolve("auto").name, resolve("auto").source) == ("mistral-7b", HUB_IDS["mistral-7b"])
    assert resolve("auto").reason.startswith("Tesla T4 has 14.6 GiB free")


@pytest.mark.parametrize(
    "model", ["mistral", "no/such/folder", "/no/such", "a b/c", "../x y", "~nobody-of-that-name/x"]
)
def test_unknown_names_list_what_a_model_can_be(model):
    with pytest.raises(ModelError, match=r'is neither "auto" nor mistral-7b, .*smollm2-135m, nor a folder that'):
        resolve(model)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "holds no model: it has no config.json"),
        (["model.safetensors"], "holds no model: it has no config.json"),
        (["config.json", "pytorch_model.bin"], "has no .safetensors weights; other formats can run code"),
        (["config.json", "model.gguf"], "has no .safetensors weights"),
    ],
)
def test_folders_without_safetensors_are_refused(tmp_path, files, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=said):
        resolve(str(tmp_path))


def test_a_model_that_cannot_be_loaded_says_what_to_check(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for source in (tmp_path, "no-such/model"):
        with pytest.raises(ModelError, match=f"the model of {source} cannot be loaded.*Check its name and the network"):
            load_nf4(source)


def test_weights_that_are_cut_short_are_a_model_error(tiny, tmp_path):
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_nf4(tmp_path)


def test_nf4_weights_count_what_they_stand_for(nf4):
    assert sum(parameter.numel() for parameter in nf4.parameters()) < 134_515_008
    assert adapted(deepcopy(nf4)).get_nb_trainable_parameters() == (4_884_480, 139_399_488)


def test_unpacked_weights_compute_the_same_without_being_unpacked_again(tiny, monkeypatch):
    model, ids = load_nf4(tiny), torch.arange(40)[None]
    before = model(ids).logits
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    unpack(model)  # no room, so nothing changes
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.undo()
    unpack(model)
    monkeypatch.setattr(Linear4bit, "forward", None)
    torch.testing.assert_close(model(ids).logits, before)


def test_mistral_has_the_parameters_of_the_recorded_run():
    with torch.device("meta"):
        mistral = MistralForCausalLM(MistralConfig(vocab_size=32_768))
        assert adapted(mistral).get_nb_trainable_parameters() == (41_943_040, 7_289_966_592)


def test_nf4_is_loaded_with_double_quantisation_in_evaluation_mode(nf4):
    linear = nf4.model.layers[0].mlp.gate_proj
    assert type(linear).__name__ == "Linear4bit"
    assert (linear.weight.quant_state.quant_type, linear.weight.quant_state.nested) == ("nf4", True)
    assert linear.weight.quant_state.dtype == models.compute_dtype()
    assert not nf4.training


def gradients(model, chat) -> dict[str, torch.Tensor]:
    ids = torch.tensor([chat.prompt([{"role": "user", "content": "What is a fish?"}])], device=model.device)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_scoring_leaves_the_gradients_of_training_as_they_were(tiny, tiny_chat):
    def fresh():
        torch.manual_seed(1)
        return adapted(load_nf4(tiny))

    ids = tiny_chat.prompt([{"role": "user", "content": "What is a bird?"}])
    scored = fresh()
    score(scored, [Example(1, ids, ids, truncated=False)], pad_id=tiny_chat.pad_id)
    before, after = gradients(fresh(), tiny_chat), gradients(scored, tiny_chat)
    assert before.keys() == after.keys()
    assert sum(bool(gradient.abs().max() > 0) for gradient in before.values()) == 14  # A's are 0 while B is
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_layer_is_left_that_would_repack_its_weights(tiny):
    model = load_nf4(tiny)
    linear = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    for module in linear:
        module.support_avx512bf16_for_cpu = True
    models.without_packing(model)
    assert [module.support_avx512bf16_for_cpu for module in linear] == [False] * 14
