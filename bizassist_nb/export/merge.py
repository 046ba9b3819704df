"""The merged 16-bit model: the adapter added to the very weights it was trained on, written one shard at a time."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from bizassist_nb.assistant.loaded import LoadedBase
from bizassist_nb.core.errors import RunError, brief, without_locals
from bizassist_nb.core.files import new_folder
from bizassist_nb.export import parity
from bizassist_nb.export.weights import INDEX, Base, TunedWeights
from bizassist_nb.models import base as models
from bizassist_nb.models.adapters import adapter_folder
from bizassist_nb.results.model_card import card
from bizassist_nb.results.verdict_figure import save_png
from bizassist_nb.runs import records
from bizassist_nb.runs.journal import Journal
from bizassist_nb.runs.run import RunDirectory

SHARD: Final = 2_000_000_000
"""Most bytes of a file. Merging needs as much memory, and one tensor in float32, beside the base in NF4."""
_SPARE: Final = 100_000_000
"""Bytes beside the weights: tokenizer, configuration, and some for others on the disk."""


def merge(run: RunDirectory, base: Base = "trained", *, show: Callable[[str], None] = lambda _: None) -> Path:
    """Write `merged/`: the base's weights plus the adapter, as 16-bit safetensors with tokenizer and template.

    What was written is loaded again and compared with the tuned assistant (`bizassist_nb.export.parity`); a "merge"
    event in the run's record has the figures. `merged/` is there whole and compared, or not at all. `show` is told
    what is being done.

    Raises:
        ModelError: if the run has no adapter, or one of another base, or the base cannot be reached.
        DataError: if the run's rows, some of which are compared on, cannot be read any more.
        RunError: if it has been merged already, is being merged or trained, the disk is full, or the merged model
            does not answer as the tuned assistant does.
    """
    target = run.path / "merged"
    adapter_folder(run)
    if run.alive:
        raise RunError(f"the run {run.name!r} is being trained; merge it when it has ended, or stop it")
    started = time.monotonic()
    with without_locals(), new_folder(target) as part:
        conversations = parity.conversations(run)
        show(f"reading the weights of {run.model}")
        size = write(run, base, part, show)
        written = time.monotonic() - started
        show("comparing the merged model with the tuned assistant")
        found = parity.compare(run, part, conversations, base)
        seconds = time.monotonic() - started
        Journal(run.path).write(
            records.Merge(base=base, bytes=size, seconds=seconds, write_seconds=written, parity=found)
        )
        if not found.passed:
            raise RunError(f"the merged model is not the tuned one and was discarded: {'; '.join(found.failures)}")
        (part / "README.md").write_text(card(run, found), "utf-8")
        save_png(run, part)
    return target


def write(run: RunDirectory, base: Base, part: Path, show: Callable[[str], None] = lambda _: None) -> int:
    """Write the merged model into the empty folder `part`, unchecked; its size in bytes.

    Raises:
        ModelError, RunError: as `merge`.
    """
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = TunedWeights(run, base)
    half = torch.float16 if models.compute_dtype() is torch.float16 else torch.bfloat16
    empty = {name: torch.empty(shape, dtype=half, device="meta") for name, shape in weights.shapes().items()}
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD)
    size = int(shards.metadata["total_size"])
    check_room(part, size + _SPARE, "the merged model")
    try:
        for filename, names in shards.filename_to_tensors.items():
            show(f"writing {filename}")
            tensors = {name: weights.read(name).to(half).cpu().contiguous() for name in names}
            save_file(tensors, part / filename, metadata={"format": "pt"})
            del tensors
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (part / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        _write_configs(weights.loaded, half, part)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the merged model cannot be written to {part.parent} ({brief(error)}); it has to hold "
            f"{(size + _SPARE) / 1e9:.1f} GB"
        ) from error
    return size


def _write_configs(loaded: LoadedBase, dtype: Any, part: Path) -> None:
    """config.json without quantisation, generation_config.json and the tokenizer, all with the same end and pad."""
    from transformers import AutoConfig, GenerationConfig

    chat = loaded.chat
    end = [chat.end_id, *sorted(chat.stop_ids - {chat.end_id})]
    tokens = {
        "bos_token_id": chat.tokenizer.bos_token_id,
        "eos_token_id": end[0] if len(end) == 1 else end,
        "pad_token_id": chat.pad_id,
    }
    base = loaded.base
    config = AutoConfig.from_pretrained(base.source, revision=base.commit, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    config.dtype = dtype
    for name, value in tokens.items():
        setattr(config, name, value)
    config.save_pretrained(part)
    GenerationConfig(**tokens).save_pretrained(part)  # no sampling: the likeliest token each time, as in the chat
    chat.tokenizer.save_pretrained(part)
    path = part / "tokenizer_config.json"
    saved = json.loads(path.read_text("utf-8"))
    if saved["tokenizer_class"] == "TokenizersBackend":  # transformers 5's name; 4, and vLLM on it, know only this one
        path.write_text(json.dumps(saved | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2), "utf-8")


def check_room(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        RunError: with both figures.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{what} takes {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free; "
            "make room, or move the run to another disk"
        )
