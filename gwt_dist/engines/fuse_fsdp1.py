"""`fuse_backward` under FSDP1: each unit's gradient shard is taken in where it is reduced, in its communication hook.

FSDP1 gives the hook the whole gradient and an empty shard, and keeps the shard until the backward pass ends. The hook
has a state for each unit here, so it knows whose shard it is: it reduces as FSDP1 does, steps, and leaves a zero of one
element, expanded to the shape of the shard, in its place. FSDP1 keeps that. The private attributes of FSDP1 are read
here alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

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
    if handle._sharding_strategy.name == ShardingStrategy.NO_SHARD.name:
        raise ValueError(
            f"{name} has NO_SHARD (or one rank alone): its gradients are whole and accumulate in place, so there "
            f"is no shard to free. Call step() after the backward pass"
        )
    if handle._offload_params:
        raise ValueError(
            f"{name} keeps its weights on CPU (cpu_offload): its gradient is reduced on another device than the "
            f"weights and copied afterwards. Call step() after the backward pass"
        )
    if module._comm_hook is not None:
        raise ValueError(f"{name} has a communication hook already, and FSDP1 calls one; remove one of the two")


class Unit:
    """The state of the communication hook of one FSDP1 module."""

    def __init__(self, optimizer: Any, module: Any) -> None:
        self._optimizer, self._module, self._handle = optimizer, module, module._handle
        self._members: list[Tensor] = [self._handle.flat_param]
        if self._handle._use_orig_params:
            self._members = [p for p in self._handle.flat_param._params if p.requires_grad]
        self.holds = False  # gradients of an earlier micro-batch
        optimizer.register_step_pre_hook(self._clear_placeholder)
        module._comm_hook, module._comm_hook_state = Unit.reduce, self

    def reduce(self, gradient: Tensor, shard: Tensor) -> None:
        """Reduce the whole `gradient` of this rank into `shard`, as FSDP1 does without a hook, and take it in."""
        module = self._module
        _divide(gradient, module._gradient_predivide_factor)
        _reduce_scatter(shard, gradient, group=module.process_group)
        if self._handle._sharding_strategy.name in HYBRID:
            dist.all_reduce(shard, group=module._inter_node_pg)
        _divide(shard, module._gradient_postdivide_factor)
        self.holds = self._optimizer._accumulating
        if not self.holds:
            self._update(shard)

    def _update(self, shard: Tensor) -> None:
        flat = self._handle.flat_param
        shard.data = shard.to(flat.dtype)
        total = shard.detach()
        if hasattr(flat, "_saved_grad_shard"):  # of earlier micro-batches
            if flat._saved_grad_shard.stride() == (0,):
                raise ValueError(
                    f"{_name(self._module)} is reduced twice in one backward pass, and its first gradient has been "
                    f"taken in already. Under activation checkpointing, pass use_reentrant=False"
                )
            total = flat._saved_grad_shard.add_(total)
        flat._saved_grad_shard = total
        if self._handle._use_orig_params:
            self._handle._reset_is_grad_none()
            self._handle._use_sharded_grad_views()
        else:
            flat.grad = total
        self._optimizer.update(self._members)
        self._clear()
        del flat._saved_grad_shard
        shard.data = shard.new_zeros(()).expand_as(shard)
        # It runs after FSDP1's own callback, which makes gradients of what FSDP1 has kept; in the backward pass of a
        # reentrant checkpoint before it, and so `step` clears as well.
        torch.autograd.Variable._execution_engine.queue_callback(self._clear)

    def _clear_placeholder(self, *_: Any) -> None:
        gradient = self._handle.flat_param.grad
        if gradient is not None and gradient.stride() == (0,):
            self._clear()

    def _clear(self) -> None:
        self._handle.flat_param.grad = None
        for parameter in self._members:
            parameter.grad = None


def _divide(tensor: Tensor, factor: float) -> None:
    if factor > 1:
        tensor.div_(factor)


def _name(module: Any) -> str:
    return f"the FSDP1 unit of {module._handle.flat_param._fqns[0]!r}"
