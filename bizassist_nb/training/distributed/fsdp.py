"""One base sharded over the ranks of a run by PyTorch's FSDP2.

Each rank stores its part of every frozen weight, and has a whole decoder block only while that computes. The adapter
is not sharded: each rank has all of it, and its gradients are averaged as they are where every rank has a whole base.
So checkpoints and adapters are the same files, and a run can go on either way.
"""

from typing import Any

from bizassist_nb.models import base as models


def shard(model: Any) -> tuple[int, int]:
    """Shard the frozen weights of a base in NF4 with its adapter, which are in RAM, over the ranks' devices, in place.

    It gives (bytes of them in this rank, bytes of all of them). Their scales, about a thirtieth of them, stay whole:
    bitsandbytes stores them in each layer's `quant_state`.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    kind, _, _ = models.device().partition(":")
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    base = model.get_base_model()
    for module in base.modules():
        if isinstance(module, Linear4bit):
            # The same bits as 16-bit numbers: FSDP2 of torch 2.11 makes a trained parameter of each part before it
            # makes a frozen one, which it cannot of bytes. bitsandbytes takes either (its `quant_storage`).
            packed = module.weight.data.view(-1).view(torch.bfloat16)[:, None]
            module.weight = torch.nn.Parameter(packed, requires_grad=False)
            module.quant_storage = packed.dtype
            module.quant_state.to(models.device())
    for block in base.get_decoder().layers:
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)  # embeddings, output layer, last norm
    for parameter in adapter:
        parameter.data = parameter.data.to(models.device())
    base.hf_device_map = {"": models.device()}  # which accelerate asks when it prepares the model
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    here = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)
    return here, sum(parameter.nbytes for parameter in frozen)
