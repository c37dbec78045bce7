"""Accelerate: `prepare`, which is `Accelerator.prepare` with the optimizer attached and the engine checked."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from gwt_dist.engines import section
from gwt_dist.integrations.engaged import asked_of_accelerate, engage, warn_of_one_process


def prepare(accelerator: Accelerator, *objects: Any) -> Any:
    """`accelerator.prepare(*objects)`, same arguments and return, with one model and its `GWTAdamW` among them.

    Under FSDP2 Accelerate puts DTensors in the place of the optimizer's parameters, which it recognises; under
    DeepSpeed the layout of the flat buffers is attached. With ``offload_optimizer`` the DeepSpeed JSON needs
    ``"zero_force_ds_cpu_optimizer": false``, or Accelerate swaps the optimizer for DeepSpeedCPUAdam.

    For an optimizer section of type GWTAdamW in the DeepSpeed JSON pass a `DummyOptim`, as Accelerate asks for; the
    optimizer is then built as `gwt_dist.initialize` does, with levels by ``targets``.

    Raises:
        ValueError: If there is not one model and one optimizer, if the DeepSpeed or FSDP that was asked for is not
            on, if FSDP1 is, or if Accelerate put another optimizer in the place of `GWTAdamW`.
        LayoutError: If DeepSpeed lays its buffers out in a way that this version does not know.
    """
    for thing in objects:
        if isinstance(thing, nn.Module):
            section.offer(thing)
    prepared = accelerator.prepare(*objects)
    results = prepared if isinstance(prepared, (tuple, list)) else (prepared,)
    models = [thing for thing in results if isinstance(thing, nn.Module)]
    optimizers = [thing for thing in results if isinstance(thing, AcceleratedOptimizer)]
    if len(models) != 1 or len(optimizers) != 1:
        raise ValueError(
            f"prepare was given {len(models)} models and {len(optimizers)} optimizers; pass the model and its GWTAdamW "
            f"in one call, as the layout of the one is that of the other"
        )
    warn_of_one_process()
    engage(optimizers[0], models[0], asked_of_accelerate())
    return prepared
