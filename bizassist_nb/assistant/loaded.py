"""Base models in memory: loaded once a process, with the adapters of any number of runs beside them."""

import gc
import itertools
import json
import threading
import weakref
from pathlib import Path
from typing import Any, Final, Protocol

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import misfit
from bizassist_nb.runs.run import RunDirectory

WEIGHTS: Final = "adapter_model.safetensors"
"""Name of the file with an adapter's weights."""
MOST_ADAPTERS: Final = 8
"""Adapters beside a base; one of rank 16 for Mistral-7B takes 0.17 GB."""


_AGAIN: Final = "put it back from a copy, or train the run anew"
_CONFIG: Final = {
    "peft_type": {"LORA"}, "base_model_name_or_path": str, "r": int, "lora_alpha": float, "lora_dropout": float,
    "target_modules": [str],
}  # fmt: skip
_HARMLESS: Final = {"auto_mapping", "task_type", "inference_mode", "peft_version", "revision"}
"""What else may stand in an adapter's config as it likes. `auto_mapping` names a module, which nothing here imports."""


class LoadedBase:
    """A base with its tokenizer and the adapters loaded onto it."""

    def __init__(self, base: models.Base):
        """Load the base in 4 bits, as it was for training."""
        import torch

        from bizassist_nb.assistant import decoding
        from bizassist_nb.assistant.prefix_cache import Prefix

        self.base = base
        self.chat = models.load_tokenizer(base.source)
        before = torch.cuda.memory_allocated()  # 0 without a GPU
        try:
            self.model: Any = models.load_nf4(base.source)
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise ModelError(
                f"{base.name} does not fit beside what is in GPU memory ({free:.1f} GiB are free): while a run is "
                "being trained the assistant may have to wait; look at it with %bizassist runs, or stop it"
            ) from error
        self.memory = torch.cuda.memory_allocated() - before
        """Bytes of GPU memory that its weights take."""
        decoding.quicken(self.model)
        self.prefix = Prefix() if self.model.device.type == "cpu" else None
        self._adapters: dict[tuple[str, int], str] = {}  # the least lately used first
        self._count = itertools.count()

    def adapter(self, run: RunDirectory) -> str:
        """The name under which the run's adapter is loaded; loads it the first time, and anew when it has changed.

        Raises:
            ModelError: if the run has none, or one that cannot be read or was made for another base.
        """
        folder = adapter_folder(run)
        key = (str(folder.resolve()), (folder / WEIGHTS).stat().st_mtime_ns)
        if key not in self._adapters:
            check_adapter(folder, self.base, self.model)
            for old in [known for known in self._adapters if known[0] == key[0]]:
                self._remove(old)
            while len(self._adapters) >= MOST_ADAPTERS:
                self._remove(next(iter(self._adapters)))
            self._adapters[key] = self._load(run.name, folder, f"run{next(self._count)}")
        self._adapters[key] = self._adapters.pop(key)
        return self._adapters[key]

    def _load(self, run: str, folder: Path, name: str) -> str:
        from peft import PeftModel
        from safetensors import SafetensorError

        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, adapter_name=name, torch_device=models.device())
            else:
                self.forget_cache()  # it is kept for the model that there was
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the adapter of run {run!r} cannot be loaded onto {self.base.name} ({brief(error)}); "
                f"it is damaged; {_AGAIN}"
            ) from error
        self.model.eval()
        return name

    def _remove(self, key: tuple[str, int]) -> None:
        self.forget_cache()  # it may be that adapter's
        name = self._adapters.pop(key)
        if self._adapters:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()  # PEFT 0.21 does not compute with no adapter at all

    def forget(self, run: RunDirectory) -> None:
        """Let go of the run's adapter and its memory; asked again, it is loaded anew."""
        folder = str((run.path / "adapter").resolve())
        for key in [known for known in self._adapters if known[0] == folder]:
            self._remove(key)

    def forget_cache(self) -> None:
        """Let go of what is kept between questions."""
        from bizassist_nb.assistant.cuda import decode_graph

        decode_graph.forget(self.model)
        if self.prefix:
            self.prefix.forget()

    def use(self, adapters: list[str]) -> None:
        """Have just these adapters take part in the forward pass."""
        from bizassist_nb.assistant import decoding

        decoding.activate(self.model, adapters)


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
        raise ModelError(f"the adapter of run {run.name!r} is damaged: {run.adapter / WEIGHTS} is missing; {_AGAIN}")
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
        raise ModelError(f"the adapter in {folder} is damaged ({brief(error)}); {_AGAIN}") from error
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
            raise ModelError(f"the adapter in {folder} is damaged: {key} is not of rank {config['r']}; {_AGAIN}")
        ours = inner[name].in_features if part.startswith("A") else inner[name].out_features
        theirs = shape[1] if part.startswith("A") else shape[0]
        if ours != theirs:
            raise ModelError(f"{other}: its {name} is {theirs} wide there, {ours} here")
    wanted = [name for name in inner if name.rpartition(".")[2] in config["target_modules"]]
    keys = [f"base_model.model.{name}.lora_{part}.weight" for name in wanted for part in "AB"]
    if lacking := next((key for key in keys if key not in shapes), None):
        raise ModelError(f"the adapter in {folder} is damaged: it has no {lacking}; {_AGAIN}")


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
        raise ModelError(f"{folder / 'adapter_config.json'} cannot be used ({brief(error)}); {_AGAIN}") from error
    plain = LoraConfig().to_dict()
    for name in found.keys() & plain.keys() - _CONFIG.keys() - _HARMLESS:
        if found[name] != plain[name] and found[name]:
            raise ModelError(
                f"{folder / 'adapter_config.json'} sets {name}, which no adapter that was trained here does, and which "
                "may run code or change the base; it is not loaded"
            )
    return dict(found)


class Answerer(Protocol):
    """Someone who may be half-way through an answer, and so hold a base that is to go."""

    def halt(self) -> None:
        """End the answer that is being written, if one is."""


answerers: Final["weakref.WeakSet[Answerer]"] = weakref.WeakSet()
"""Whoever `release` has to tell, for as long as they live."""


def release() -> None:
    """Let go of the bases in GPU memory, so that a worker finds room; they are loaded anew when next asked.

    On any device the answers of all `answerers` end where they are.
    """
    for answerer in tuple(answerers):
        answerer.halt()
    if not (_loaded or _loading.locked()) or models.device() == "cpu":
        return
    import torch

    with _loading:  # one that is being loaded is waited for
        _loaded.clear()
        _sources.clear()
    gc.collect()
    torch.cuda.empty_cache()


def held() -> float:
    """GiB of GPU memory, at least, that `release` would give back."""
    return sum(loaded.memory for loaded in tuple(_loaded.values())) / 2**30


_loaded: dict[str, LoadedBase] = {}
_sources: dict[str, str] = {}
"""What names were found to stand for: "auto" depends on the free memory, of which the loaded base itself takes some."""
_loading = threading.Lock()


def loaded_base(model: str) -> LoadedBase:
    """The base for a `Settings.model` name, loaded at the first call.

    Raises:
        ModelError: if it cannot be.
    """
    with _loading:
        if _sources.get(model) not in _loaded:
            base = models.resolve(model)
            if base.source not in _loaded:
                _loaded[base.source] = LoadedBase(base)
            _sources[model] = base.source
        return _loaded[_sources[model]]
