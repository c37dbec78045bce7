"""What of a DeepSpeed JSON changes bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gwt_dist import ds_json
from gwt_dist.memory.setup import Setup

_NAMES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


def setup_of(settings: Mapping[str, Any], world_size: int) -> Setup:
    """The setup of a DeepSpeed JSON on so many ranks.

    Raises `ValueError` for a key that bytes depend on and that is "auto" or of a wrong kind, and for a dtype that
    DeepSpeed does not have.
    """

    def zero(key: str, default: Any) -> Any:
        return ds_json.value(settings, f"zero_optimization.{key}", default)

    stage = zero("stage", 0)
    accumulated = ds_json.value(settings, "data_types.grad_accum_dtype")
    if accumulated is not None and accumulated not in _NAMES:
        raise ValueError(f"data_types.grad_accum_dtype={accumulated!r} must be one of {', '.join(_NAMES)}")
    moved = [
        what
        for what, key, older in (
            ("optimizer", "offload_optimizer", "cpu_offload"),
            ("weights", "offload_param", "cpu_offload_param"),
        )
        if zero(f"{key}.device", "none") != "none" or zero(older, False)
    ]
    total = zero("stage3_model_persistence_threshold", None) if stage == 3 else None
    return Setup(
        engine=f"zero{int(stage)}",
        world_size=world_size,
        weights=ds_json.precision(settings),
        gradients=None if accumulated is None else _NAMES[accumulated],
        offload="both" if len(moved) == 2 else moved[0] if moved and stage else "none",
        round_robin=bool(zero("round_robin_gradients", False)),
        parameter_alignment=bool(zero("parameter_alignment", False)),
        # Only stage 3 reads these, so only there is "auto" refused.
        sub_group_size=int(zero("sub_group_size", 1e9)) if stage == 3 else 1_000_000_000,
        persistence_threshold=int(zero("stage3_param_persistence_threshold", 1e5)) if stage == 3 else 100_000,
        # Under zero.Init DeepSpeed divides it by the number of ranks first, so this is the most.
        persistence_total=None if total is None else int(total),
    )
