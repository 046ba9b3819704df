"""Decode steps by the GPU's kernels, in Triton's interpreter, against those of the modules; a small random model.

Prints the largest difference of each step's logits as a JSON list: six steps with two adapters in three rows of
different lengths and strengths, two of the base without an adapter, and two of twelve rows, with unpacked matrices.
"""

import json
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bizassist_nb.assistant import decoding
from bizassist_nb.assistant.cuda import decode_graph
from bizassist_nb.models import base as models

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22], [30] * 40]


def adapter(rank):
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def differences(model, strengths, count, prompts=PROMPTS):
    ids, mask = decoding.left_padded(prompts, 0, "cpu")
    cache = DynamicCache(config=model.config)
    modules = decoding.ModuleSteps(model, decoding.Batch(prompts, strengths, frozenset(), 0), cache, mask)
    logits = modules.forward(ids)
    steps = decode_graph.FusedSteps(model, list(strengths), len(prompts), 64)
    steps.begin(cache, mask, decoding.scales(model, strengths))
    for _ in range(count):
        tokens = logits.argmax(-1).tolist()
        logits = modules(tokens)
        yield (logits - steps(tokens).float()).abs().max().item()


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=300, hidden_size=192, intermediate_size=320, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(config).save_pretrained(folder)
    base = models.load_nf4(folder)
    adapted = get_peft_model(models.load_nf4(folder), adapter(8), adapter_name="a")
adapted.add_adapter("b", adapter(4))
for name, parameter in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(parameter, std=0.05)
adapted.eval()
adapted.base_model.set_adapter(["a", "b"], inference_mode=True)
assert decode_graph.computable(adapted)
strengths = {"a": [0.0, 1.0, 0.5], "b": [0.0, 0.0, 1.5]}
found = [*differences(adapted, strengths, 6), *differences(base, {}, 2)]
many = {name: values * 4 for name, values in strengths.items()}
found += differences(adapted, many, 2, PROMPTS * 4)
print(json.dumps(found))
