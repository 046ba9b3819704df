"""Which engine trains, and why."""

import importlib.metadata
import importlib.util

import pytest

from bizassist_nb.core.errors import EngineError
from bizassist_nb.training import engines


@pytest.fixture
def without_unsloth(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "unsloth" else find(name))


@pytest.fixture
def old_unsloth(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2026.10.7" if name == "unsloth" else version(name))


def test_auto_takes_unsloth_where_it_works():
    assert engines.choose("auto").name == "unsloth"
    assert engines.choose("transformers").name == "transformers"


def gpu(monkeypatch, capability, gib):
    """Make torch report a GPU of that compute capability and memory."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib * 2**30, gib * 2**30))


@pytest.mark.parametrize(
    ("capability", "gib", "auto", "graphs"),
    [
        ((7, 5), 15, "unsloth", False),
        ((8, 0), 80, "unsloth", True),  # not measured, and slow enough for Unsloth's kernels to count
        ((9, 0), 80, "transformers", True),
        ((9, 0), 20, "unsloth", True),  # a part of an H100
    ],
)
def test_auto_takes_transformers_where_its_graphs_are_faster(capability, gib, auto, graphs, monkeypatch):
    gpu(monkeypatch, capability, gib)
    assert engines.choose("auto").name == auto
    assert engines.choose("auto").graphs is (auto == "transformers")
    assert engines.choose("transformers").graphs is graphs
    assert not engines.choose("unsloth").graphs
    assert not engines.choose("transformers", processes=2).graphs


def test_auto_takes_what_is_known_to_work_in_several_processes():
    assert engines.choose("auto", processes=2).name == "transformers"
    assert "have not been tried on several GPUs" in engines.choose("auto", processes=2).reason
    assert engines.choose("unsloth", processes=2).name == "unsloth"


def test_auto_without_unsloth_says_so(without_unsloth):
    assert engines.choose("auto") == engines.Engine("transformers", "unsloth is not installed")


def test_auto_leaves_an_unsloth_alone_that_cannot_train_here(old_unsloth):
    chosen = engines.choose("auto")
    assert chosen.name == "transformers"
    assert "unsloth 2026.10.7 needs a GPU" in chosen.reason


def test_unsloth_asked_for_and_not_there_says_what_to_install(without_unsloth):
    with pytest.raises(EngineError, match=r"not installed. Run: pip install \"bizassist-nb\[unsloth\]\""):
        engines.choose("unsloth")


@pytest.mark.parametrize(("installed", "end_to_end"), [((), False), (("xformers",), True), (("flash_attn",), True)])
def test_rows_are_laid_end_to_end_where_there_is_a_kernel_for_it(installed, end_to_end, monkeypatch):
    find = importlib.util.find_spec
    kernels = ("xformers", "flash_attn")
    spec = find("json")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: (spec if name in installed else None) if name in kernels else find(name),
    )
    assert not engines.choose("unsloth").end_to_end  # not on a CPU
    gpu(monkeypatch, (7, 5), 15)
    assert engines.choose("unsloth").end_to_end is end_to_end
    assert not engines.choose("transformers").end_to_end
