"""Adapters on the disk: read, and checked against the base that they are for."""

import json
from pathlib import Path
from typing import Any, Final, Literal

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import Count, Record, decode
from bizassist_nb.runs.run import RunDirectory

WEIGHTS: Final = "adapter_model.safetensors"
"""Name of the file with an adapter's weights."""


REMEDY: Final = "put it back from a copy, or train the run anew"
"""What to do about a damaged adapter, for the end of a message."""


class _Config(Record):
    """What an adapter_config.json has to say."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str
    r: Count
    lora_alpha: float
    lora_dropout: float
    target_modules: list[str]
    use_rslora: bool = False


_HARMLESS: Final = {"auto_mapping", "task_type", "inference_mode", "peft_version", "revision"}
"""Fields that may have any value. `auto_mapping` names a module, which nothing here imports."""


def adapter_folder(run: RunDirectory) -> Path:
    """The folder of a run's adapter, which has weights in it.

    Raises:
        ModelError: if the run has none, or they are missing.
    """
    if run.adapter is None:
        raise ModelError(f"the run {run.name!r} has no adapter (it is {run.status}); train it, or ask the base alone")
    if not (run.adapter / WEIGHTS).is_file():
        raise ModelError(f"the adapter of run {run.name!r} is damaged: {run.adapter / WEIGHTS} is missing; {REMEDY}")
    return run.adapter


def check_adapter(folder: Path, base: models.Base, model: Any) -> None:
    """Refuse an adapter made for another base, by what it says of itself and by its shapes, before it is loaded.

    Raises:
        ModelError: with the base it names, or the first weight that is missing, unknown or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    config = adapter_config(folder)
    made_for = config["base_model_name_or_path"]
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} is damaged ({brief(error)}); {REMEDY}") from error
    names = (base.source, models.HUB_IDS.get(base.name, base.name))  # exporting it writes the hub's name
    if Path(str(made_for)).name not in {Path(name).name for name in names}:
        raise ModelError(f"the adapter in {folder} was made for another base than {base.name}: for {made_for}")
    wanted = {}
    for path, layer in model.named_modules():
        name = path.removeprefix("base_model.model.")
        if hasattr(layer, "in_features") and name.rpartition(".")[2] in config["target_modules"]:
            wanted[f"base_model.model.{name}.lora_A.weight"] = (config["r"], layer.in_features)
            wanted[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, config["r"])
    if differing := [key for key in wanted | shapes if wanted.get(key) != shapes.get(key)]:
        key = differing[0]
        there, here = (found.get(key, "missing") for found in (shapes, wanted))
        raise ModelError(
            f"the adapter in {folder} is damaged, or does not fit {base.name}: {key} is {there} where {base.name} at "
            f"rank {config['r']} has {here}; {REMEDY}"
        )


def adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's adapter_config.json says.

    Raises:
        ModelError: if it cannot be read, or asks for more than plain LoRA: some of PEFT's options import a module that
            the file names, rewrite the base, or copy its layers.
    """
    from peft import LoraConfig

    found, plain = read_config(folder), LoraConfig().to_dict()
    for name in found.keys() & plain.keys() - {*_Config.__struct_fields__} - _HARMLESS:
        if found[name] != plain[name] and found[name]:
            raise ModelError(
                f"{folder / 'adapter_config.json'} sets {name}, which no adapter that was trained here does, and which "
                "may run code or change the base; it is not loaded"
            )
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The same, unchecked and without PEFT, which takes seconds to import: to be given away, not to be loaded."""
    try:
        text = (folder / "adapter_config.json").read_bytes()
        decode(text, _Config)
        return dict(json.loads(text))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be used ({brief(error)}); {REMEDY}") from error
