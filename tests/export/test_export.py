"""The merged model: what it is, that nothing broken passes for it, and what it costs."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from peft import PeftModel
from random_run import large_base, random_run, save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

from bizassist_nb.__main__ import main
from bizassist_nb.api import Run
from bizassist_nb.assistant.assistant import Assistant
from bizassist_nb.core.errors import DataError, ModelError, RunError
from bizassist_nb.export import merge, parity
from bizassist_nb.export.weights import TunedWeights, original
from bizassist_nb.models import base as models
from bizassist_nb.models.embedded import embedded_folder
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import take_lock

QUESTION = "How should we price a new feature?"


@pytest.fixture(scope="module")
def merged(trained):
    return trained.merge()


@pytest.fixture(scope="module")
def random(tiny, tmp_path_factory):
    """A run with a random adapter on the tiny model, merged."""
    run = random_run(tmp_path_factory.mktemp("random") / "random", tiny)
    run.merge()
    return run


@pytest.fixture
def copy(random, tmp_path):
    """The same run, not merged yet."""
    return Run(shutil.copytree(random.path, tmp_path / "copy", ignore=shutil.ignore_patterns("merged")))


def files(folder):
    return {path.name for path in folder.iterdir()}


def close(tensor, reference):
    """Equal to rounding in bfloat16."""
    torch.testing.assert_close(tensor.float(), reference.float(), rtol=2**-8, atol=1e-6)


# What it is


@pytest.mark.slow
def test_merged_model_answers_as_the_tuned_assistant(trained, merged):
    """With nothing but transformers, and the tokenizer and generation config that lie beside it."""
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = [{"role": "system", "content": trained.settings.system_prompt}, {"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = plain.float().generate(**ids, max_new_tokens=16)[0, ids["input_ids"].shape[1] :]
    tuned = Assistant(trained).ask(QUESTION, who=("tuned",), max_new_tokens=16).tuned
    assert tokenizer.decode(answer, skip_special_tokens=True).strip() == tuned


@pytest.mark.slow
def test_merged_weights_are_peft_s_to_rounding(trained, merged):
    base = PeftModel.from_pretrained(models.load_nf4(embedded_folder()).dequantize(), trained.adapter)
    reference = base.merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(merged).named_parameters():
        close(tensor, reference[name])


@pytest.mark.slow
def test_record_and_card_say_how_it_compared(trained, merged):
    event = trained.last(records.Merge)
    found = event.parity
    assert (event.base, found.passed, found.failures) == ("trained", True, [])
    assert event.bytes == 2 * 134_515_008
    assert found.prompts == trained.settings.held_out
    assert found.equal_next_tokens > 0.97
    assert found.equal_answers >= 0.75 * found.prompts
    assert found.difference < found.tolerance / 5
    assert found.largest_weight_error <= 1.01
    card = (merged / "README.md").read_text("utf-8")
    assert "library_name: transformers" in card
    assert f"{found.equal_next_tokens:.1%} of {found.positions} next tokens" in card


@pytest.mark.slow
def test_merged_folder_has_what_loaders_ask_for(trained, merged):
    assert files(merged) == {
        "model.safetensors", "config.json", "generation_config.json", "README.md", "verdict.png",
        *(files(trained.adapter) - {"adapter_model.safetensors", "adapter_config.json", "README.md", "loss.png"}),
    }  # fmt: skip
    ours, theirs = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(trained.adapter)
    assert ours.chat_template == theirs.chat_template
    saved = json.loads((merged / "tokenizer_config.json").read_text("utf-8"))
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"  # which transformers 4 knows, too
    assert (ours.eos_token, ours.pad_token, ours.bos_token) == ("<|im_end|>", "<|endoftext|>", "<|im_start|>")
    generation = GenerationConfig.from_pretrained(merged)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    assert not generation.do_sample
    config = json.loads((merged / "config.json").read_text("utf-8"))
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """The tiny model stored in NF4, in files so small that weights and their statistics are apart; it has two stops."""
    folder = tmp_path_factory.mktemp("stored")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=nf4, device_map="cpu", dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    change_json(folder / "generation_config.json", eos_token_id=[2, 17])
    return folder


def equal_to_peft(run, base):
    """Whether the run's tuned weights are those that PEFT makes of the dequantised base."""
    weights = TunedWeights(run, "trained")
    shapes = weights.shapes()
    reference = PeftModel.from_pretrained(models.load_nf4(base).dequantize(), run.adapter).merge_and_unload()
    for name, parameter in reference.named_parameters():
        assert shapes[name] == tuple(parameter.shape)
        torch.testing.assert_close(weights.read(name), parameter.data.float(), rtol=0, atol=1e-5)


