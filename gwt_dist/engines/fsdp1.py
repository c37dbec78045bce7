"""FSDP1 (`FullyShardedDataParallel`): where the elements of the weights lie in its flat parameters.

    unit      |-- a --|.|---- b ----|- c -|...|       . is padding, between tensors and at the end
    ranks     |    rank 0   |    rank 1       |

With ``use_orig_params=True`` the optimizer is given each tensor's part on this rank as a parameter of its own, with
``False`` the flat parameter. The private attributes of FSDP1 are read here alone.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from gwt_dist.engines.flat import FlatBuffer
from gwt_dist.layout import Fragment

WRAPPER = "_fsdp_wrapped_module."


def read(model: Any) -> list[FlatBuffer] | None:
    """The parameters that the units of an FSDP1 model hand to the optimizer; None for any other thing.

    Raises `ValueError` for a HYBRID_SHARD that FSDP1 does not carry out.
    """
    if not isinstance(model, nn.Module) or not any(isinstance(m, FullyShardedDataParallel) for m in model.modules()):
        return None
    buffers = []
    for name, module in model.named_modules():
        handle = getattr(module, "_handle", None) if isinstance(module, FullyShardedDataParallel) else None
        if handle is not None:
            _refuse_apart(module)
            prefix = (name + ".").removeprefix(".").replace(WRAPPER, "").removeprefix(".")
            buffers += _read_unit(handle, prefix)
    return buffers


def _read_unit(handle: Any, prefix: str) -> list[FlatBuffer]:
    flat = handle.flat_param
    whole = handle._sharding_strategy.name == ShardingStrategy.NO_SHARD.name
    group: ProcessGroup | None = None if whole else handle.process_group
    low = 0 if whole else dist.get_rank(group) * flat._sharded_size.numel()
    ends = list(accumulate(flat._numels_with_padding))
    begins = [
        e - n for e, n, pad in zip(ends, flat._numels_with_padding, flat._is_padding_mask, strict=True) if not pad
    ]
    fragments, places = [], []
    for fqn, shape, begin, info in zip(flat._fqns, flat._shapes, begins, flat._shard_param_infos, strict=True):
        start, stop, offset = 0, 0, 0
        if info.in_shard:
            start, stop, offset = info.intra_param_start_idx, info.intra_param_end_idx + 1, info.offset_in_shard
        fragments.append(Fragment(prefix + fqn, tuple(shape), start, stop, offset))
        # The same place by the other of FSDP's records, which `attach` compares bit for bit.
        places.append(begin + start - low if info.in_shard else 0)
    local = _local(flat)
    weights = [local[place : place + f.numel] for place, f in zip(places, fragments, strict=True)]
    if not handle._use_orig_params:
        return [FlatBuffer(flat, tuple(fragments), tuple(weights), group)]
    return [
        FlatBuffer(parameter, (Fragment(f.fqn, f.shape, f.start, f.stop, 0),), (weight,), group)
        for parameter, f, weight in zip(flat._params, fragments, weights, strict=True)
    ]


def _refuse_apart(module: Any) -> None:
    """Raise `ValueError` for replicas whose gradients FSDP1 does not sum.

    It takes HYBRID_SHARD over shard groups of one rank for NO_SHARD on one rank.
    """
    replicas = getattr(module, "_inter_node_pg", None)
    if not module._handle.uses_sharded_strategy and replicas is not None and dist.get_world_size(replicas) > 1:
        raise ValueError(
            f"the FSDP1 unit of {module._handle.flat_param._fqns[0]!r} has HYBRID_SHARD with one rank in each shard "
            f"group: FSDP1 makes NO_SHARD of it and sums no gradient over its {dist.get_world_size(replicas)} "
            f"replicas, which would train apart in silence. Use NO_SHARD over all ranks or DistributedDataParallel"
        )


def _local(flat: Any) -> Tensor:
    """The part of a flat parameter that this rank holds; outside of forward and backward there is no other."""
    local: Tensor = getattr(flat, "_local_shard", flat)
    return local.detach().reshape(-1)
