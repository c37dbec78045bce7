"""Lightning: a callback that sees that the strategy which was asked for is on before the first step.

`configure_optimizers` returns the `GWTAdamW` as any other optimizer, with DDP and with `ModelParallelStrategy`.
"""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from gwt_dist.engines.attach import find_optimizer
from gwt_dist.integrations.engaged import engage


class CheckCallback(lightning.Callback):
    """Raises when training starts on a strategy that is not tested, or without the sharding that was asked for.

    ``held`` then says how the optimizer holds the weights.
    """

    held: str | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Raises `ValueError` for a strategy that is not tested, and for shards that are missing or too many."""
        strategy = trainer.strategy
        name = type(strategy).__name__
        if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy)) or len(trainer.optimizers) != 1:
            raise ValueError(
                f"{name} with {len(trainer.optimizers)} optimizers is not tested with GWTAdamW and refused. Use one "
                f"optimizer, and DDPStrategy or ModelParallelStrategy (FSDP2: fully_shard in configure_model)"
            )
        self.held = engage(find_optimizer(trainer.optimizers[0]), pl_module, None)
        if isinstance(strategy, ModelParallelStrategy) and self.held != "DTensors":
            raise ValueError(
                f"ModelParallelStrategy is on and no parameter of the optimizer is a DTensor ({self.held}), so ranks "
                f"would not share state, nor gradients. Call fully_shard on the model in configure_model, with the "
                f"mesh self.device_mesh['data_parallel'], and build the optimizer in configure_optimizers"
            )
        if isinstance(strategy, DDPStrategy) and self.held != "whole tensors":
            raise ValueError(f"DDPStrategy around {self.held}: sharded parameters would be reduced twice. Choose one")
