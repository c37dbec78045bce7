"""DeepSpeed ZeRO stages 1, 2 and 3: where the elements of the weights lie in its flat fp32 buffers.

The attributes of DeepSpeed that are read here are not documented. They are read in `read` alone, which returns plain
data, and `attach` compares every fragment with the weights, so that another layout is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from gwt_dist.engines.flat import FlatBuffer
from gwt_dist.layout import Fragment


def read(wrapper: Any) -> list[FlatBuffer] | None:
    """The flat buffers of a ZeRO optimizer; None for what is no ZeRO optimizer."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _read_stage_3(wrapper)
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return _read_stage_1_and_2(wrapper)
    if hasattr(wrapper, "fp32_groups_flat_partition") or hasattr(wrapper, "fp32_groups"):
        raise ValueError(
            f"the layout of DeepSpeed's {type(wrapper).__name__} is not read by this version. Set "
            f"zero_optimization.stage to 1, 2 or 3, with the default data_types.grad_accum_dtype"
        )
    return None


def _read_stage_1_and_2(zero: Any) -> list[FlatBuffer]:
    """Each group is the concatenation of its tensors in the order of `round_robin_bit16_groups`, cut into equal parts.

    tensors   |-- a --|---- b ----|- c -| pad |
    ranks     |   rank 0    |   rank 1        |
    """
    buffers = []
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        group = zero.real_dp_process_group[i]
        low = dist.get_rank(group) * flat.numel()
        fragments, weights = [], []
        for parameter, begin in zip(zero.round_robin_bit16_groups[i], zero.round_robin_bit16_offsets[i], strict=True):
            start = max(begin, low) - begin
            stop = min(begin + parameter.numel(), low + flat.numel()) - begin
            # Ranks that hold nothing of a tensor still say that it exists, so that all know the same tensors.
            start, stop, offset = (start, stop, begin + start - low) if start < stop else (0, 0, 0)
            fragments.append(Fragment(zero.param_names[parameter], tuple(parameter.shape), start, stop, offset))
            weights.append(parameter.detach().reshape(-1)[start:stop])
        buffers.append(FlatBuffer(flat, tuple(fragments), tuple(weights), group))
    return buffers


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
        buffers.append(FlatBuffer(flat, tuple(fragments), tuple(weights), group))
    return buffers


# Section and key, the values that are refused, and why with the way out.
_REFUSED: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (
        ("zero_optimization", "elastic_checkpoint"),
        lambda value: value,
        "it cuts the end off every state tensor of a padded rank; remove it, checkpoints of the same world size work",
    ),
    (
        ("zero_optimization", "compute_grad_norm"),
        lambda value: value is False,
        "a gradient that is not finite would reach one rank alone and the others would wait for it; remove it",
    ),
    (
        ("zero_optimization", "offload_optimizer", "device"),
        lambda value: value == "nvme",
        'states on NVMe are swapped as full-size Adam moments; use "cpu" or no offload',
    ),
    (
        ("zero_optimization", "offload_optimizer", "ratio"),
        lambda value: value is not None and value < 1,
        "a partial offload is made for DeepSpeedCPUAdam alone; remove it",
    ),
    (
        ("zero_optimization", "zenflow"),
        lambda value: value is not None,
        "ZenFlow steps on chosen columns with its own optimizer; remove it",
    ),
    (
        ("checkpoint", "load_universal"),
        lambda value: value,
        "universal checkpoints assume moments as large as the weights; remove it",
    ),
)


def refuse(config: Mapping[str, Any] | Any | None) -> None:
    """Raise `ValueError` for a setting under which the update could not be right.

    `config` is the JSON as a mapping, or DeepSpeed's own configuration object.
    """
    settings = getattr(config, "_param_dict", config)
    if not isinstance(settings, Mapping):
        return
    for path, wrong, why in _REFUSED:
        value: Any = settings
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and wrong(value):
            raise ValueError(f"{'.'.join(path)}={value!r} cannot be used with GWTAdamW: {why}")
    autocast = settings.get("torch_autocast") or {}
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half"):
        raise ValueError(
            "torch_autocast with float16 cannot be used with GWTAdamW: each rank skips overflowing steps by itself, so "
            "ranks would wait for each other; use bfloat16"
        )