def test_a_base_stored_in_nf4_is_read_as_the_chat_reads_it(stored, tmp_path):
    run = random_run(tmp_path / "stored", stored, held_out=20)
    equal_to_peft(run, stored)
    assert run.export("merged") == run.path / "merged"
    found = run.last(records.Merge).parity
    assert (found.passed, found.prompts) == (True, 16)
    assert GenerationConfig.from_pretrained(run.path / "merged").eos_token_id == [2, 17]


def test_a_16_bit_base_is_quantised_as_the_chat_quantises_it(random, tiny):
    equal_to_peft(random, tiny)


def test_shards_and_their_index_make_one_model(random, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "SHARD", 50_000)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    merge.write(random, "trained", sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 3
    ours = AutoModelForCausalLM.from_pretrained(sharded).state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(random.path / "merged").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_base_original_merges_into_the_16_bit_weights(copy, tiny, capsys):
    assert main(["export", "copy", "--to", "merged", "--base", "original", "--runs-dir", str(copy.path.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(copy.path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, copy.adapter).merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(copy.path / "merged").named_parameters():
        close(tensor, reference[name])
    found = copy.last(records.Merge).parity
    assert found.passed
    assert found.difference > 0.02  # it is not the model that was trained


def test_originals_of_unsloth_s_4_bit_bases_are_sought_under_their_own_name(stored):
    for name in ("owner/model-bnb-4bit", "owner/model-unsloth-bnb-4bit"):
        with pytest.raises(ModelError, match="the model of owner/model cannot be loaded"):
            original(name)
    with pytest.raises(ModelError, match="holds 4-bit weights only"):
        original(str(stored))


# That nothing broken passes for it


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes))


def change_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    save(tensors | {name: change(tensors[name])}, folder / "model.safetensors")


def zero_matrix(folder):
    change_tensor(folder, "model.layers.1.mlp.down_proj.weight", torch.zeros_like)


def change_weight(folder):
    def change(tensor):
        tensor[3, 5] += 0.01
        return tensor

    change_tensor(folder, "model.layers.0.self_attn.q_proj.weight", change)


def make_nan(folder):
    change_tensor(folder, "model.norm.weight", lambda tensor: tensor * float("nan"))


def leave_adapter_out(folder):
    source = json.loads((folder.parent / "environment.json").read_text("utf-8"))["source"]
    base = models.load_nf4(source).dequantize().get_parameter("model.layers.1.self_attn.v_proj.weight").data
    change_tensor(folder, "model.layers.1.self_attn.v_proj.weight", lambda tensor: base.to(tensor.dtype))


def swap_end_in_generation_config(folder):
    change_json(folder / "generation_config.json", eos_token_id=1)


def forget_end_in_generation_config(folder):
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", eos_token_id=None)


def swap_end_in_tokenizer(folder):
    change_json(folder / "tokenizer_config.json", eos_token="<|im_start|>")  # noqa: S106


def pad_with_end(folder):
    change_json(folder / "config.json", pad_token_id=2)


def change_template(folder):
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text("utf-8").replace("<|im_start|>", "<|im_start|> "))


def lose_template(folder):
    (folder / "chat_template.jinja").unlink()


def change_vocabulary(folder):
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = state["model"]["vocab"]
    words["Ġthe"], words["Ġa"] = words["Ġa"], words["Ġthe"]
    (folder / "tokenizer.json").write_text(json.dumps(state))


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("breaking", "said"),
    [
        (zero_matrix, "a weight is off by"),
        (change_weight, "a weight is off by"),
        (make_nan, "a weight is not a finite number"),
        (leave_adapter_out, "a weight is off by"),
        (swap_end_in_generation_config, "end, begin or pad tokens"),
        (forget_end_in_generation_config, "end, begin or pad tokens"),
        (swap_end_in_tokenizer, "end, begin or pad tokens"),
        (pad_with_end, "end, begin or pad tokens"),
        (change_template, "writes prompts differently"),
        (lose_template, "it cannot be loaded"),
        (change_vocabulary, "writes prompts differently"),
        (cut_short, "it cannot be loaded"),
    ],
)
def test_a_broken_merge_is_found_out(copy, monkeypatch, capsys, breaking, said):
    whole = merge.write

    def broken(run, base, part, show):
        size = whole(run, base, part, show)
        breaking(part)
        return size

    monkeypatch.setattr(merge, "write", broken)
    assert main(["export", "copy", "--to", "merged", "--runs-dir", str(copy.path.parent)]) == 1
    assert said in capsys.readouterr().err
    assert not files(copy.path) & {"merged", ".merged.part"}
    found = copy.last(records.Merge).parity
    assert not found.passed
    assert any(said in failure for failure in found.failures)


