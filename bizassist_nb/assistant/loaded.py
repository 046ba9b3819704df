"""Base models in memory: loaded once a process, with the adapters of any number of runs beside them."""

import gc
import itertools
import threading
import weakref
from pathlib import Path
from typing import Any, Final, Protocol

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.models import base as models
from bizassist_nb.models.adapters import REMEDY, WEIGHTS, adapter_folder, check_adapter
from bizassist_nb.runs.run import RunDirectory

MOST_ADAPTERS: Final = 8
"""Adapters beside a base; one of rank 16 for Mistral-7B takes 0.17 GB."""


class LoadedBase:
    """A base with its tokenizer and the adapters loaded onto it."""

    def __init__(self, base: models.Base):
        """Load the base in 4 bits, as it was for training."""
        import torch

        from bizassist_nb.assistant import decoding
        from bizassist_nb.assistant.prefix_cache import PrefixCache

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
        self.prefix_cache = PrefixCache() if self.model.device.type == "cpu" else None
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
                f"it is damaged; {REMEDY}"
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
        if self.prefix_cache:
            self.prefix_cache.forget()

    def use(self, adapters: list[str]) -> None:
        """Have just these adapters take part in the forward pass."""
        from bizassist_nb.assistant import decoding

        decoding.activate(self.model, adapters)


class Answerer(Protocol):
    """Someone who may be half-way through an answer, and so hold a base that is to go."""

    def halt(self) -> None:
        """End the answer that is being written, if one is."""


active_answers: Final["weakref.WeakSet[Answerer]"] = weakref.WeakSet()
"""Whoever `unload` has to tell, for as long as they live."""


def unload() -> None:
    """Let go of the bases in GPU memory, so that a worker finds room; they are loaded anew when next asked.

    On any device the answers of all `active_answers` end where they are.
    """
    for answerer in tuple(active_answers):
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
    """GiB of GPU memory, at least, that `unload` would give back."""
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
