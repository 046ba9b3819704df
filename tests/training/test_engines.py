"""Which engine trains, and why."""

import importlib.metadata
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

from bizassist_nb.assistant.cuda import compilers, decode_graph, nf4
from bizassist_nb.core.errors import EngineError
from bizassist_nb.runs.records import Engine
from bizassist_nb.training import doctor, engines


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (gib * 2**30, gib * 2**30))
    monkeypatch.setattr(engines, "triton_problem", lambda: None)


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
    assert not engines.choose("transformers", sharded=True).graphs


def test_auto_takes_what_is_known_to_work_with_a_sharded_base():
    chosen = engines.choose("auto", sharded=True)
    assert chosen.name == "transformers"
    assert "not been tried with a sharded base" in chosen.reason


def test_auto_without_unsloth_says_so(without_unsloth):
    assert engines.choose("auto") == Engine(name="transformers", reason="unsloth is not installed")


def test_auto_leaves_an_unsloth_alone_that_cannot_train_here(old_unsloth):
    chosen = engines.choose("auto")
    assert chosen.name == "transformers"
    assert "unsloth 2026.10.7 needs a GPU" in chosen.reason


def test_unsloth_asked_for_and_not_there_says_what_to_install(without_unsloth):
    with pytest.raises(EngineError, match=r"not installed. Run: pip install \"unsloth>=2026"):
        engines.choose("unsloth")


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """Write an Unsloth whose module of attention kernels is that code; it is found before the real one."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write(attention: str) -> None:
        (tmp_path / "unsloth" / "utils").mkdir(parents=True, exist_ok=True)
        for name, text in {
            "__init__": "import unsloth.utils.attention_dispatch\nprint('welcome')",
            "utils/__init__": "",
            "utils/attention_dispatch": attention,
        }.items():
            (tmp_path / "unsloth" / f"{name}.py").write_text(text)
        engines.try_unsloth.cache_clear()

    yield write
    engines.try_unsloth.cache_clear()


def test_auto_leaves_an_unsloth_alone_that_cannot_be_imported(importable):
    importable("raise ImportError('libcudart.so.99: cannot open shared object file')")
    chosen = engines.choose("auto")
    assert chosen.name == "transformers"
    assert "cannot be imported (ImportError: libcudart.so.99: cannot open" in chosen.reason
    with pytest.raises(EngineError, match=r"cannot be imported .*set engine = \"auto\""):
        engines.choose("unsloth")
    assert "unsloth" not in sys.modules


def test_where_no_gpu_kernel_can_be_compiled_that_is_said_and_the_modules_are_used(monkeypatch):
    gpu(monkeypatch, (7, 5), 15)
    words = "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"
    for module in (engines, decode_graph, compilers):
        monkeypatch.setattr(module, "triton_problem", lambda: words)
    monkeypatch.setattr(nf4, "problem", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert engines.choose("auto") == Engine(
        name="transformers", reason=f"its GPU kernels cannot be compiled here ({words})"
    )
    lines = doctor.report("runs").rows
    assert ("GPU kernels", f"Triton: cannot be compiled, so answers take longer ({words})") in lines
    assert ("GPU kernels", "nvrtc: compiled") in lines
    with pytest.warns(UserWarning, match="answers take longer.*C compiler"):
        assert decode_graph.most_rows(SimpleNamespace(device=SimpleNamespace(type="cuda")), 64) == 0


@pytest.mark.parametrize(("flash", "xformers"), [(False, False), (False, True), (True, False)])
def test_rows_are_laid_end_to_end_where_a_kernel_for_it_has_loaded(flash, xformers, importable, monkeypatch):
    found = f"HAS_FLASH_ATTENTION, HAS_XFORMERS = {flash}, {xformers}"
    importable(found)
    assert not engines.choose("unsloth").end_to_end  # not on a CPU
    gpu(monkeypatch, (7, 5), 15)
    importable(found)
    assert engines.choose("unsloth").end_to_end is (flash or xformers)
    assert not engines.choose("transformers").end_to_end
    importable("raise AssertionError('it is asked once a machine')")
    assert engines.choose("unsloth").end_to_end is (flash or xformers)


def test_xformers_that_is_installed_and_does_not_load_lays_nothing_end_to_end(tmp_path, importable, monkeypatch):
    (tmp_path / "xformers.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    importable("HAS_FLASH_ATTENTION = False\ntry:\n    import xformers\nexcept OSError:\n    HAS_XFORMERS = False")
    gpu(monkeypatch, (7, 5), 15)
    chosen = engines.choose("auto")
    assert chosen.name == "unsloth"
    assert not chosen.end_to_end