@pytest.mark.slow
def test_logits_alone_tell_a_zeroed_matrix_in_a_trained_model(trained, merged, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "largest_weight_error", lambda *_: 0.0)
    folder = shutil.copytree(merged, tmp_path / "broken")
    change_tensor(folder, "model.layers.15.mlp.down_proj.weight", torch.zeros_like)
    found = parity.compare(trained, folder, parity.conversations(trained)[:3])
    assert found.failures == [failure for failure in found.failures if "logits are off by" in failure] != []
    assert found.difference > 1.5 * found.tolerance
    assert found.equal_answers < 3


def test_what_has_no_room_in_memory_is_compared_from_the_disk(random, monkeypatch):
    conversations = parity.conversations(random)
    in_memory = msgspec.to_builtins(parity.compare(random, random.path / "merged", conversations))
    places = []
    load = AutoModelForCausalLM.from_pretrained

    def loaded(*arguments, **options):
        model = load(*arguments, **options)
        places.extend(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    monkeypatch.setattr(parity, "room", lambda: {"cpu": 2_300_000})
    from_disk = msgspec.to_builtins(parity.compare(random, random.path / "merged", conversations))
    assert from_disk == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in in_memory.items()
    }
    assert set(places) == {"cpu", "meta"}


@pytest.mark.parametrize(("others", "taken"), [(0, 38), (6, 2)])
def test_a_gpu_that_a_worker_uses_is_left_to_it(monkeypatch, others, taken):
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: ((40 - others) * gib, 46 * gib))
    assert parity.room()[0] == taken * gib


# What it costs, and what cannot be


# Anonymous memory: pages of the files it reads are the system's to drop, and how many stay is chance.
MEMORY = """
import re, sys, threading
from pathlib import Path
import bitsandbytes, transformers
import bizassist_nb.export.merge as merge
from bizassist_nb.api import Run
merge.SHARD = int(sys.argv[3])
def taken():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024
run = Run(Path(sys.argv[1]))
merge.TunedWeights(run, "trained")  # the base in NF4, with what loads it
before = taken()
seen, done = [before], threading.Event()
def watch():
    while not done.wait(0.001):
        seen.append(taken())
watching = threading.Thread(target=watch)
watching.start()
merge.write(run, "trained", Path(sys.argv[2]))
done.set()
watching.join()
print(max(seen) - before)
"""


@pytest.mark.slow
def test_merging_takes_the_memory_of_a_shard_beside_the_base_in_nf4(tiny, tmp_path):
    base, written, shard = tmp_path / "base", tmp_path / "written", 40_000_000
    base.mkdir()
    written.mkdir()
    size = large_base(base, tiny, layers=24, hidden=768, shard=100_000_000)
    assert size > 350_000_000
    run = random_run(tmp_path / "run", base)
    command = [sys.executable, "-c", MEMORY, str(run.path), str(written), str(shard)]
    taken = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert sum(path.stat().st_size for path in written.glob("model-*.safetensors")) > size
    largest = max(path.stat().st_size for path in written.glob("model-*.safetensors"))
    assert taken < largest + size / 2, taken


