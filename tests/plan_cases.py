"""What the ranks of `test_plan_command.py` run: an engine of the matrix takes a step, and its bytes are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from fsdp2_cases import Counter, local
from gwt_dist.optimizer import GWTAdamW
from matrix_cases import FAMILIES, Model
from zero_cases import gradients, shapes_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def size(tensor: Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


def state_of(optimizer: GWTAdamW) -> dict[str, int]:
    """Bytes of moments, and of steps and norms."""
    tensors = [item for state in optimizer.state.values() for item in state.items()]
    return {
        "moments": sum(size(t) for name, t in tensors if name in MOMENTS),
        "scalars": sum(size(t) for name, t in tensors if name not in MOMENTS),
    }


def storages(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind tensors, padding included, what they share counted once."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(found.values())


def weights_of(model: nn.Module) -> int:
    """Bytes of the model's own weights."""
    parameters = list(model.parameters())
    if hasattr(parameters[0], "ds_tensor"):
        whole = [p for p in parameters if p.ds_status.name == "AVAILABLE"]
        return sum(size(p.ds_tensor) for p in parameters) + sum(size(p) for p in whole)
    handles = [m._handle for m in model.modules() if isinstance(m, FullyShardedDataParallel) and m._handle]
    if handles:
        return sum(size(getattr(h.flat_param, "_local_shard", h.flat_param)) for h in handles)
    # FSDP2 keeps the storage of a rank without rows as well.
    if isinstance(parameters[0], DTensor):
        return sum(p._local_tensor.untyped_storage().nbytes() for p in parameters)
    return storages(parameters)


def allocated_case(family: str, arguments: tuple[Any, ...], kind: str) -> dict[str, Any]:
    """Bytes after a step in which every trained tensor has a gradient, and the elements of the step's collectives."""
    with FAMILIES[family](kind, *arguments) as built:
        held = {id(p) for p in built.model.parameters()}
        given: list[int] = []
        stepped: dict[Tensor, None] = {}

        def watch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            stepped.update(dict.fromkeys(parameters))
            given.append(sum(size(p.grad) for p in parameters if p.grad is not None))

        built.optimizer.register_step_pre_hook(watch)
        step = next(gradients(shapes_of(Model(kind)), 1))
        with Counter() as counter:
            built.take(step)
        own = {id(p) for p in stepped} & held
        return {
            **state_of(built.optimizer),
            "weights": weights_of(built.model),
            "masters": sum(size(p) for p in stepped if id(p) not in held) if not own else 0,
            "given": max(given),
            "collectives": sum(length for _, length in counter.calls),
        }
