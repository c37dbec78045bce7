"""What a checkpoint needs of a DeepSpeed engine beside its buffers: weights of stage 3, counters, schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from gwt_dist.layout import Fragment


def group_numbers(zero: Any) -> list[int]:
    """The parameter group of each buffer that `read` returns: stage 3 takes them out of the groups between steps."""
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return [zero.sub_group_to_group_id[i] for i in range(len(zero.fp32_partitioned_groups_flat))]
    if hasattr(zero, "fp32_groups"):
        return [i for i, group in enumerate(zero.fp32_groups) for _ in group]
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_groups_flat")
    return list(range(len(next(getattr(zero, name) for name in names if hasattr(zero, name)))))


def has_master(parameter: Any) -> bool:
    """Whether a ZeRO optimizer steps a copy of a parameter of the module, of which the module alone knows nothing."""
    return getattr(parameter, "_hp_mapping", None) is not None or hasattr(parameter, "_z3_optimizer")


def partition(parameter: Any, name: str) -> tuple[Fragment, Tensor, Tensor | None]:
    """Of a parameter under stage 3: what this rank holds and where, and the whole tensor where it is kept gathered."""
    slot = parameter.ds_tensor.ds_numel
    start = min(parameter.ds_numel, dist.get_rank(parameter.ds_process_group) * slot)
    stop = min(parameter.ds_numel, start + slot)
    fragment = Fragment(name, tuple(parameter.ds_shape), start, stop)
    gathered = tuple(parameter.shape) == tuple(parameter.ds_shape) and parameter.ds_status.name == "AVAILABLE"
    return fragment, parameter.ds_tensor.detach().reshape(-1)[: stop - start], parameter if gathered else None


_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, Any]:
    """Steps and samples of an engine, the state of its loss scale, and that of its learning-rate schedule."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    schedule = engine.lr_scheduler
    return {
        "counters": {key: getattr(engine, key) for key in _COUNTERS},
        "loss_scale": {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)},
        "lr_scheduler": schedule.state_dict() if hasattr(schedule, "state_dict") else None,
    }


def set_counters(engine: Any, values: Mapping[str, Any]) -> None:
    """Put `counters` of another engine into this one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    for target, key, known in ((engine, "counters", _COUNTERS), (scaler, "loss_scale", _SCALE)):
        for name, value in values.get(key, {}).items():
            if name in known and hasattr(target, name):
                setattr(target, name, value)
    if values.get("lr_scheduler") is not None and hasattr(engine.lr_scheduler, "load_state_dict"):
        engine.lr_scheduler.load_state_dict(values["lr_scheduler"])
