"""`fuse_backward` under FSDP1: each unit's gradient shard is taken in where it is reduced, in its communication hook.

FSDP1 gives the hook the whole gradient and an empty shard, and keeps the shard until the backward pass ends. With
NO_SHARD, which is any strategy on one rank, it gives the gradient alone, with those of earlier micro-batches in it: the
shard is the whole. The hook has a state for each unit here, so it knows whose shard it is: it reduces as FSDP1 does,
steps, and leaves a zero of one element, expanded to the shape of the shard, in its place. FSDP1 keeps that. The private
attributes of FSDP1 are read here alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from gwt_dist.engines.fuse_group import Group

# One function; torch has deprecated its old name.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
HYBRID = (ShardingStrategy.HYBRID_SHARD.name, ShardingStrategy._HYBRID_SHARD_ZERO2.name)


def units_of(model: nn.Module) -> list[FullyShardedDataParallel]:
    """The FSDP1 modules of a model that hold trainable parameters; empty if FSDP1 does not wrap it."""
    modules = [m for m in model.modules() if isinstance(m, FullyShardedDataParallel)]
    return [m for m in modules if m._handle is not None and m._handle.flat_param.requires_grad]


def check(module: Any) -> None:
    """Raise `ValueError` for an FSDP1 module whose gradient shard a hook does not see."""
    handle, name = module._handle, _name(module)
    if handle._offload_params:
        raise ValueError(
            f"{name} keeps its weights on CPU (cpu_offload): its gradient is reduced on another device than the "
            f"weights and copied afterwards. Call step() after the backward pass"
        )
    if module._comm_hook is not None:
        raise ValueError(f"{name} has a communication hook already, and FSDP1 calls one; remove one of the two")


class Unit(Group):
    """The state of the communication hook of one FSDP1 module."""

    def __init__(self, optimizer: Any, module: Any) -> None:
        self._module, self._handle = module, module._handle
        flat = self._handle.flat_param
        super().__init__(optimizer, [p for p in flat._params if p.requires_grad] if flat._params else [flat])
        module._comm_hook, module._comm_hook_state = Unit.reduce, self

    def reduce(self, gradient: Tensor, shard: Tensor | None = None) -> None:
        """Reduce the whole `gradient` of this rank into `shard`, as FSDP1 does without a hook, and take it in.

        Both are 1-D, of the dtype that FSDP1 reduces in. Without a `shard` (NO_SHARD) the sum stays in `gradient`, that
        of the flat parameter.
        """
        module = self._module
        _divide(gradient, module._gradient_predivide_factor)
        if shard is None:
            dist.all_reduce(gradient, group=module.process_group)
            shard = gradient
        else:
            _reduce_scatter(shard, gradient, group=module.process_group)
        if self._handle._sharding_strategy.name in HYBRID:
            dist.all_reduce(shard, group=module._inter_node_pg)
        _divide(shard, module._gradient_postdivide_factor)
        if not self.accumulates:
            self._take(shard)

    def _take(self, shard: Tensor) -> None:
        flat = self._handle.flat_param
        shard.data = shard.to(flat.dtype)
        total = shard.detach()
        if hasattr(flat, "_saved_grad_shard"):  # of earlier micro-batches
            total = flat._saved_grad_shard.add_(total)
        flat._saved_grad_shard = total
        if self._handle._use_orig_params:
            self._handle._reset_is_grad_none()
            self._handle._use_sharded_grad_views()
        else:
            flat.grad = total
        self.update()
        del flat._saved_grad_shard
        shard.data = shard.new_zeros(()).expand_as(shard)
        if not self._handle.uses_sharded_strategy:
            flat.grad = shard  # FSDP1 goes on with it
        # It runs after FSDP1's own callback, which makes gradients of what FSDP1 has kept.
        torch.autograd.Variable._execution_engine.queue_callback(self.clear)

    def clear(self) -> None:
        """Free the gradients, and the flat one that they are views of."""
        self._handle.flat_param.grad = None
        super().clear()

    def _end(self, *_: Any) -> None:
        super()._end()
        gradient = self._handle.flat_param.grad
        # In the backward pass of a reentrant checkpoint the callback runs before FSDP1's.
        if gradient is not None and gradient.stride() == (0,):
            self.clear()


def _divide(tensor: Tensor, factor: float) -> None:
    if factor > 1:
        tensor.div_(factor)


def _name(module: Any) -> str:
    return f"the FSDP1 unit of {module._handle.flat_param._fqns[0]!r}"
