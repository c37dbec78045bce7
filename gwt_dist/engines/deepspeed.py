"""DeepSpeed: where the elements of the weights lie in the fp32 buffers that its optimizers keep.

The attributes of DeepSpeed that are read here are not documented. They are read in `read` alone, which returns plain
data, and `attach` compares every fragment with the weights, so that another layout is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from gwt_dist.engines import refusals
from gwt_dist.engines.flat import FlatBuffer
from gwt_dist.layout import Fragment


def read(wrapper: Any) -> list[FlatBuffer] | None:
    """The buffers of an optimizer of DeepSpeed's; None for what is none. Raises `ValueError` for what is refused."""
    refusals.refuse_parallel(wrapper)
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _read_stage_3(wrapper)
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return _read_stage_1_and_2(wrapper)
    if hasattr(wrapper, "fp32_groups_flat_partition"):
        return _read_bf16_optimizer(wrapper)
    if hasattr(wrapper, "fp32_groups"):
        return _read_stage_0(wrapper)
    if hasattr(wrapper, "fp32_groups_flat"):
        return _read_fused(wrapper)
    return None


def _read_stage_0(unfused: Any) -> list[FlatBuffer]:
    """bf16 without ZeRO (`FP16_UnfusedOptimizer`): an fp32 copy of each tensor, whole and in its own shape."""
    names = unfused.overflow_checker.deepspeed.param_names
    buffers = []
    for parameters, masters in zip(unfused.fp16_groups, unfused.fp32_groups, strict=True):
        for parameter, master in zip(parameters, masters, strict=True):
            fragment = Fragment(names[parameter], tuple(parameter.shape), 0, parameter.numel())
            buffers.append(FlatBuffer(master, (fragment,), (parameter.detach().reshape(-1),), None, (parameter,)))
    return buffers


def _read_fused(fused: Any) -> list[FlatBuffer]:
    """16 bits without ZeRO, with an optimizer of DeepSpeed's own (`FP16_Optimizer`): each group's tensors, whole."""
    return [
        _concatenated(flat, parameters, _ends(parameters), None, fused.deepspeed.param_names)
        for flat, parameters in zip(fused.fp32_groups_flat, fused.fp16_groups, strict=True)
    ]


def _read_bf16_optimizer(zero: Any) -> list[FlatBuffer]:
    """Stage 1 in bf16 with fp32 accumulation (`BF16_Optimizer`): each group's tensors in the order of the group."""
    columns = zip(zero.fp32_groups_flat_partition, zero.bf16_groups, zero.real_dp_process_group, strict=True)
    return [
        _concatenated(flat, parameters, _ends(parameters), group, zero.param_names)
        for flat, parameters, group in columns
    ]


def _read_stage_1_and_2(zero: Any) -> list[FlatBuffer]:
    """Each group's tensors in the order of `round_robin_bit16_groups`, with gaps under `parameter_alignment`."""
    refusals.refuse(
        {"zero_optimization": {key: getattr(zero, key, None) for key in ("elastic_checkpoint", "compute_grad_norm")}}
    )
    groups = zero.round_robin_bit16_groups
    # DeepSpeed before `parameter_alignment` has no offsets, and no gaps.
    offsets = getattr(zero, "round_robin_bit16_offsets", None) or [_ends(parameters) for parameters in groups]
    columns = zip(zero.single_partition_of_fp32_groups, groups, offsets, zero.real_dp_process_group, strict=True)
    return [
        _concatenated(flat, parameters, begins, group, zero.param_names) for flat, parameters, begins, group in columns
    ]


def _ends(parameters: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins when they are laid one after the other; the end of the last comes last."""
    return list(accumulate((parameter.numel() for parameter in parameters), initial=0))


def _concatenated(
    flat: Tensor,
    parameters: Sequence[Tensor],
    begins: Sequence[int],
    group: ProcessGroup | None,
    names: Mapping[Tensor, str],
) -> FlatBuffer:
    """The part `flat` of tensors that are concatenated, each from its element in `begins` on, and cut into equal parts.

    tensors   |-- a --|---- b ----|- c -| pad |
    ranks     |   rank 0    |   rank 1        |
    """
    low = 0 if group is None else dist.get_rank(group) * flat.numel()
    fragments, weights, owners = [], [], []
    for parameter, begin in zip(parameters, begins, strict=False):
        start = max(begin, low) - begin
        stop = min(begin + parameter.numel(), low + flat.numel()) - begin
        # Ranks that hold nothing of a tensor still say that it exists, so that all know the same tensors.
        start, stop, offset = (start, stop, begin + start - low) if start < stop else (0, 0, 0)
        fragments.append(Fragment(names[parameter], tuple(parameter.shape), start, stop, offset))
        weights.append(parameter.detach().reshape(-1)[start:stop])
        owners.append(parameter)
    return FlatBuffer(flat, tuple(fragments), tuple(weights), group, tuple(owners))


def _read_stage_3(zero: Any) -> list[FlatBuffer]:
    """Each tensor is cut into equal slots, one a rank, and a sub-group's buffer holds this rank's slots in a row.

    tensors    |----- a -----|pad|  |--- b ---|       slot = ceil(numel / ranks); the last may be short, or empty
    rank 0     | a 0 | b 0 |
    rank 1     | a 1 | b 1 |
    """
    buffers = []
    for i, flat in enumerate(zero.fp32_partitioned_groups_flat):
        group, offset = zero._get_sub_group_process_group(i), 0
        fragments, weights = [], []
        for parameter in zero.fp16_groups[i]:
            slot = parameter.ds_tensor.ds_numel
            start = min(parameter.ds_numel, dist.get_rank(group) * slot)
            stop = min(parameter.ds_numel, start + slot)
            fragments.append(Fragment(zero.param_names[parameter], tuple(parameter.ds_shape), start, stop, offset))
            weights.append(parameter.ds_tensor.detach().reshape(-1)[: stop - start])
            offset += slot
        buffers.append(FlatBuffer(flat, tuple(fragments), tuple(weights), group, tuple(zero.fp16_groups[i])))
    return buffers
