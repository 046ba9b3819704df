"""A base sharded over the processes that run this, beside a whole one: what they compute, and what each holds when.

Started by `python -m torch.distributed.run ... shards.py FOLDER`, with a folder for the base; each process prints a
line of JSON, sizes in bytes of the base's weights.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from bizassist_nb.models import base as models
from bizassist_nb.training.distributed import fsdp
from bizassist_nb.training.distributed.rank import Rank, this_rank

LAYERS = 6


def base(folder: Path):
    """NF4 with a fresh adapter; output layer and embeddings are two."""
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(models.load_nf4(folder, "cpu"), config)


def bytes_at_hand(parameters) -> int:
    """This process's part of those that are sharded, all of those that are gathered."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters if not p.requires_grad)


def watched(model) -> list[int]:
    """What is at hand in the middle of every block, there and back; it grows as the model computes."""
    seen: list[int] = []
    for layer in model.get_decoder().layers:
        layer.mlp.act_fn.register_forward_hook(lambda *_: seen.append(bytes_at_hand(model.parameters())))
        layer.mlp.act_fn.register_full_backward_hook(lambda *_: seen.append(bytes_at_hand(model.parameters())))
    return seen


def trained(model, stepped, ids, average):
    """(losses, gradients of the last step) of three steps."""
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=0.02)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = stepped(input_ids=ids, labels=ids).loss
        loss.backward()
        average([parameter.grad for parameter in mine])
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.grad for parameter in mine]


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)  # in the first process; in others it writes nothing
    torch.distributed.barrier()
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(rank))  # each has rows of its own

    passes = []
    for checkpointing in (False, True):
        whole, model = base(folder), base(folder)
        block = bytes_at_hand(whole.get_decoder().layers[0].parameters())
        outside = bytes_at_hand(whole.parameters()) - LAYERS * block
        held, of = fsdp.shard(model)
        for each in (whole, model):
            each.train()
            if checkpointing:
                each.enable_input_require_grads()
                each.gradient_checkpointing_enable()
        seen = watched(model)
        losses, gradients = trained(model, model, ids, this_rank().average)
        expected, wanted = trained(whole, DistributedDataParallel(whole), ids, Rank().average)
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(gradients, wanted, strict=True)]
        passes.append(
            {
                "losses": losses, "whole_losses": expected, "gradient_differs": max(apart), "seen": len(seen),
                "fullest": max(seen), "after": bytes_at_hand(model.parameters()),
            }
        )  # fmt: skip
    found = {"held": held, "whole": of, "block": block, "outside": outside, "passes": passes}
    sys.stdout.write(json.dumps(found) + "\n")  # in one go: all processes write to the same pipe
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
