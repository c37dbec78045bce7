"""What of a DeepSpeed JSON changes bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gwt_dist.memory.setup import Setup

_NAMES = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


def setup_of(settings: Mapping[str, Any], world_size: int) -> Setup:
    """The setup of a DeepSpeed JSON on so many ranks.

    Raises `ValueError` for a stage, a dtype or a section that DeepSpeed does not have.
    """
    zero = _section(settings, "zero_optimization")
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    weights = next((name for name in ("bf16", "fp16") if _section(settings, name).get("enabled")), "fp32")
    accumulated = _section(settings, "data_types").get("grad_accum_dtype")
    if accumulated is not None and accumulated not in _NAMES:
        raise ValueError(f"data_types.grad_accum_dtype={accumulated!r} must be one of {', '.join(_NAMES)}")
    moved = [
        what
        for what, key in (("optimizer", "offload_optimizer"), ("weights", "offload_param"))
        if _section(zero, key).get("device", "none") != "none"
    ]
    return Setup(
        engine=f"zero{stage}",
        world_size=world_size,
        weights=weights,
        gradients=None if accumulated is None else _NAMES[accumulated],
        offload="both" if len(moved) == 2 else moved[0] if moved and stage else "none",
        sub_group_size=int(zero.get("sub_group_size", 1e9)),
        round_robin=bool(zero.get("round_robin_gradients")),
        parameter_alignment=bool(zero.get("parameter_alignment")),
        persistence_threshold=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        # Under zero.Init DeepSpeed divides it by the number of ranks first, so this is the most.
        persistence_total=(
            int(zero["stage3_model_persistence_threshold"]) if "stage3_model_persistence_threshold" in zero else None
        ),
    )


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} of the DeepSpeed JSON is {found!r} and must be an object")
    return found
