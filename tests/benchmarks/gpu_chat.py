"""The assistant's decoding on a GPU. Usage: gpu_chat.py MODEL_FOLDER (a Mistral- or Llama-shaped model, NF4 or 16-bit)

Times base and tuned in one batch, one row alone and four rows, greedy, 128 tokens each; the time to the first token of
a 1,000-token prompt; and a step's time as the context grows. Then says what a step is made of, and compares the
logits of the graph's steps with those
of the modules, both against a reference in float32. The adapter is random: figures are of speed and arithmetic only.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bizassist_nb.assistant import decoding
from bizassist_nb.assistant.cuda import decode_graph
from bizassist_nb.core.generation import Generation
from bizassist_nb.models import base as models

TOKENS = 128
QUESTION = (
    "[INST] Suggest three concrete ways to use machine learning in predictive maintenance for production lines.[/INST]"
)


def adapted(model):
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # drawn on the CPU, so that every model gets the same
            spread = 0.02 if "lora_B" in name else 0.01
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=spread))
    return model.eval()


def decode(model, prompts, strengths, tokens=TOKENS):
    """(seconds to the first token, seconds in all)."""
    torch.cuda.synchronize()
    start, first = time.perf_counter(), 0.0
    names = {"default": strengths} if strengths else {}
    batch = decoding.Batch(prompts, names, frozenset(), pad_id=0)
    for _ in decoding.decode(model, batch, Generation(max_new_tokens=tokens)):
        first = first or time.perf_counter() - start
    torch.cuda.synchronize()
    return first, time.perf_counter() - start


def best(*arguments):
    return min(decode(*arguments)[1] for _ in range(3))


def steps(model, prompts, strengths, forced, graph):
    """Logits (steps, rows, vocabulary) for forced tokens, by the graph or by the modules."""
    ids, mask = decoding.left_padded(prompts, 0, model.device)
    cache = DynamicCache(config=model.config)
    batch = decoding.Batch(prompts, {"default": strengths}, frozenset(), 0)
    modules = decoding.ModuleSteps(model, batch, cache, mask)
    logits = [modules.forward(ids)]
    take = modules
    if graph:
        taken = decode_graph.FusedSteps(model, ["default"], len(prompts), 512)
        taken.begin(cache, mask, decoding.scales(model, {"default": strengths}))
        take = taken
    logits += [take([token] * len(prompts)).clone() for token in forced]
    return torch.stack(logits).float()


def exactness(folder, model, prompt):
    forced = list(range(1000, 1016))
    pair = steps(model, [prompt] * 2, [0.0, 1.0], forced, graph=True)
    modules = torch.cat([steps(model, [prompt], [strength], forced, graph=False) for strength in (0.0, 1.0)], dim=1)
    reference = adapted(
        AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0}, dtype=torch.float32, quantization_config=None)
        if not hasattr(model.config, "quantization_config")
        else load_float32(folder)
    )
    truth = torch.cat([steps(reference, [prompt], [strength], forced, graph=False) for strength in (0.0, 1.0)], dim=1)
    return {
        "logits_spread": truth.std().item(),
        "base_and_tuned_apart": (truth[:, 0] - truth[:, 1]).abs().max().item(),
        "graph_pair_off_reference": [(pair - truth)[:, row].abs().max().item() for row in (0, 1)],
        "modules_alone_off_reference": [(modules - truth)[:, row].abs().max().item() for row in (0, 1)],
        "same_likeliest_token": (pair.argmax(-1) == modules.argmax(-1)).float().mean().item(),
    }


def breakdown(model, prompt, strengths):
    """Milliseconds of a step by kernel, the largest first, and how many kernels it is."""
    ids, mask = decoding.left_padded([prompt] * len(strengths), 0, model.device)
    cache = DynamicCache(config=model.config)
    batch = decoding.Batch([prompt] * len(strengths), {"default": strengths}, frozenset(), 0)
    decoding.ModuleSteps(model, batch, cache, mask).forward(ids)
    taken = decode_graph.FusedSteps(model, ["default"], len(strengths), 512)
    taken.begin(cache, mask, decoding.scales(model, {"default": strengths}))
    taken([1000] * len(strengths))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            taken([1000] * len(strengths))
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    times = {kernel.key[:60]: round(kernel.self_device_time_total / 1e4, 3) for kernel in kernels[:14]}
    busy = sum(kernel.self_device_time_total for kernel in kernels) / 1e4
    return {"rows": len(strengths), "busy_ms": busy, "kernels": sum(k.count for k in kernels) / 10, "ms": times}


def load_float32(folder):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["bnb_4bit_compute_dtype"] = "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, device_map={"": 0}, dtype=torch.float32)
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            state.dtype = torch.float32
    return model.eval()


def main(folder):
    model = adapted(models.load_nf4(folder))
    assert decode_graph.most_rows(model, 512) >= 4
    prompt = AutoTokenizer.from_pretrained(folder)(QUESTION)["input_ids"]
    cold = decode(model, [prompt] * 2, [0.0, 1.0])[1]
    found = {
        "device": torch.cuda.get_device_name(0),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "triton")},
        "first_question_s": cold,
        "pair_s": best(model, [prompt] * 2, [0.0, 1.0]),
        "one_s": best(model, [prompt], [1.0]),
        "four_s": best(model, [prompt] * 4, [0.0, 1.0, 0.5, 1.5]),
        "first_token_of_1000_s": min(decode(model, [(prompt * 100)[:1000]] * 2, [0.0, 1.0], 4)[0] for _ in range(3)),
    }
    for rows in (8, 16, 64, 160):
        many, strengths = [prompt] * rows, [0.0, 1.0] * (rows // 2)
        decode(model, many, strengths, 8)
        few, most = (decode(model, many, strengths, tokens)[1] for tokens in (8, 72))
        found[f"ms_a_step_of_{rows}_rows"] = (most - few) / 64 * 1000
    for context in (500, 1000, 2000, 4000):
        long = [(prompt * 400)[:context]] * 2
        decode(model, long, [0.0, 1.0], 72)
        few, many = (decode(model, long, [0.0, 1.0], tokens)[1] for tokens in (8, 72))
        found[f"ms_a_step_at_{context}"] = (many - few) / 64 * 1000
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    found["pair_against_one"] = found["pair_s"] / found["one_s"]
    print("RESULT", json.dumps(found), flush=True)
    for strengths in ([1.0], [0.0, 1.0]):
        print("RESULT", json.dumps(breakdown(model, prompt, strengths)), flush=True)
    print("RESULT", json.dumps(exactness(folder, model, prompt)), flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
