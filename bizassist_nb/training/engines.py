"""Training engines: Unsloth, and plain transformers with PEFT. Both load a 4-bit base with a fresh LoRA adapter."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from typing import Any, Final

from bizassist_nb.assistant.cuda.compilers import triton_problem
from bizassist_nb.core.errors import EngineError, ModelError
from bizassist_nb.core.files import write_atomic
from bizassist_nb.core.settings import ALL_LINEAR, Settings, cache
from bizassist_nb.models import base as models
from bizassist_nb.runs.records import Engine

_UNSLOTH_ON_CPU: Final = "2026.10.9"
"""The first release whose CPU backend was tested; earlier ones refuse to be imported without a GPU."""

_ROOMY: Final = 40
"""GiB of GPU memory that a 7B model's steps of Dolly rows take with all their activations."""


def choose(engine: str, *, sharded: bool = False) -> Engine:
    """The engine for `Settings.engine`, the same on one GPU and on several; with `sharded`, FSDP shards the base.

    Raises:
        EngineError: if the one asked for is not installed or cannot run here.
    """
    if engine == "unsloth":
        if sharded:
            raise EngineError(
                'engine = "unsloth" cannot be used under FSDP: its GPU kernels read weights in ways of their own, '
                'which have not been tried with sharded ones; set engine = "auto"'
            )
        if problem := _not_installed() or _not_importable():
            raise EngineError(
                f'engine = "unsloth" cannot be used: {problem}. '
                'Run: pip install "unsloth>=2026.10.9,<2027", or set engine = "auto"'
            )
        return Engine(name="unsloth", reason="asked for", end_to_end=_end_to_end())
    graphs = not sharded and can_graph()
    untried = "Unsloth's kernels have not been tried with a sharded base" if sharded else None
    why = "asked for" if engine == "transformers" else untried or _not_installed()
    if not why and graphs and _waits_for_its_host():
        why = "on a GPU as fast as this one, with its passes as CUDA graphs, it is faster than Unsloth"
    if why := why or _not_importable():
        return Engine(name="transformers", reason=why, graphs=graphs)
    return Engine(name="unsloth", reason="it is installed and works on this device", end_to_end=_end_to_end())


def _end_to_end() -> bool:
    """Whether Unsloth lays rows end to end: on a GPU, where xformers or flash-attn has loaded (`try_unsloth`).

    Without one it computes attention row by row, and does not compile its blocks as it does for padded rows: 1.5 times
    as many kernels, and about 1.6 times the time on an H100 (docs/benchmarks.md).
    """
    import torch

    return torch.cuda.is_available() and try_unsloth()[1]


