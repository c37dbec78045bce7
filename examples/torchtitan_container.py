"""torchtitan's optimizer container over an FSDP2 model, as its trainer builds it.

torchrun --standalone --nproc-per-node 2 examples/torchtitan_container.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny import BATCH, STEPS, Text, tiny_llama
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from gwt_dist.integrations.torchtitan import optimizer_config


def train() -> tuple[nn.Module, torch.optim.Optimizer, list[float]]:
    """Train for `STEPS` steps."""
    # transformers' names; the default of `targets` has torchtitan's.
    config = optimizer_config(
        level=2, targets=[r"_proj\.weight$"], lr=1e-3, weight_decay=0.1, recipe="energy", betas=(0.9, 0.999)
    )
    model = tiny_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizers = config.build(model_parts=[model])  # torchtitan: --module and a config whose `optimizer` is this one
    losses = []
    data = Text()
    for _, batch in zip(range(STEPS), DataLoader(data, BATCH, sampler=DistributedSampler(data)), strict=False):
        optimizers.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizers.step()
        losses.append(loss.item())
    return model, optimizers, losses


if __name__ == "__main__":
    dist.init_process_group()
    *_, curve = train()
    print(f"loss {curve[0]:.2f} -> {curve[-1]:.2f}")
    dist.destroy_process_group()
