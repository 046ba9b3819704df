"""The merged 16-bit model: the adapter folded into the very weights it was trained on, tensor by tensor."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, Final

from bizassist_nb import models
from bizassist_nb.errors import ModelError, RunError
from bizassist_nb.runs import Run, write_whole

_SHARD: Final = "2GB"
"""Size of a file at most; about as much memory is needed beside the 4-bit model."""


def merge(run: Run) -> Path:
    """Write `merged/`: the dequantised NF4 weights plus the adapter, as 16-bit safetensors with tokenizer and template.

    This is what was trained; merging into the original 16-bit weights instead would give a slightly different model.

    Raises:
        ModelError: if the run has no adapter.
        RunError: if it has been merged already.
    """
    target = run.path / "merged"
    if run.adapter is None:
        raise ModelError(f"the run {run.name!r} has no adapter to merge (it is {run.status})")
    if target.exists():
        raise RunError(f"{target} exists already; move it away to merge anew")
    shutil.rmtree(target.with_name(".merged.part"), ignore_errors=True)  # of a merge that was killed
    write_whole(target, lambda part: _write(run, part))
    return target


def _write(run: Run, part: Path) -> None:
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import load_file, save_file

    assert run.adapter is not None
    part.mkdir()
    model = models.load_nf4(models.resolve(run.environment["model"]).source)
    chat = models.load_tokenizer(run.adapter)
    half = torch.float16 if models.compute_dtype() is torch.float16 else torch.bfloat16
    parameters = dict(model.named_parameters())
    shapes = {name: torch.empty(_shape(value), dtype=half, device="meta") for name, value in parameters.items()}
    shards = split_torch_state_dict_into_shards(shapes, max_shard_size=_SHARD)
    adapter = _Adapter(run.adapter, load_file(run.adapter / "adapter_model.safetensors", device=models.device()))
    for filename, names in shards.filename_to_tensors.items():
        tensors = {name: adapter.merged(name, parameters[name]).to(half).cpu() for name in names}
        save_file(tensors, part / filename, metadata={"format": "pt"})
    adapter.check_all_used()
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), "utf-8")
    _write_configs(model, chat.end_id, chat.pad_id, half, part)
    chat.tokenizer.save_pretrained(part)


class _Adapter:
    """LoRA weights by the name of the parameter that they change."""

    def __init__(self, folder: Path, tensors: dict[str, Any]) -> None:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        self._scaling = config["lora_alpha"] / config["r"]
        self._tensors = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}
        self._unused = set(self._tensors)

    def merged(self, name: str, parameter: Any) -> Any:
        """The parameter in full, with what the adapter adds to it: W + B A * alpha / rank, in float32."""
        layer = name.removesuffix(".weight")
        down, up = (f"{layer}.lora_{side}.weight" for side in "AB")
        weight = _dequantized(parameter)
        if down not in self._tensors:
            return weight
        self._unused -= {down, up}
        return weight.float() + self._scaling * (self._tensors[up] @ self._tensors[down])

    def check_all_used(self) -> None:
        """Raise ModelError if the adapter holds weights that changed nothing."""
        if self._unused:
            raise ModelError(
                f"the adapter has weights that this base has no place for: {', '.join(sorted(self._unused)[:3])}"
            )


def _dequantized(parameter: Any) -> Any:
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(parameter, "quant_state", None)
    return parameter.data if state is None else dequantize_4bit(parameter.data, state)


def _shape(parameter: Any) -> Any:
    state = getattr(parameter, "quant_state", None)
    return parameter.shape if state is None else state.shape


def _write_configs(model: Any, end_id: int, pad_id: int, dtype: Any, part: Path) -> None:
    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.dtype = dtype
    for each in (config, model.generation_config):
        each.eos_token_id, each.pad_token_id = end_id, pad_id
        each.save_pretrained(part)
