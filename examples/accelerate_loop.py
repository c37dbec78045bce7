"""A loop of one's own with Accelerate: DeepSpeed or FSDP2.

torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py --engine fsdp2
accelerate launch --config_file configs/fsdp2.yaml examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse
import os

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from tiny import BATCH, STEPS, Text, spread_on_cpus, tiny_llama
from torch import nn
from torch.utils.data import DataLoader

from gwt_dist import GWTAdamW, param_groups
from gwt_dist.integrations.accelerate import prepare


def accelerator_of(engine: str) -> Accelerator:
    """An Accelerator for DeepSpeed or FSDP2. The file of `accelerate launch` wins over the settings of FSDP2 here."""
    if engine == "deepspeed":
        config = {"train_micro_batch_size_per_gpu": BATCH, "gradient_clipping": 0, "zero_optimization": {"stage": 2}}
        accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
        spread_on_cpus()
        return accelerator
    settings = {
        "fsdp_version": 2,
        "auto_wrap_policy": "transformer_based_wrap",
        "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"],
    }
    launched = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    plugin = FullyShardedDataParallelPlugin(**({} if launched else settings))
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=not torch.cuda.is_available())
    spread_on_cpus(plugin)
    return accelerator


def train(engine: str) -> tuple[nn.Module, object, list[float]]:
    """Train for `STEPS` steps."""
    accelerator = accelerator_of(engine)
    model = tiny_llama()
    optimizer = GWTAdamW(param_groups(model, level=2, recipe="energy", weight_decay=0.1), lr=1e-3)
    model, optimizer, data = prepare(accelerator, model, optimizer, DataLoader(Text(), batch_size=BATCH, shuffle=True))
    losses = []
    for _, batch in zip(range(STEPS), data, strict=False):
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    accelerator.print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return model, optimizer, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["deepspeed", "fsdp2"], default="fsdp2")
    train(parser.parse_args().engine)
