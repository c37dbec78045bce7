"""fairscale: where the elements of the weights lie in the shards of its `FullyShardedDataParallel`, and the gradients
that its `ShardedDataParallel` may lose.

`OSS` hands whole tensors to the optimizer, so there is nothing to read. The attributes of fairscale 0.4.13 that are
read here are not documented. They are read in `read` and `_detached` alone.

The tests run the shards on CPU, where fairscale alone cannot: they lend it the CUDA streams that it asks for
(`tests/fairscale_cases.py`). No GPU has run this.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from gwt_dist.engines.flat import FlatBuffer, cut
from gwt_dist.layout import LayoutError


def read(model: Any) -> list[FlatBuffer] | None:
    """The sharded parameters of all `FullyShardedDataParallel` modules in a model; None for what has none.

    With ``flatten_parameters`` the tensors of a module, one after the other, are one parameter; without, each tensor is
    one. Either way it is cut into equal chunks, one a rank, and the last chunks are padded, or nothing but padding.

    tensors   |-- a --|---- b ----|- c -| pad |
    ranks     |   rank 0    |   rank 1        |

    The chunks are the only copy of the weights, so `attach` cannot compare them with another. It compares places: that
    the fragments fill the chunk from its start to the padding that fairscale counts, and that ranks hold each element
    once.

    Raises:
        LayoutError: If a parameter is not the chunk of its tensors that it should be.
    """
    if not isinstance(model, nn.Module):
        return None
    # vars: the wrappers of fairscale pass an unknown attribute on to what they wrap.
    wrapped = [(path, module) for path, module in model.named_modules() if "numel_padded_per_param" in vars(module)]
    if not wrapped:
        return None
    buffers = []
    for path, module in wrapped:
        world_size, rank = module.world_size, dist.get_rank(module.process_group)
        # Parameters that a sibling module owns come last, without a name; they are read there.
        named = zip(module.params, module.numel_padded_per_param, module._param_name_groups, strict=False)
        for i, (parameter, padding, names) in enumerate(named):
            if not parameter.requires_grad:
                continue  # no step changes it, and after a backward pass it may be whole
            shapes = [parameter._orig_size]
            if i < module._num_flatten_params:
                names = [f"{owner}.{name}" for owner, _, name in parameter._param_infos]
                shapes = parameter._param_shapes
            elif not parameter._is_sharded:
                continue  # a world of 1, where a tensor that is not flattened stays as it is
            tensors = [(_clean(f"{path}.{n}"), tuple(s)) for n, s in zip(names, shapes, strict=True)]
            chunk = -(-sum(prod(shape) for _, shape in tensors) // world_size)
            if tuple(parameter.shape) != (chunk,):
                raise LayoutError(
                    f"the fairscale parameter that holds {tensors[0][0]!r} has shape {tuple(parameter.shape)} and "
                    f"should be a chunk of {chunk} elements; a step would change the wrong ones. Call gwt_dist.attach "
                    f"outside of summon_full_params and of the forward and backward pass"
                )
            fragments = cut(tensors, rank * chunk, (rank + 1) * chunk)
            unpadded = parameter.detach()[: chunk - padding]
            ends = accumulate(f.numel for f in fragments)
            weights = tuple(unpadded[end - f.numel : end] for f, end in zip(fragments, ends, strict=True))
            buffers.append(FlatBuffer(parameter, fragments, weights, module.process_group if world_size > 1 else None))
    return buffers


def _clean(path: str) -> str:
    return ".".join(part for part in path.split(".") if part not in ("", "_fsdp_wrapped_module", "_fpw_module"))


def guard_gradients(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Make each step of `optimizer` check that the gradients are those that `ShardedDataParallel` has reduced.

    Its buckets are reduced, and gradients are views of them, until ``zero_grad(set_to_none=True)``, the default of
    torch, puts None in their place: from then on backward makes gradients of this rank alone, and nothing says so.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if "_should_bucket_grad" in vars(module):
            optimizer.register_step_pre_hook(partial(_check_gradients, module))


def _check_gradients(sharded: nn.Module, *_: Any) -> None:
    detached, bucketed = _detached(sharded)
    if detached:
        raise ValueError(
            f"{detached} of {bucketed} gradients are not in the buckets of ShardedDataParallel, which were reduced "
            f"without them: each rank would step on its own gradients. zero_grad(set_to_none=True), the default of "
            f"optimizers, took them out. Call model.zero_grad() of the ShardedDataParallel, or "
            f"optimizer.zero_grad(set_to_none=False), or build it with reduce_buffer_size=0"
        )


def _detached(sharded: Any) -> tuple[int, int]:
    """How many parameters have a gradient elsewhere than in their bucket, and how many have a bucket."""
    inside = [
        p.grad is not None and p.grad.untyped_storage().data_ptr() == bucket.buffer.untyped_storage().data_ptr()
        for bucket in sharded._bucket_list
        for p in bucket._params
    ]
    return inside.count(False), len(inside)