def can_graph() -> bool:
    """Whether passes can be CUDA graphs. bfloat16 only: float16's loss scale changes, and a graph would freeze it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _waits_for_its_host() -> bool:
    """Whether this GPU ends a kernel before its host launches the next, and has room to do without checkpointing.

    Such are Hopper and later; an H100 was measured (docs/benchmarks.md).
    """
    import torch

    return torch.cuda.get_device_capability() >= (9, 0) and torch.cuda.mem_get_info()[1] >= _ROOMY * 2**30


def _not_installed() -> str | None:
    """Why Unsloth need not be tried here; None if it may work."""
    import torch
    from packaging.version import Version

    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    version = importlib.metadata.version("unsloth")
    if not torch.cuda.is_available() and Version(version) < Version(_UNSLOTH_ON_CPU):
        return f"unsloth {version} needs a GPU (from {_UNSLOTH_ON_CPU} on it trains on a CPU too)"
    return None


def _not_importable() -> str | None:
    """Why Unsloth does not work here; None if it does."""
    import torch

    if torch.cuda.is_available() and (problem := triton_problem()):
        return f"its GPU kernels cannot be compiled here ({problem})"
    return try_unsloth()[0]


@functools.cache
def try_unsloth() -> tuple[str | None, bool]:
    """Why Unsloth cannot be imported, None if it can; and whether it then has a kernel for rows laid end to end.

    Such a kernel can be installed and still not load: xformers built for CUDA 12 beside torch for CUDA 13.
    Unsloth is imported in another process, as that patches other libraries for good. That takes long, so with the same
    versions of all packages it is done once a machine.
    """
    import torch

    found = "\n".join(sorted(f"{each.name} {each.version}" for each in importlib.metadata.distributions()))
    key = hashlib.sha256(f"{sys.prefix}\n{torch.cuda.is_available()}\n{found}".encode()).hexdigest()[:16]
    kept = cache() / "unsloth" / f"attention-{key}"
    if kept.is_file():
        return None, kept.read_text("utf-8") == "True"
    environment = {**os.environ, "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(kept.parent)}
    code = "import sys, unsloth; has = sys.modules.get('unsloth.utils.attention_dispatch'); "  # None on a CPU
    command = [sys.executable, "-c", code + "print(bool(has and (has.HAS_FLASH_ATTENTION or has.HAS_XFORMERS)))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - see above
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"its process ended with status {done.returncode}"]
        return f"unsloth {importlib.metadata.version('unsloth')} cannot be imported ({last[0][:200]})", False
    loads = done.stdout.split()[-1]  # Unsloth prints before it
    with contextlib.suppress(OSError):  # then it is tried again the next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, lambda path: path.write_text(loads, "utf-8"))
    return None, loads == "True"


def load(engine: Engine, base: models.Base, settings: Settings, *, checkpointing: bool, sharded: bool = False) -> Any:
    """The base in 4 bits with a fresh adapter of `settings.rank`, ready to train; Unsloth is imported already.

    `checkpointing` is for Unsloth's kernels; elsewhere the Trainer's arguments decide. With `sharded`, the base stays
    in RAM until it is sharded.

    Raises:
        ModelError: if it cannot be loaded, or not all of `settings.target_modules` can be adapted.
    """
    import torch

    torch.manual_seed(settings.seed)  # the adapter's A matrices are drawn at random; its B matrices are zero
    lora: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
    lora["use_rslora"] = settings.rslora
    if engine.name == "unsloth":
        from unsloth import FastLanguageModel

        model = _load_unsloth(base, settings)
        lora["target_modules"] = targets = _targets(settings, model)
        checkpoint = "unsloth" if checkpointing and torch.cuda.is_available() else False
        model = FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing=checkpoint, random_state=settings.seed, **lora
        )
    else:
        from peft import LoraConfig, get_peft_model

        where = "cpu" if sharded else None  # from there each part goes to the GPU as it is sharded
        model = models.load_nf4(base.source, where, base.commit)
        lora["target_modules"] = targets = _targets(settings, model)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    linear = (name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear))
    if bare := [name for name in linear if name.rpartition(".")[2] in targets]:  # an adapted one is "NAME.base_layer"
        raise ModelError(
            f"{len(bare)} linear layers of this model were given no adapter ({bare[0]}); "
            'try engine = "transformers", or another model'
        )
    return model


def _targets(settings: Settings, model: Any) -> list[str]:
    """Names of the layers to adapt. With all of them LoRA comes up to full fine-tuning (QLoRA, arXiv:2305.14314, 4)."""
    there = models.linear_layers(model)
    if settings.target_modules == ALL_LINEAR:
        return there
    targets = [name.strip() for name in settings.target_modules.split(",")]
    if lacking := [name for name in targets if name not in there]:  # PEFT takes those it finds, without a word
        raise ModelError(
            f'target_modules = "{settings.target_modules}": the blocks of this model have no linear layer '
            f'{lacking[0]!r}; they have {", ".join(there)}. Name some of these, or "{ALL_LINEAR}"'
        )
    return targets


def _load_unsloth(base: models.Base, settings: Settings) -> Any:
    from unsloth import FastLanguageModel

    try:
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
            revision=base.commit,
            max_seq_length=settings.max_length,
            load_in_4bit=True,
            dtype=models.compute_dtype(),
            use_safetensors=True,
            trust_remote_code=False,
            use_exact_model_name=True,  # else it takes weights of its own for many names, not those asked and merged
        )
    except (OSError, ValueError) as error:
        raise models.unreachable("model", base.source, error) from error
    models.without_packing(model)
    return model


def own_kernels(engine: Engine, *, on_gpu: bool) -> bool:
    """Whether the engine has kernels of its own: Unsloth on a GPU. On a CPU it runs transformers' own code."""
    return engine.name == "unsloth" and on_gpu
