"""A loop of one's own under FSDP2: a script for galore-torch with another import, and AdaLomo in the backward pass.

torchrun --standalone --nproc-per-node 2 examples/own_loop.py --optimizer galore
torchrun --standalone --nproc-per-node 2 examples/own_loop.py --optimizer adalomo
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from tiny import BATCH, STEPS, Text, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

# galore-torch has the same name and the same groups: from galore_torch import GaLoreAdamW
from gwt_dist import GaLoreAdamW, GWTAdamW, fuse_backward, param_groups


def galore(model: nn.Module) -> GWTAdamW:
    """Groups as galore-torch's documentation makes them."""
    projected = [p for name, p in model.named_parameters() if "attn" in name or "mlp" in name]
    its = {id(parameter) for parameter in projected}
    others = [p for p in model.parameters() if id(p) not in its]
    projection = {"rank": 12, "update_proj_gap": 10, "scale": 0.25, "proj_type": "std"}
    return GaLoreAdamW([{"params": others}, {"params": projected, **projection}], lr=0.01)


def adalomo(model: nn.Module) -> GWTAdamW:
    """A rate of 0.02 of what weights are; each gradient is freed as soon as the backward pass has it."""
    rest = {"recipe": "energy", "lr": 0.01}  # AdamW for embeddings, head and norms
    optimizer = GWTAdamW(param_groups(model, level=0, recipe="adalomo", lr=0.02, rest=rest))
    fuse_backward(optimizer, model)
    return optimizer


def train(name: str) -> tuple[nn.Module, GWTAdamW, list[float]]:
    """Train for `STEPS` steps."""
    model = tiny_llama()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in (*model.model.layers, model):
        fully_shard(block, mesh=mesh)
    optimizer = {"galore": galore, "adalomo": adalomo}[name](model)
    text = Text()
    data = DataLoader(text, batch_size=BATCH, sampler=DistributedSampler(text, shuffle=True))
    losses = []
    for _, batch in zip(range(STEPS), data, strict=False):
        loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
        loss.backward()
        optimizer.step()  # nothing is left to do for what is fused
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    if dist.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimizer", choices=["galore", "adalomo"], default="galore")
    dist.init_process_group()
    train(parser.parse_args().optimizer)
    dist.destroy_process_group()