KILLED = """
import os, signal, sys
from pathlib import Path
import safetensors.torch
import bizassist_nb.export.merge as merge
from bizassist_nb.api import Run
save_file, merge.SHARD = safetensors.torch.save_file, 50_000
def save(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    if "00003" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = save
Run(Path(sys.argv[1])).merge()
"""


def test_a_merge_that_is_killed_leaves_no_half_model_and_can_be_done_again(copy):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(copy.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (copy.path / "merged").exists()
    assert len(files(copy.path / ".merged.part")) == 3
    folder = copy.merge()
    assert not (copy.path / ".merged.part").exists()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from bizassist_nb.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_disk_that_fills_up_is_said_and_nothing_is_left(copy):
    arguments = ["export", "copy", "--to", "merged", "--runs-dir", str(copy.path.parent)]
    result = subprocess.run([sys.executable, "-c", FULL, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "the merged model cannot be written to" in result.stderr
    assert "Traceback" not in result.stderr
    assert not files(copy.path) & {"merged", ".merged.part"}


def test_room_on_the_disk_is_looked_at_before_anything_is_written(copy, monkeypatch):
    usage = shutil.disk_usage(copy.path)._replace(free=30_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_, **__: pytest.fail("something was written"))
    with pytest.raises(RunError, match=r"takes 0\.1 GB and .* has 0\.0 GB free"):
        copy.merge()
    assert not files(copy.path) & {"merged", ".merged.part"}


def test_whoever_may_read_its_folder_may_read_a_merged_model(random):
    folder = random.path / "merged"
    assert {path.stat().st_mode & 0o666 for path in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_merging_again_is_refused(random):
    before = (random.path / "merged" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(RunError, match="exists already"):
        random.merge()
    assert not (random.path / ".merged.part").exists()
    assert (random.path / "merged" / "model.safetensors").stat().st_mtime_ns == before


def test_two_merges_at_once_are_refused(copy):
    part = copy.path / ".merged.part"
    part.mkdir()
    descriptor = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="is being written by another process"):
            copy.merge()
        assert part.is_dir()
    finally:
        os.close(descriptor)


def test_a_run_in_training_is_not_merged(copy):
    lock = take_lock(copy.path)
    try:
        with pytest.raises(RunError, match="is being trained"):
            copy.merge()
    finally:
        os.close(lock)


def test_a_run_without_an_adapter_is_refused(copy):
    shutil.rmtree(copy.adapter)
    with pytest.raises(ModelError, match="has no adapter"):
        copy.merge()
    with pytest.raises(ModelError, match="has no adapter"):
        copy.export("adapter")


def test_an_adapter_of_another_base_is_refused(copy, trained):
    shutil.rmtree(copy.path / "adapter")
    shutil.copytree(trained.adapter, copy.path / "adapter")
    with pytest.raises(ModelError, match="was made for another base"):
        copy.merge()
    assert not files(copy.path) & {"merged", ".merged.part"}


def test_a_base_that_cannot_be_reached_is_said(copy):
    change_json(copy.path / "environment.json", model="no-such/model")
    with pytest.raises(ModelError, match="the config of no-such/model cannot be loaded"):
        copy.merge()


def test_rows_that_are_gone_are_said_before_anything_is_written(tiny, tmp_path, rows_file, monkeypatch):
    rows = [{"instruction": f"What is {i}?", "response": f"It is {i}."} for i in range(40)]
    run = random_run(tmp_path / "run", tiny, data=str(rows_file(rows)))
    Path(run.settings.data).unlink()
    monkeypatch.setattr(merge, "write", lambda *_: pytest.fail("something was written"))
    with pytest.raises(DataError, match="there is no file"):
        run.merge()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "merged", "--repo", "me/ours"], "a repository is for an export to the hub"),
        (["--to", "adapter", "--private"], "a repository is for an export to the hub"),
        (["--to", "adapter", "--base", "original"], "another base is for an export to merged"),
    ],
)
def test_options_that_mean_nothing_are_refused(copy, capsys, arguments, words):
    assert main(["export", "copy", *arguments, "--runs-dir", str(copy.path.parent)]) == 1
    assert words in capsys.readouterr().err
