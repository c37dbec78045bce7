"""A plan as plain data, which the table, the JSON and the page all show."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from math import prod
from statistics import median_low
from typing import Any

from gwt_dist.declare import Extent
from gwt_dist.formats import FP32
from gwt_dist.memory.compare import Other, others, quarter
from gwt_dist.memory.plan import MemoryPlan
from gwt_dist.memory.state import GroupSpec
from gwt_dist.memory.traffic import traffic
from gwt_dist.units import level_of

NOT_COUNTED = (
    "the largest layer's gathered weights, buffers of the engine for communication, the CUDA context and what the "
    "allocator leaves unused"
)


OURS = "GWTAdamW"


def spread(by_shard: Sequence[int], worst: int) -> dict[str, int]:
    """Of the worst rank by the total, and the least, middle and most of any rank."""
    return {
        "worst_rank": by_shard[worst],
        "min": min(by_shard),
        "median": median_low(by_shard),
        "max": max(by_shard),
    }


def report(
    plan: MemoryPlan,
    targeted: Collection[str],
    low_rank: int | None,
    accumulation: int,
    otherwise: Sequence[tuple[str, str, Sequence[GroupSpec]]] = (),
) -> dict[str, Any]:
    """Everything that is known of a plan, bytes unless a name says otherwise.

    Args:
        plan: The plan.
        targeted: Names of the matrices that a level is for, which GaLore and APOLLO would project.
        low_rank: Their rank; None for a quarter of the width.
        accumulation: Micro-batches in a step.
        otherwise: Other settings: a name, what is said to have them, and the groups that they would make.
    """
    setup, total = plan.setup, plan.total
    worst = max(range(len(total)), key=total.__getitem__)
    gradients = setup.gradients or setup.weights
    formats = {f: f.format if f.format != FP32 else f"fp{8 * setup.state_bytes}" for f in plan.fields}
    on_host = setup.offload in ("optimizer", "both")
    rows = [
        ("weights", setup.weights, setup.offload in ("weights", "both"), plan.weights),
        ("gradients", gradients, on_host and setup.engine == "fsdp2", plan.gradients),
        ("masters", "fp32", on_host, plan.masters),
        ("gradients of the masters", "fp32", on_host, plan.step_gradients),
        *((f.name, formats[f], on_host, values) for f, values in plan.fields.items() if f.extent is not Extent.TENSOR),
        ("steps, numbers a tensor", "fp32" if setup.state_bytes == 4 else "fp32, fp64", on_host, plan.scalars),
    ]
    elements, kept = sum(plan.elements), {(field.name, formats[field]) for field in plan.fields}
    rank = quarter(plan.groups, targeted) if low_rank is None else low_rank
    ours = Other(OURS, "exact", sum(plan.state) - sum(plan.cut))
    return {
        "model": {
            "name": plan.model.name,
            "weights": plan.model.numel,
            "tensors": len(plan.model.tensors),
            "frozen": plan.model.numel - elements,
        },
        "setup": {
            "engine": setup.engine,
            "world_size": setup.world_size,
            "mesh": [setup.ranks_a_shard, setup.shards],
            "weights": setup.weights,
            "gradients": gradients,
            "masters": "fp32" if setup.masters else None,
            "states": ", ".join(sorted({formats[f] for f in plan.fields})),
            "offload": setup.offload,
            "device": setup.device,
            "accumulation": accumulation,
        },
        "levels": _levels(plan),
        "state_a_weight": _a_weight(plan, targeted),
        "worst_rank": worst,
        "rows": [
            {"name": name, "dtype": dtype, "host": host, **spread(values, worst)}
            for name, dtype, host, values in rows
            if any(values) or (elements and (name, dtype) in kept)
        ],
        "state": spread(plan.state, worst),
        "cut": spread(plan.cut, worst),
        "device": spread(plan.device, worst),
        "host": spread(plan.host, worst),
        "beside": [
            {"name": ours.name, "formula": ours.formula, "whole": ours.whole, "rank": plan.state[worst]},
            *(
                {"name": o.name, "formula": o.formula, "whole": o.whole, "rank": o.of(plan.elements[worst], elements)}
                for o in (*_otherwise(plan, otherwise), *others(plan.groups, targeted, rank))
            ),
        ],
        "checkpoint": {
            "whole": plan.whole_checkpoint,
            "rank": spread(
                [n // setup.ranks_a_shard + plan.checkpoint_common // setup.world_size for n in plan.checkpoint], worst
            ),
        },
        "communication": [asdict(found) for found in traffic(plan, accumulation)],
        "exchange_elements": plan.exchange,
        "norms": plan.norms,
        "not_counted": NOT_COUNTED,
    }


def _otherwise(plan: MemoryPlan, settings: Sequence[tuple[str, str, Sequence[GroupSpec]]]) -> list[Other]:
    """State with other settings, where it is less than planned by a tenth or more, each number once."""
    full = plan.setup.state_bytes
    most, found = 0.9 * _whole(plan.groups, full), dict[int, Other]()
    for name, said, groups in settings:
        whole = _whole(groups, full)
        if whole < most:
            found.setdefault(whole, Other(f"{OURS}, {name}", f"with {said}", whole))
    return list(found.values())


def _whole(groups: Sequence[GroupSpec], full: int, names: Collection[str] | None = None) -> int:
    """Bytes of state of all tensors, or of those in `names`, each counted once."""
    return sum(
        group.whole(shape, full) for group in groups for name, shape in group.tensors if names is None or name in names
    )


def _a_weight(plan: MemoryPlan, targeted: Collection[str]) -> dict[str, float | None]:
    """Bytes of state for each weight that is trained, each counted once, whatever the engine: of all, of matrices."""
    found: dict[str, float | None] = {}
    for what, names in (("model", None), ("matrices", targeted)):
        its = [shape for g in plan.groups for name, shape in g.tensors if names is None or name in names]
        elements = sum(map(prod, its))
        found[what] = _whole(plan.groups, plan.setup.state_bytes, names) / elements if elements else None
    return found


def _levels(plan: MemoryPlan) -> list[dict[str, int]]:
    found: dict[int, list[int]] = {}
    for group in plan.groups:
        for _, shape in group.tensors:
            found.setdefault(level_of(shape, group.level), []).append(prod(shape))
    return [
        {"level": level, "tensors": len(numels), "elements": sum(numels)}
        for level, numels in sorted(found.items(), reverse=True)
    ]
