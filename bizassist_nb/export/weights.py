"""The base's weights in 16 or 32 bits, read one tensor at a time: as training saw them, or as they are stored."""

import json
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import ModelError
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import misfit

INDEX: Final = "model.safetensors.index.json"
_STATE: Final = "quant_state.bitsandbytes__nf4"
"""Where bitsandbytes stores shape and block size of a 4-bit weight, after the weight's name and a dot."""


class Weights:
    """The tensors of a checkpoint by the names they have there, nothing of them in memory until one is read.

    Weights that are stored in NF4 are given dequantised. Those that are stored in 16 bits and that `models.load_nf4`
    puts into NF4 are put through it (`nf4=True`) or given as they are (`nf4=False`).

    Raises:
        ModelError: if the checkpoint cannot be reached or has no safetensors.
    """

    def __init__(self, source: str, *, nf4: bool):
        """Look at the files of a hub id (fetched if they are not in its cache yet) or of a folder."""
        self._files = _files(source)
        weights = [name.removesuffix(f".{_STATE}") for name in self._files if name.endswith(f".{_STATE}")]
        self._parts = {
            weight: [name for name in self._files if name.startswith(f"{weight}.")] for weight in weights
        }  # the statistics stored beside each 4-bit weight
        parts = {part for found in self._parts.values() for part in found}
        self.names = dict.fromkeys(name for name in self._files if name not in parts)
        self._quantised = _linear4bit(source) if nf4 and not weights else frozenset()
        if lacking := self._quantised.difference(self.names):
            raise ModelError(
                f"{source} stores its weights under other names than the model has them ({min(lacking)} is not there), "
                "so this base cannot be merged; the adapter works as it is (bizassist export RUN --to adapter)"
            )

    @property
    def stored_in_nf4(self) -> bool:
        """Whether the checkpoint holds 4-bit weights."""
        return bool(self._parts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape once dequantised, in the order of the checkpoint."""
        return {name: self._shape(name) for name in self.names}

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._parts:
            state = f"{name}.{_STATE}"
            stored = bytes(self._load(state)[state].tolist())  # JSON, as bytes in a tensor
            return tuple(json.loads(stored)["shape"])
        from safetensors import safe_open

        with safe_open(self._files[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Any:
        """One tensor on the device that models run on; what was in 4 bits is in the dtype it is computed with."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit
        from bitsandbytes.nn import Params4bit

        device, dtype = torch.device(models.device()), models.compute_dtype()
        if name in self._parts:
            stored = self._load(name, *self._parts[name])
            tensor = stored.pop(name)
            state = QuantState.from_dict(
                {part.removeprefix(f"{name}."): stored[part] for part in stored}, device=device
            )
            state.dtype = dtype
            return dequantize_4bit(tensor.to(device), state)
        tensor = self._load(name)[name]
        if name not in self._quantised:
            return tensor.to(device)
        # What transformers does with a weight that it loads into a Linear4bit.
        packed = Params4bit(
            tensor.to(device, dtype), requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(device)
        return dequantize_4bit(packed.data, packed.quant_state)

    def _load(self, *names: str) -> dict[str, Any]:
        """Tensors as they are stored. Files are opened for them alone: a mapped file's pages count as memory in use."""
        from safetensors import safe_open

        tensors: dict[str, Any] = {}
        for path in {self._files[name] for name in names}:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names if self._files[name] == path}
        return tensors


def _files(source: str) -> dict[str, Path]:
    """Which file each of the checkpoint's tensors is in."""
    from safetensors import SafetensorError, safe_open

    folder = Path(source)
    if not folder.is_dir():
        folder = _fetched(source)
    index = folder / INDEX
    try:
        if index.is_file():
            names = json.loads(index.read_text("utf-8"))
            if wrong := misfit(names, {"weight_map": {"*": str}}):
                raise ValueError(f"{INDEX}: {wrong}")
            return {name: folder / Path(file).name for name, file in names["weight_map"].items()}  # in that folder only
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / "model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise models.unreachable("model", source, error) from error


def _fetched(source: str) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", "model.safetensors", "model-*.safetensors", INDEX]  # some hold a second copy of it all
    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise models.unreachable("model", source, error) from error


def _linear4bit(source: str) -> frozenset[str]:
    """Names of the weights that transformers puts into 4 bits when it loads that model."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    quantiser = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True))
    with models.quietly():
        quantiser.preprocess_model(model=model, device_map={"": models.device()})
    return frozenset(f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear4bit))


def original(source: str) -> Weights:
    """The 16-bit weights that the base of that name was made from.

    Raises:
        ModelError: if it is not known where they are, or they cannot be reached.
    """
    if source.endswith("-bnb-4bit") and not Path(source).is_dir():  # as Unsloth names what it made of another's
        source = source.removesuffix("-bnb-4bit").removesuffix("-unsloth")
    weights = Weights(source, nf4=False)
    if weights.stored_in_nf4:
        raise ModelError(
            f"{source} holds 4-bit weights only, and where the 16-bit ones are is not known; "
            "merge without --base original"
        )
    return weights
