"""Weights one at a time: those of a checkpoint as they are stored, and those of a run's tuned model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from bizassist_nb.assistant.loaded import loaded_base
from bizassist_nb.core.errors import ModelError
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import Record, decode
from bizassist_nb.runs.run import RunDirectory

Base = Literal["trained", "original"]
"""What is merged into: the NF4 weights that training saw, or the 16-bit weights they were made from."""

INDEX: Final = "model.safetensors.index.json"


class Weights:
    """The tensors of a checkpoint by name, each in memory only once it is read.

    Raises:
        ModelError: if the checkpoint cannot be reached or has no safetensors.
    """

    def __init__(self, source: str, commit: str | None = None):
        """Look at the files of a hub id (fetched if they are not in its cache yet) or of a folder."""
        import httpx
        from huggingface_hub import snapshot_download
        from safetensors import SafetensorError, safe_open

        wanted = ["config.json", "model.safetensors", "model-*.safetensors", INDEX]  # some hold a second copy of it all
        folder = Path(source)
        try:
            if not folder.is_dir():
                folder = Path(snapshot_download(source, revision=commit, allow_patterns=wanted))
            if (folder / INDEX).is_file():
                files = decode((folder / INDEX).read_bytes(), _Index).weight_map
                self._files = {name: folder / Path(file).name for name, file in files.items()}  # in that folder only
            else:
                with safe_open(folder / "model.safetensors", framework="pt") as file:
                    self._files = dict.fromkeys(file.keys(), folder / "model.safetensors")
        except (OSError, httpx.HTTPError, SafetensorError, ValueError) as error:
            raise models.unreachable("model", source, error) from error
        self.names = self._files.keys()

    def read(self, name: str) -> Any:
        """One tensor, on the device that models run on. Its file is closed again: mapped pages count as memory."""
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).to(models.device())


class TunedWeights:
    """The weights of a run's base with its adapter added, by their names in the base's checkpoint.

    Raises:
        ModelError: if the run has no adapter, or one of another base, or the base cannot be reached or merged.
    """

    def __init__(self, run: RunDirectory, base: Base):
        """Load the run's base in NF4 and its adapter, as for the chat."""
        from peft.tuners.lora import LoraLayer

        self.loaded = loaded_base(run.model, run.environment.revision)
        self.adapter = self.loaded.adapter(run)
        source = self.loaded.base.source
        self._originals = original(source) if base == "original" else None
        layers = {name: module for name, module in self.loaded.model.named_modules() if isinstance(module, LoraLayer)}
        self._weights: dict[str, tuple[Any, Any]] = {}  # (the base's parameter, its LoRA layer if it has one)
        for path, parameter in self.loaded.model.named_parameters():
            if ".lora_" not in path:
                layer, _, kind = path.rpartition(".base_layer.")
                name = path.removeprefix("base_model.model.").replace(".base_layer.", ".")
                self._weights[name] = parameter, layers.get(layer) if kind == "weight" else None
        if lacking := self._weights.keys() - (self._originals or Weights(source, self.loaded.base.commit)).names:
            raise ModelError(
                f"{source} stores its weights under other names than the model has them ({min(lacking)} is not there), "
                "so this base cannot be merged; the adapter works as it is (bizassist export RUN --to adapter)"
            )

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every weight's shape; a 4-bit one has that of what it stands for."""
        return {
            name: tuple(getattr(parameter, "quant_state", parameter).shape)
            for name, (parameter, _) in self._weights.items()
        }

    def read(self, name: str) -> Any:
        """One weight in float32: W + B A times its scaling, on the device that models run on."""
        from bitsandbytes.functional import dequantize_4bit

        parameter, layer = self._weights[name]
        state = getattr(parameter, "quant_state", None)
        if self._originals:
            weight = self._originals.read(name)
        else:
            weight = parameter.data if state is None else dequantize_4bit(parameter.data, state)
        return weight.float() if layer is None else weight.float() + layer.get_delta_weight(self.adapter).float()


class _Index(Record):
    """What model.safetensors.index.json has to say."""

    weight_map: dict[str, str]


def original(source: str) -> Weights:
    """The 16-bit weights that the base of that name was made from.

    Raises:
        ModelError: if it is not known where they are, or they cannot be reached.
    """
    if source.endswith("-bnb-4bit") and not Path(source).is_dir():  # as Unsloth names what it made of another's
        source = source.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    weights = Weights(source)
    if any("quant_state.bitsandbytes" in name for name in weights.names):
        raise ModelError(
            f"{source} holds 4-bit weights only, and where the 16-bit ones are is not known; "
            "merge without --base original"
        )
    return weights
