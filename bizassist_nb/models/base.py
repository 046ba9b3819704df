"""Base models: which one, from where, and how it is loaded in 4 bits."""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.core.settings import user_path
from bizassist_nb.data.tokens import ChatTokenizer
from bizassist_nb.models.embedded import embedded_folder
from bizassist_nb.models.named import NAMED
from bizassist_nb.runs.records import Model

HUB_IDS: Final = {name: named.hub for name, named in NAMED.items()}
"""What the hub calls the bases that have names of their own here."""

_MISTRAL_ROOM: Final = 7.0
"""GiB of free GPU memory that training Mistral-7B in NF4 takes at the least (4.8 GiB measured at micro-batch 1)."""

# When it is imported, bitsandbytes 0.50 warns of a CPU kernel on the hub, which is not wanted here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


Base = Model


def resolve(model: str, spare: float = 0.0) -> Base:
    """The base that `Settings.model` stands for; for "auto", `spare` GiB of GPU memory count as free, too.

    Raises:
        ModelError: if it is not there.
    """
    reason = "asked for"
    if model == "auto":
        free, device = free_gpu_memory()
        free += spare
        if free >= _MISTRAL_ROOM:
            model, reason = "mistral-7b", f"{device} has {free:.1f} GiB free, enough for it in 4 bits"
        else:
            why = f"{device} has only {free:.1f} GiB free" if device else "there is no CUDA GPU"
            model, reason = "smollm2-135m", f"{why}; Mistral-7B takes {_MISTRAL_ROOM:g} GiB"
    if model == "smollm2-135m":
        source = str(embedded_folder())
    elif model in HUB_IDS:
        source = HUB_IDS[model]
    elif (folder := user_path(model)).is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} holds no model: it has no config.json")
        if not any(folder.glob("*.safetensors")):
            raise ModelError(
                f"{folder} has no .safetensors weights; other formats can run code when loaded and are refused"
            )
        source = str(folder.resolve())
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        source = model
    else:
        raise ModelError(
            f'model = "{model}" is neither "auto" nor {", ".join(HUB_IDS)}, nor a folder that exists, '
            'nor a hub id like "owner/name"'
        )
    return Base(name=model, source=source, reason=reason)


def pinned(base: Base, revision: str = "") -> Base:
    """The base with its revision: the one given, from a run's environment.json, or the present one.

    Raises:
        ModelError: if a folder has other weights by now, or the hub cannot be reached.
    """
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    folder = Path(base.source)
    if not folder.is_dir():
        try:
            newest = revision or extract_commit_hash(cached_file(base.source, "config.json"), None) or ""
        except (OSError, ValueError) as error:
            raise unreachable("config", base.source, error) from error
        return msgspec.structs.replace(base, revision=newest)
    if base.name == "smollm2-135m":  # each machine converts it, and the folder's name has its version
        return base
    found = _digest(folder)
    if revision not in ("", found):
        raise ModelError(
            f"the weights in {folder} are not those that the run was trained on; bring these back, or start a new run"
        )
    return msgspec.structs.replace(base, revision=found)


def _digest(folder: Path) -> str:
    """SHA-256 of the sizes, beginnings and ends of a folder's weights: training changes all of them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(2**20))
            file.seek(max(0, size - 2**20))
            digest.update(file.read())
    return digest.hexdigest()


def free_gpu_memory() -> tuple[float, str]:
    """(free GiB, name) of the first CUDA GPU; (0, "") without one."""
    import torch

    if not torch.cuda.is_available():
        return 0.0, ""
    return torch.cuda.mem_get_info(0)[0] / 2**30, torch.cuda.get_device_name(0)


def load_tokenizer(source: str | Path, commit: str | None = None) -> ChatTokenizer:
    """The tokenizer of a hub id, of that commit or the newest, or of a folder.

    Raises:
        ModelError: if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=commit, trust_remote_code=False)
        return ChatTokenizer(tokenizer, _stops(source, commit))
    except ModelError:
        raise
    except Exception as error:  # tokenizers raises just that for a file that it cannot parse
        raise unreachable("tokenizer", source, error) from error


def _stops(source: str | Path, commit: str | None) -> list[int]:
    """Tokens at which the base itself ends an answer, as its generation_config.json has them."""
    from transformers.utils import cached_file

    path = cached_file(source, "generation_config.json", revision=commit, _raise_exceptions_for_missing_entries=False)
    stops = json.loads(Path(path).read_bytes()).get("eos_token_id") if path else None
    return stops if isinstance(stops, list) else [] if stops is None else [stops]


def load_nf4(source: str | Path, where: str | None = None, commit: str | None = None) -> Any:
    """The model in NF4 with double quantisation (QLoRA's format), in evaluation mode.

    `where` is its device: by default the GPU if there is one. Weights stored in 4 bits are taken as they are.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError

    try:
        model, loading = _from_pretrained(source, where or device(), commit)
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


def _from_pretrained(source: str | Path, where: str, commit: str | None) -> tuple[Any, dict[str, Any]]:
    """(the model in NF4, what transformers says of its loading)."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    dtype = compute_dtype()
    config = AutoConfig.from_pretrained(source, revision=commit, trust_remote_code=False)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        double = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **double)
    else:  # stored with bfloat16 as a rule, which a T4 has not
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        quantization = None
    with quietly():
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            revision=commit,
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
    """Stop bitsandbytes from repacking 4-bit weights on a CPU that has AVX512-BF16.

    In evaluation mode its Linear4bit (0.50.2, nn/modules.py) rewrites the weights for a bfloat16 kernel on the first
    forward pass, for good. That kernel computes otherwise than training and has no gradient: a model that was scored
    once would train on with almost none, and without an error.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def unpack(model: Any) -> None:
    """Store a model's 4-bit matrices on a CPU in float32, too, if half of the free RAM has room for them.

    A pass unpacks them otherwise, each time: half of a token's time in a chat (docs/benchmarks.md).
    """
    import psutil
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    packed = [module for module in model.modules() if isinstance(module, Linear4bit) and "forward" not in vars(module)]
    numbers = sum(module.in_features * module.out_features for module in packed)
    if model.device.type != "cpu" or 2 * 4 * numbers > psutil.virtual_memory().available:
        return
    for module in packed:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        module.forward = functools.partial(torch.nn.functional.linear, weight=weight, bias=module.bias)


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
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return ModelError(
            f"{source} is gated: accept its licence at https://huggingface.co/{source}, then log in with "
            "hf auth login, or set HF_TOKEN (on Colab, in Secrets), and start again"
        )
    return ModelError(
        f"the {what} of {source} cannot be loaded ({brief(error)}). "
        "Check its name and the network; a folder needs config.json, tokenizer files and .safetensors weights"
    )


def linear_layers(model: Any) -> list[str]:
    """Names of the linear layers of a decoder block, as a block calls them."""
    import torch

    output = model.get_output_embeddings()
    linear = (
        name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not output
    )
    return sorted({name.rpartition(".")[2] for name in linear})
