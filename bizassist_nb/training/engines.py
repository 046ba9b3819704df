"""What trains: Unsloth, or plain transformers with PEFT. Both give a 4-bit base with a fresh LoRA adapter on it."""

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any, Final

from bizassist_nb.core.errors import EngineError
from bizassist_nb.core.settings import Settings
from bizassist_nb.models import base as models

_UNSLOTH_ON_CPU: Final = "2026.10.9"
"""The first release whose CPU backend was tested; earlier ones refuse to be imported without a GPU."""

_ROOMY: Final = 40
"""GiB of GPU memory in which a 7B model's steps of Dolly rows have room for all their activations."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """The engine chosen."""

    name: str
    """"unsloth" or "transformers"."""
    reason: str
    end_to_end: bool = False
    """Whether rows go through laid end to end, without padding."""
    graphs: bool = False
    """Whether the GPU can replay whole passes as CUDA graphs (`bizassist_nb.training.cuda_graphs`)."""


def choose(engine: str, *, processes: int = 1, sharded: bool = False) -> Engine:
    """The engine for `Settings.engine` on this device, or on those of so many processes; `sharded` is the base by FSDP.

    Raises:
        EngineError: if the one asked for is not installed or cannot run here.
    """
    problem = _unsloth_problem()
    if engine == "unsloth" and sharded:
        raise EngineError(
            'engine = "unsloth" cannot be used under FSDP: its GPU kernels read weights in ways of their own, which '
            'have not been tried with sharded ones; set engine = "auto"'
        )
    graphs = processes == 1 and not sharded and _graphs()
    if engine == "transformers":
        return Engine("transformers", "asked for", graphs=graphs)
    if engine == "unsloth" and problem:
        raise EngineError(
            f'engine = "unsloth" cannot be used: {problem}. '
            'Run: pip install "bizassist-nb[unsloth]", or set engine = "auto"'
        )
    if engine == "unsloth":
        return Engine("unsloth", "asked for", _end_to_end())
    if problem:
        return Engine("transformers", problem, graphs=graphs)
    if processes > 1 or sharded:
        return Engine("transformers", "Unsloth's kernels have not been tried on several GPUs at once")
    if graphs and _waits_for_its_host():
        why = "on a GPU as fast as this one, with its passes as CUDA graphs, it is faster than Unsloth"
        return Engine("transformers", why, graphs=True)
    return Engine("unsloth", "it is installed and works on this device", _end_to_end())


def _end_to_end() -> bool:
    """Whether Unsloth can lay rows end to end: on a GPU, with a kernel for the attention of such rows.

    Without one it does so row by row, and does not compile its blocks as it does for padded rows: half as many kernels
    again, and about 1.6 times the time on an H100 (docs/benchmarks.md).
    """
    import torch

    return torch.cuda.is_available() and any(importlib.util.find_spec(name) for name in ("xformers", "flash_attn"))


def _graphs() -> bool:
    """Whether passes can be CUDA graphs. bfloat16 only: float16's loss scale changes, and a graph would freeze it."""
    import torch

    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _waits_for_its_host() -> bool:
    """Whether this GPU is done sooner than its host can launch the next kernel, and has room to do without
    checkpointing: Hopper and later, of which an H100 was measured (docs/benchmarks.md).
    """
    import torch

    _, memory = torch.cuda.mem_get_info()
    return torch.cuda.get_device_capability() >= (9, 0) and memory >= _ROOMY * 2**30


def _unsloth_problem() -> str | None:
    """Why Unsloth cannot be used here, without importing it (which patches other libraries for good)."""
    import torch
    from packaging.version import Version

    if importlib.util.find_spec("unsloth") is None:
        return "unsloth is not installed"
    version = importlib.metadata.version("unsloth")
    if not torch.cuda.is_available() and Version(version) < Version(_UNSLOTH_ON_CPU):
        return f"unsloth {version} needs a GPU (from {_UNSLOTH_ON_CPU} on it trains on a CPU too)"
    return None


def load(engine: Engine, base: models.Base, settings: Settings, *, checkpointing: bool, sharded: bool = False) -> Any:
    """The base in 4 bits with a fresh adapter of `settings.rank`, ready to train; Unsloth is imported already.

    `checkpointing` is for Unsloth's kernels, which are told here; elsewhere the Trainer's arguments decide. `sharded`:
    the base is to be spread over several ranks, and stays in RAM until it is.
    """
    import torch

    torch.manual_seed(settings.seed)  # the adapter's A matrices are drawn at random; its B matrices are zero
    if engine.name == "unsloth":
        return _load_unsloth(base, settings, checkpointing)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(models.TARGETS),
    )
    where = "cpu" if sharded else None  # from there each part goes to the GPU as it is sharded
    return get_peft_model(models.load_nf4(base.source, where), config)


def _load_unsloth(base: models.Base, settings: Settings, checkpointing: bool) -> Any:
    import torch
    from unsloth import FastLanguageModel

    try:
        model, _ = FastLanguageModel.from_pretrained(
            base.source,
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
    return FastLanguageModel.get_peft_model(
        model,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(models.TARGETS),
        use_gradient_checkpointing="unsloth" if checkpointing and torch.cuda.is_available() else False,
        random_state=settings.seed,
    )


def own_kernels(engine: Engine, *, on_gpu: bool) -> bool:
    """Whether it computes by kernels of its own: Unsloth on a GPU. On a CPU it runs transformers' own code."""
    return engine.name == "unsloth" and on_gpu


def turn_on_checkpointing(model: Any) -> None:
    """Have the next trainer of a model with Unsloth's kernels use checkpointing, which it was loaded without.

    Unsloth 2026.10.9 lets no argument overrule what the model was loaded with: its trainer reads it from this attribute
    when it is built and when it starts (models/rl.py, prepare_for_training_mode). True is torch's own checkpointing.
    """
    model._unsloth_gradient_checkpointing = model._unsloth_gradient_checkpointing or True
