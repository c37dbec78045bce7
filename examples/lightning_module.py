"""Lightning: DDP, or FSDP2 through ModelParallelStrategy.

torchrun --standalone --nproc-per-node 2 examples/lightning_module.py --strategy fsdp2
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from tiny import BATCH, STEPS, Text, tiny_llama
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from gwt_dist import GWTAdamW, param_groups
from gwt_dist.integrations.lightning import CheckCallback


class Llama(lightning.LightningModule):
    """The tiny LLaMA as a module of Lightning."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.model = tiny_llama()
        self.sharded = sharded
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Shard each layer, then the rest, over the mesh of ModelParallelStrategy."""
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As any other optimizer."""
        return GWTAdamW(param_groups(self.model, level=2, recipe="energy", weight_decay=0.1), lr=1e-3)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss


def train(strategy: str, devices: int) -> tuple[lightning.Trainer, Llama]:
    """Train for `STEPS` steps."""
    sharded = strategy == "fsdp2"
    module = Llama(sharded)
    trainer = lightning.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
        if sharded
        else DDPStrategy(),
        accelerator="auto" if torch.cuda.is_available() else "cpu",
        devices=devices,
        max_steps=STEPS,
        callbacks=[CheckCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Text(), batch_size=BATCH, shuffle=True))
    return trainer, module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", choices=["ddp", "fsdp2"], default="fsdp2")
    parser.add_argument("--devices", type=int, default=2)
    options = parser.parse_args()
    _, trained = train(options.strategy, options.devices)
    print(f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}")
