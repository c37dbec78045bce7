"""`fuse_backward`: take each gradient shard into moments and weight as soon as it has been reduced, and free it.

    backward of group 3 ─► reduce-scatter ─► update of group 3, gradients freed
    backward of group 2 ─► reduce-scatter ─► update of group 2, gradients freed       one group's gradients at a time
    ...

A group is what one `fully_shard` call, or one module of FSDP1, reduces at once. The update is `GWTAdamW.update` on its
parameters: the step, driven from another place, with one collective a group where the step has one for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gwt_dist.engines import fuse_fsdp1
from gwt_dist.engines.attach import find_optimizer
from gwt_dist.engines.fuse_group import Group


def fuse_backward(optimizer: Any, model: nn.Module) -> None:
    """Update the parameters of `model` within its backward pass; `optimizer.step()` then leaves them alone.

    For FSDP2 (`fully_shard`), FSDP1 and one process. Call it once, after the model is sharded, the optimizer built and,
    under FSDP1, attached. The result is that of ``backward(); step()`` with the learning rate in force during the
    backward pass. Accumulate gradients under ``with optimizer.accumulating():`` in all micro-batches but the last;
    these are held for all groups. Call ``optimizer.step()`` after each last one as ever: it ends the step.

    Gradients are gone after the backward pass, so what needs all of them at once cannot be combined with it: clipping
    by the norm (``clip_grad_norm_`` finds nothing to clip) and a GradScaler (refused at its first step). Gradients that
    are set by hand, as torch's `get_optimizer_state_dict` sets them, are stepped by ``optimizer.step()``.

    Args:
        optimizer: The `GWTAdamW`, or a wrapper that holds it as ``.optimizer``.
        model: The module whose trainable parameters are all in `optimizer`.

    Raises:
        ValueError: Where gradients that a hook sees are not the averaged ones (DDP, DeepSpeed), FSDP1 keeps its weights
            on another device, or `optimizer` does not hold the parameters of `model`.
    """
    inner = find_optimizer(optimizer)
    ours = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in trainable:
        if id(parameter) not in ours:
            raise ValueError(
                f"the optimizer does not hold parameter {name!r} of the model as it is now; build the optimizer after "
                f"fully_shard, and pass it all trainable parameters"
            )
        if hasattr(parameter, "_fsdp_flattened"):
            if parameter not in inner.shards:
                raise ValueError(
                    f"parameter {name!r} is a part of a flat parameter of FSDP1, and the rows of its tensors are "
                    f"unknown. Call gwt_dist.attach(optimizer, model) first"
                )
        elif not isinstance(parameter, DTensor) and _world_size() > 1:
            raise ValueError(
                f"parameter {name!r} is no DTensor and there are {_world_size()} ranks: a hook on it sees the gradient "
                f"of this rank before it is averaged (DDP, DeepSpeed), and ranks would drift apart. Shard the model "
                f"with fully_shard, or call step() after the backward pass. Under DeepSpeed step() is this point"
            )
    hooked = fuse_fsdp1.units_of(model)
    for module in hooked:
        fuse_fsdp1.check(module)
    inner.fuse(parameter for _, parameter in trainable)
    for module in hooked:
        fuse_fsdp1.Unit(inner, module)
    for members in _groups(model):
        _Hooked(inner, members)


class _Hooked(Group):
    """Parameters with a hook each: updated when the last of them has its gradient."""

    def __init__(self, optimizer: Any, members: list[Tensor]) -> None:
        super().__init__(optimizer, members)
        self._ready = 0
        self._flush_is_queued = False
        for parameter in members:
            parameter.register_post_accumulate_grad_hook(self._hook)

    def _hook(self, _: Tensor) -> None:
        if self.accumulates:
            return
        self._ready += 1
        if not self._flush_is_queued:
            # A parameter that this backward pass does not use leaves the group incomplete.
            torch.autograd.Variable._execution_engine.queue_callback(self._flush)
            self._flush_is_queued = True
        if self._ready == len(self.members):
            self.update()

    def _flush(self) -> None:
        self._flush_is_queued = False
        if self._ready:
            self.update()

    def update(self) -> None:
        self._ready = 0
        super().update()


def _groups(model: nn.Module) -> Iterable[list[Tensor]]:
    """The trainable parameters of each `fully_shard` call; without any, each parameter by itself."""
    seen: set[int] = set()

    def own(module: nn.Module) -> list[Tensor]:
        found: list[Tensor] = [p for p in module.parameters(recurse=False) if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in found)
        for child in module.children():
            if not isinstance(child, FSDPModule):
                found += own(child)
        return found

    groups = [own(module) for module in model.modules() if isinstance(module, FSDPModule)]
    seen.update(id(p) for p in model.parameters() if hasattr(p, "_fsdp_flattened"))  # these have a hook of FSDP1
    alone: list[list[Tensor]] = [[p] for p in model.parameters() if p.requires_grad and id(p) not in seen]
    return [group for group in groups if group] + alone


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
