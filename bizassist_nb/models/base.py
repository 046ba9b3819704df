"""Base models: which one, from where, and how it is loaded in 4 bits."""

import dataclasses
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.core.settings import user_path
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models.embedded import embedded_folder

MISTRAL: Final = "unsloth/mistral-7b-instruct-v0.3-bnb-4bit"
"""NF4 weights of mistralai/Mistral-7B-Instruct-v0.3: 4.1 GB to download instead of 14.5."""

HUB_IDS: Final = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "mistral-7b": MISTRAL}
"""What the hub calls the bases that have names of their own here; both are under the Apache License 2.0."""

_MISTRAL_ROOM: Final = 7.0
"""GiB of free GPU memory that training Mistral-7B in NF4 takes at the least (4.8 GiB measured at micro-batch 1)."""

# Every linear layer of a decoder block, as in the QLoRA paper (arXiv:2305.14314, section 4).
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# When it is imported, bitsandbytes 0.50 warns of a CPU kernel on the hub, which is not wanted here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model, resolved."""

    name: str
    """As shown: "mistral-7b", "smollm2-135m", a hub id or a folder."""
    source: str
    """A hub id or the path of a folder, as transformers loads it."""
    reason: str
    """Why this one."""


def resolve(model: str, spare: float = 0.0) -> Base:
    """The base that `Settings.model` stands for; `spare` GiB of GPU memory are to be free besides those that are.

    Raises:
        ModelError: if it is not there.
    """
    if model == "auto":
        free, device = _free_gpu_memory()
        free += spare
        if free >= _MISTRAL_ROOM:
            return Base("mistral-7b", MISTRAL, f"{device} has {free:.1f} GiB free, enough for it in 4 bits")
        why = f"{device} has only {free:.1f} GiB free" if device else "there is no CUDA GPU"
        return Base("smollm2-135m", str(embedded_folder()), f"{why}; Mistral-7B takes {_MISTRAL_ROOM:g} GiB")
    if model == "mistral-7b":
        return Base(model, MISTRAL, "asked for")
    if model == "smollm2-135m":
        return Base(model, str(embedded_folder()), "asked for")
    folder = user_path(model)
    if folder.is_dir():
        return Base(model, str(_checked_folder(folder)), "asked for")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return Base(model, model, "asked for")
    raise ModelError(
        f'model = "{model}" is neither "auto", "mistral-7b" nor "smollm2-135m", nor a folder that exists, '
        'nor a hub id like "owner/name"'
    )


def _free_gpu_memory() -> tuple[float, str]:
    """(free GiB, name) of the first CUDA GPU; (0, "") without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, ""
    return torch.cuda.mem_get_info(0)[0] / 2**30, torch.cuda.get_device_name(0)


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no model: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no .safetensors weights; other formats can run code when loaded and are refused"
        )
    return folder.resolve()


def load_tokenizer(source: str | Path) -> ChatTokenizer:
    """The tokenizer of a hub id or folder.

    Raises:
        ModelError: if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        return ChatTokenizer(AutoTokenizer.from_pretrained(source, trust_remote_code=False))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises just that for a file that it cannot parse
        raise unreachable("tokenizer", source, error) from error


def load_nf4(source: str | Path, where: str | None = None) -> Any:
    """The model in NF4 with double quantisation (QLoRA's format), in evaluation mode.

    It is put `where` it is said, else on the GPU if there is one. Weights that are stored in 4 bits are taken as they
    are.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, loading = _from_pretrained(source, where or device())
    except torch.OutOfMemoryError:  # the caller knows what shares the GPU
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
        raise unreachable("model", source, error) from error
    wrong = [*loading["missing_keys"], *loading["mismatched_keys"], *_misshapen(model)]
    if wrong:
        raise ModelError(
            f"the weights of {source} are not those of the model in its config.json ({wrong[0]} is missing or of "
            "another shape); fetch both anew"
        )
    without_packing(model)
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            # Stored ones say bfloat16: training and merging would round to it, asking would not.
            state.dtype = compute_dtype()
    return model.eval()


def _from_pretrained(source: str | Path, where: str) -> tuple[Any, dict[str, Any]]:
    """(the model in NF4, what transformers says of its loading)."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    dtype = compute_dtype()
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:  # stored with bfloat16 as a rule, which a T4 has not
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        quantization = None
    with quietly():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            output_loading_info=True,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": where},
            use_safetensors=True,
            trust_remote_code=False,
        )
    return model, loading


def _misshapen(model: Any) -> Iterator[str]:
    """Weights of other shapes than the config's: where they are put into 4 bits, transformers 5.17 does not look."""
    import torch
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            declared, found = (module.num_embeddings, module.embedding_dim), module.weight.shape
        elif isinstance(module, Linear4bit) and (state := getattr(module.weight, "quant_state", None)):
            declared, found = (module.out_features, module.in_features), state.shape
        else:
            continue
        if tuple(found) != declared:
            yield f"{name}.weight"


@contextmanager
def quietly() -> Iterator[None]:
    """Without the progress bar of loading shards."""
    from transformers.utils import logging as transformers_logging

    bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bar:
            transformers_logging.enable_progress_bar()


def without_packing(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU that has AVX512-BF16.

    In evaluation mode its Linear4bit (0.50.2, nn/modules.py) rewrites the weights for a bfloat16 kernel on the first
    forward pass and never back. That kernel is another arithmetic than training's and has no gradient: a model that
    was scored once would go on training with almost none, and without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def device() -> str:
    """Where models run: "cpu", or the GPU of this process, which is "cuda:0" unless several train a run."""
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def compute_dtype() -> Any:
    """The dtype of arithmetic: bfloat16 where the GPU has it, float16 on older ones (a T4), float32 on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def unreachable(what: str, source: str | Path, error: Exception) -> ModelError:
    """The error for a model or tokenizer that would not load."""
    return ModelError(
        f"the {what} of {source} cannot be loaded ({brief(error)}). "
        "Check its name and the network; a folder needs config.json, tokenizer files and .safetensors weights"
    )


def count_parameters(model: Any) -> tuple[int, int]:
    """(trainable, total) parameters; 4-bit weights count what they stand for, not the bytes they are packed in."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
