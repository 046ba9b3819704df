"""Base models in memory: loaded once a process, with the adapters of any number of runs beside them."""

import gc
import itertools
import json
import threading
from typing import Any

from bizassist_nb import models
from bizassist_nb.errors import ModelError, brief
from bizassist_nb.runs import Run


class LoadedBase:
    """A base with its tokenizer and the adapters loaded onto it."""

    def __init__(self, base: models.Base):
        """Load the base in 4 bits, as it was for training."""
        self.base = base
        self.chat = models.load_tokenizer(base.source)
        self.model: Any = models.load_nf4(base.source)
        self._adapters: dict[tuple[str, float], str] = {}
        self._count = itertools.count()

    def adapter(self, run: Run) -> str:
        """The name under which the run's adapter is loaded; loads it the first time, and anew when it has changed.

        Raises:
            ModelError: if the run has none, or one that cannot be read or was made for another base.
        """
        if run.adapter is None:
            raise ModelError(
                f"the run {run.name!r} has no adapter yet (it is {run.status}); the base alone can be asked with --base"
            )
        key = (str(run.adapter.resolve()), (run.adapter / "adapter_model.safetensors").stat().st_mtime)
        if key not in self._adapters:
            for old in [known for known in self._adapters if known[0] == key[0]]:
                self.model.delete_adapter(self._adapters.pop(old))
            self._adapters[key] = self._load(run, f"run{next(self._count)}")
        return self._adapters[key]

    def _load(self, run: Run, name: str) -> str:
        from peft import PeftModel
        from safetensors import SafetensorError

        assert run.adapter is not None
        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(run.adapter, adapter_name=name, torch_device=models.device())
            else:
                self.model = PeftModel.from_pretrained(self.model, run.adapter, adapter_name=name)
        except (SafetensorError, RuntimeError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise ModelError(
                f"the adapter of run {run.name!r} cannot be loaded onto {self.base.name} "
                f"({brief(error)}); it is damaged or made for another base"
            ) from error
        self.model.eval()
        return name

    def use(self, adapters: list[str]) -> None:
        """Have just these adapters take part in the forward pass."""
        if adapters:
            self.model.base_model.set_adapter(adapters, inference_mode=True)


def release() -> None:
    """Let go of the bases in GPU memory, so that a worker finds room; they are loaded anew when next asked."""
    if not _loaded or models.device() == "cpu":
        return
    import torch

    with _loading:
        _loaded.clear()
    gc.collect()
    torch.cuda.empty_cache()


_loaded: dict[str, LoadedBase] = {}
_loading = threading.Lock()


def loaded_base(model: str) -> LoadedBase:
    """The base for a `Settings.model` name, loaded at the first call.

    Raises:
        ModelError: if it cannot be.
    """
    with _loading:
        base = models.resolve(model)
        if base.source not in _loaded:
            _loaded[base.source] = LoadedBase(base)
        return _loaded[base.source]
