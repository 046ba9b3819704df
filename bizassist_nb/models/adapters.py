"""Adapters on the disk: read, and held against the base that they are for."""

import json
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import misfit
from bizassist_nb.runs.run import RunDirectory

WEIGHTS: Final = "adapter_model.safetensors"
"""Name of the file with an adapter's weights."""


REMEDY: Final = "put it back from a copy, or train the run anew"
"""What to do about a damaged adapter, for the end of a message."""


_CONFIG: Final = {
    "peft_type": {"LORA"}, "base_model_name_or_path": str, "r": int, "lora_alpha": float, "lora_dropout": float,
    "target_modules": [str],
}  # fmt: skip


_HARMLESS: Final = {"auto_mapping", "task_type", "inference_mode", "peft_version", "revision"}
"""What else may stand in an adapter's config as it likes. `auto_mapping` names a module, which nothing here imports."""


def adapter_folder(run: RunDirectory) -> Path:
    """The folder of a run's adapter, which has weights in it.

    Raises:
        ModelError: if the run has none, or they are missing.
    """
    if run.adapter is None:
        raise ModelError(
            f"the run {run.name!r} has no adapter (it is {run.status}); the base alone can be asked with --base"
        )
    if not (run.adapter / WEIGHTS).is_file():
        raise ModelError(f"the adapter of run {run.name!r} is damaged: {run.adapter / WEIGHTS} is missing; {REMEDY}")
    return run.adapter


def check_adapter(folder: Path, base: models.Base, model: Any) -> None:
    """Refuse an adapter made for another base, by what it says of itself and by its shapes, before it is loaded.

    Raises:
        ModelError: with the base it names, or the first shape that differs.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors import SafetensorError, safe_open

    config = adapter_config(folder)
    made_for = config["base_model_name_or_path"]
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} is damaged ({brief(error)}); {REMEDY}") from error
    other = f"the adapter in {folder} was made for another base than {base.name}"
    names = (base.source, models.HUB_IDS.get(base.name, base.name))  # the latter once it was made fit to be given away
    if Path(str(made_for)).name not in {Path(name).name for name in names}:
        raise ModelError(f"{other}: for {made_for}")
    inner = {
        name.removeprefix("base_model.model."): layer.base_layer if isinstance(layer, LoraLayer) else layer
        for name, layer in model.named_modules()
        if hasattr(layer, "in_features")
    }
    for key, shape in shapes.items():
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if name not in inner:
            raise ModelError(f"{other}: it has weights for {name}, which that base has not")
        if len(shape) != 2 or shape[not part.startswith("A")] != config["r"]:
            raise ModelError(f"the adapter in {folder} is damaged: {key} is not of rank {config['r']}; {REMEDY}")
        ours = inner[name].in_features if part.startswith("A") else inner[name].out_features
        theirs = shape[1] if part.startswith("A") else shape[0]
        if ours != theirs:
            raise ModelError(f"{other}: its {name} is {theirs} wide there, {ours} here")
    wanted = [name for name in inner if name.rpartition(".")[2] in config["target_modules"]]
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in wanted for part in "AB"]
    if lacking := next((key for key in keys if key not in shapes), None):
        raise ModelError(f"the adapter in {folder} is damaged: it has no {lacking}; {REMEDY}")


def adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's adapter_config.json says.

    Raises:
        ModelError: if it cannot be read, or asks for more than plain LoRA: some of PEFT's options import a module that
            the file names, rewrite the base, or copy its layers.
    """
    from peft import LoraConfig

    try:
        found = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        if wrong := misfit(found, _CONFIG):
            raise ValueError(wrong)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be used ({brief(error)}); {REMEDY}") from error
    plain = LoraConfig().to_dict()
    for name in found.keys() & plain.keys() - _CONFIG.keys() - _HARMLESS:
        if found[name] != plain[name] and found[name]:
            raise ModelError(
                f"{folder / 'adapter_config.json'} sets {name}, which no adapter that was trained here does, and which "
                "may run code or change the base; it is not loaded"
            )
    return dict(found)
