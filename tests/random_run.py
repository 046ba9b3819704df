"""A run whose adapter was never trained: for what does not depend on what was learned."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bizassist_nb.api import Run
from bizassist_nb.core.files import write_json
from bizassist_nb.core.settings import Settings
from bizassist_nb.data.rows import read_table
from bizassist_nb.models import base as models
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.rows import SPLIT


def random_run(path: Path, base: Path, **changes) -> Run:
    """A finished run of that base in `path`, its adapter random in both of its matrices."""
    settings = Settings(
        **{"model": str(base), "data": "sample", "subset": 24, "held_out": 6, "runs_dir": str(path.parent), **changes}
    )
    path.mkdir(parents=True)
    (path / "settings.toml").write_text(settings.to_toml())
    write_json(path / "environment.json", environment(str(base), read_table(settings.data).fingerprint))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models_config(base))
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=models.linear_layers(model))
    model = get_peft_model(model, config)
    random = torch.Generator().manual_seed(1)
    tensors = {
        name.replace(".default", ""): torch.randn(parameter.shape, generator=random) * 0.05
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.peft_config["default"].save_pretrained(path / "adapter")
    save(tensors, path / "adapter" / "adapter_model.safetensors")
    models.load_tokenizer(base).tokenizer.save_pretrained(path / "adapter")
    Journal(path).write(records.State(state="finished"))
    return Run(path)


def environment(model: str, fingerprint: str) -> records.Environment:
    """What environment.json holds."""
    return records.Environment(
        model=model, source=model, engine="transformers", data="sample", fingerprint=fingerprint, device="CPU",
        python="3", versions={"torch": str(torch.__version__)}, split=SPLIT,
    )  # fmt: skip


def models_config(base: Path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return config


def save(tensors, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})


def tiny_model(folder: Path, source: Path, vocabulary: int) -> Path:
    """Write a Llama of two small random layers, with the `vocabulary` most frequent tokens of `source`'s tokenizer.

    Logits of all 49,152 tokens of the embedded model would take nine tenths of what so small a model computes.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    words = {token: number for token, number in state["model"]["vocab"].items() if number < vocabulary}
    state["model"]["vocab"] = words
    state["model"]["merges"] = [pair for pair in state["model"]["merges"] if "".join(pair) in words]
    (folder / "tokenizer.json").write_text(json.dumps(state), "utf-8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def large_base(folder: Path, tokenizer: Path, *, layers: int, hidden: int, shard: int) -> int:
    """A Llama of random 16-bit weights in shards of about so many bytes; its size in bytes."""
    from huggingface_hub import split_torch_state_dict_into_shards

    chat = models.load_tokenizer(tokenizer)
    chat.tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer), hidden_size=hidden, intermediate_size=hidden * 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=shard)
    for filename, names in shards.filename_to_tensors.items():
        tensors = {
            name: torch.ones(shapes[name].shape, dtype=torch.bfloat16)
            if name.endswith("norm.weight")
            else torch.empty(shapes[name].shape, dtype=torch.bfloat16).normal_(std=0.02)
            for name in names
        }
        save(tensors, folder / filename)
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return int(shards.metadata["total_size"])
