"""Base models in memory: loaded once a process, with the adapters of any number of runs beside them."""

import gc
import itertools
import sys
import threading
import weakref
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.models import base as models
from bizassist_nb.models.adapters import REMEDY, WEIGHTS, adapter_folder, check_adapter
from bizassist_nb.runs.records import Preflight
from bizassist_nb.runs.run import RunDirectory, running

MOST_ADAPTERS: Final = 8
"""Adapters beside a base; one of rank 16 for Mistral-7B takes 0.17 GB."""


class LoadedBase:
    """A base with its tokenizer and the adapters loaded onto it."""

    def __init__(self, base: models.Base):
        """Load the base in 4 bits, as it was for training."""
        import torch

        from bizassist_nb.assistant.prefix_cache import PrefixCache

        self.base = base
        self.chat = models.load_tokenizer(base.source, base.commit)
        before = torch.cuda.memory_allocated()  # 0 without a GPU
        try:
            self.model: Any = models.load_nf4(base.source, commit=base.commit)
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info()[0] / 2**30
            raise ModelError(
                f"{base.name} does not fit beside what is in GPU memory ({free:.1f} GiB are free): while a run is "
                "being trained the assistant may have to wait; look at it with %bizassist runs, or stop it"
            ) from error
        models.unpack(self.model)
        self.memory = torch.cuda.memory_allocated() - before
        """Bytes of GPU memory that its weights take."""
        self.size: int = self.model.get_memory_footprint()
        """Bytes of its weights, on any device."""
        self.prefix_cache = PrefixCache() if self.model.device.type == "cpu" else None
        self.adapters: dict[Path, tuple[int, str]] = {}  # (time of its weights, name), the least lately used first
        self._count = itertools.count()

    def adapter(self, run: RunDirectory) -> str:
        """The name under which the run's adapter is loaded; loads it the first time, and anew when it has changed.

        Raises:
            ModelError: if the run has none, or one that cannot be read or was made for another base.
        """
        folder = adapter_folder(run).resolve()
        written = (folder / WEIGHTS).stat().st_mtime_ns
        if self.adapters.get(folder, (None,))[0] != written:
            check_adapter(folder, self.base, self.model)
            self.forget(folder)
            while len(self.adapters) >= MOST_ADAPTERS:
                self.forget(next(iter(self.adapters)))
            self.adapters[folder] = written, self._load(run.name, folder)
        self.adapters[folder] = self.adapters.pop(folder)
        return self.adapters[folder][1]

    def _load(self, run: str, folder: Path) -> str:
        from peft import PeftModel
        from safetensors import SafetensorError

        name = f"run{next(self._count)}"
        try:
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, adapter_name=name, torch_device=models.device())
            else:
                self.forget_cache()  # a PeftModel replaces the model it is for
                self.model = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
        except (SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"the adapter of run {run!r} cannot be loaded onto {self.base.name} ({brief(error)}); "
                f"it is damaged; {REMEDY}"
            ) from error
        self.model.eval()
        return name

    def forget(self, folder: Path) -> None:
        """Free the adapter that was loaded from that folder, if one was."""
        if folder not in self.adapters:
            return
        self.forget_cache()  # it may be that adapter's
        _, name = self.adapters.pop(folder)
        if self.adapters:
            self.model.delete_adapter(name)
        else:
            self.model = self.model.unload()  # PEFT 0.21 does not compute with no adapter at all

    def forget_cache(self) -> None:
        """Free what is cached between questions."""
        from bizassist_nb.assistant.cuda import decode_graph

        decode_graph.idle.pop(self.model, None)
        if self.prefix_cache:
            self.prefix_cache.forget()

    def use(self, adapters: list[str]) -> None:
        """Have just these adapters take part in the forward pass."""
        from bizassist_nb.assistant import decoding

        decoding.activate(self.model, adapters)


active_answers: Final["weakref.WeakSet[Any]"] = weakref.WeakSet()
"""Chats that may be half-way through an answer, and so refer to a base that is to go: `unload` calls their `halt`."""


def unload(*, on_cpu: bool = False) -> None:
    """Free the bases in GPU memory, so that a worker finds room; they are loaded again when next asked.

    On any device the answers of all `active_answers` end where they are; `on_cpu` frees bases in main memory, too.
    """
    for answerer in tuple(active_answers):
        answerer.halt()
    if "torch" not in sys.modules or (models.device() == "cpu" and not on_cpu):
        return
    import torch

    with _loading:  # one that is being loaded is waited for
        bases.clear()
    gc.collect()  # also what a base that could not be loaded has left
    torch.cuda.empty_cache()


def reclaimable() -> float:
    """GiB of GPU memory, at least, that `unload` would give back."""
    return sum(loaded.memory for loaded in set(bases.values())) / 2**30


bases: dict[tuple[str, str], LoadedBase] = {}
"""By the name and revision asked for: what "auto" is depends on free memory, of which the base itself takes some."""
_loading = threading.Lock()


def check_room(model: str, revision: str = "") -> None:
    """Refuse to load a base into GPU memory that a run in training is expected to need: the run may be what fails.

    Raises:
        ModelError: if the base is not loaded, and there is such a run.
    """
    if (model, revision) in bases or models.device() == "cpu":
        return
    for run in running():
        plan = run.last(Preflight)
        weights = plan.parts.get("weights", 0.0) if plan else 0.0
        if plan and plan.memory == "GPU memory" and plan.peak + weights > plan.free:
            raise ModelError(
                f"the run {run.name!r} is being trained and is expected to take {plan.peak:.1f} of {plan.free:.1f} GiB "
                f"of GPU memory; a base for chat takes about {weights:.1f} more, and the run may fail over it. Wait "
                "until it has ended, or stop it; or chat all the same with --anyway (in the panel: 'chat anyway')"
            )


def loaded_base(model: str, revision: str = "") -> LoadedBase:
    """The base for a `Settings.model` name, of the revision that a run was made on, loaded at the first call.

    Raises:
        ModelError: if it cannot be.
    """
    with _loading:
        if (model, revision) not in bases:
            base = models.pinned(models.resolve(model), revision)
            known = {(each.base.source, each.base.revision): each for each in bases.values()}
            bases[model, revision] = known.get((base.source, base.revision)) or LoadedBase(base)
        return bases[model, revision]
