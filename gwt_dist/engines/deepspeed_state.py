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


_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def counters(engine: Any) -> dict[str, Any]:
    """Steps and samples of an engine, and the state of its loss scale where that changes by itself.

    Not the micro-batches: how many a step has is a matter of ranks and settings, see `set_counters`.
    """
    scaler = _dynamic_scaler(engine)
    return {
        "counters": {key: getattr(engine, key) for key in _COUNTERS},
        "loss_scale": {} if scaler is None else {key: getattr(scaler, key) for key in _SCALE},
    }


def set_counters(engine: Any, values: Mapping[str, Any] | None, step: int) -> None:
    """Let an engine count as one that has done the same steps with this engine's accumulation.

    `values` are the `counters` of another engine; None: no engine counted, and `step` steps were done.
    """
    saved = (values or {}).get("counters", {})
    steps = saved.get("global_steps", step)
    engine.global_steps = steps
    engine.global_samples = saved.get("global_samples", steps * engine.train_batch_size())
    engine.skipped_steps = saved.get("skipped_steps", 0)
    # DeepSpeed takes a step when it has counted a multiple of its accumulation, so another's count is of no use.
    engine.micro_steps = steps * engine.gradient_accumulation_steps()
    scale, scaler = (values or {}).get("loss_scale", {}), _dynamic_scaler(engine)
    if scaler is not None and scale.keys() == set(_SCALE):
        for key, value in scale.items():
            setattr(scaler, key, value)


def _dynamic_scaler(engine: Any) -> Any:
    """What adapts the loss scale of fp16; None where it is a setting (fp16 with a fixed one) or 1 (bf16, fp32)."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def accumulated(engine: Any) -> str:
    """What an engine has of a step that it has not taken, in words; empty between two steps."""
    micro, each = engine.micro_steps, engine.gradient_accumulation_steps()
    # Else the caller says when a step ends, and the engine counts calls of `step`.
    counts = engine.managed_gradient_accumulation() and engine._is_gradient_accumulation_boundary is None
    if counts and micro % each:
        return f"{micro % each} of the {each} micro-batches of a step"
    zero, waiting = engine.optimizer, False
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 counts a backward pass when the next forward begins
        waiting = zero.micro_step_id > 0 or zero._epilogue_ran_this_backward
    elif hasattr(zero, "micro_step_id"):  # stage 1 does not count it where gradients are not contiguous
        waiting = zero.micro_step_id >= 0 or any(held is not None for held in zero.averaged_gradients.values())
    if waiting or any(parameter.grad is not None for parameter in engine.module.parameters()):
        return "gradients of a backward pass"
    return ""
