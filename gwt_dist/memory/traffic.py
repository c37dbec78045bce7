"""Bytes that a rank sends in one optimizer step, by the usual count for rings.

Of n bytes over S ranks a reduce-scatter or an all-gather sends ``n (S - 1) / S``, an all-reduce twice that. Which of
them an engine makes is as in the ZeRO paper (arXiv 1910.02054, section 7): 2 n with stages 0 to 2, 3 n with weights
sharded. Padding, and what a compressed or hierarchical collective saves, are left out.

Matrices go from rank to rank, in no ring: there it is what the rank that sends most really sends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gwt_dist.memory.plan import MemoryPlan
from gwt_dist.memory.setup import NORM


@dataclass(frozen=True, slots=True)
class Traffic:
    """One kind of collective in a step."""

    name: str
    what: str
    bytes: int
    ours: bool = False  # the optimizer's, not the engine's


def traffic(plan: MemoryPlan, accumulation: int = 1) -> list[Traffic]:
    """What the engine sends for a step of `accumulation` micro-batches, and what the optimizer does."""
    return [found for found in (*_engine(plan, accumulation), *_ours(plan)) if found.bytes]


def _engine(plan: MemoryPlan, accumulation: int) -> Iterator[Traffic]:
    setup, world, shards = plan.setup, plan.setup.world_size, plan.setup.shards
    elements = sum(plan.elements)
    gradients, weights = elements * setup.bytes_of("gradients"), elements * setup.bytes_of("weights")
    every = f", each of {accumulation} micro-batches" if accumulation > 1 else ""
    if setup.engine in ("ddp", "zro", "oss", "zero0"):
        yield Traffic("gradients", "all-reduce", 2 * _ring(gradients, world))
        if setup.engine in ("zro", "oss"):
            yield Traffic("weights", "broadcast by their owners", _ring(weights, world))
    elif setup.engine in ("zero1", "zero2"):
        times = accumulation if setup.engine == "zero2" else 1
        yield Traffic("gradients", "reduce-scatter" + every * (times > 1), times * _ring(gradients, world))
        yield Traffic("weights", "all-gather", _ring(weights, world))
    elif setup.engine != "single":
        total = plan.model.numel * setup.bytes_of("weights")
        yield Traffic("gradients", "reduce-scatter" + every, accumulation * _ring(gradients, shards))
        what = "all-gather, forward and backward" + every
        yield Traffic("weights", what, 2 * accumulation * _ring(total, shards))
        if setup.replicas > 1:
            part = accumulation * 2 * _ring(gradients // shards, setup.replicas)
            yield Traffic("gradients", "all-reduce of a shard over replicas" + every, part)


def _ours(plan: MemoryPlan) -> Iterator[Traffic]:
    setup = plan.setup
    exchange = plan.exchange * setup.state_bytes
    yield Traffic("cut units", "all-reduce", 2 * _ring(exchange, setup.shards), ours=True)
    yield Traffic("sums", "all-reduce", 2 * _ring(plan.norms * NORM, setup.shards), ours=True)
    yield Traffic("matrices", "to their owners and back, the rank that sends most", max(plan.travelling), ours=True)


def _ring(number: int, ranks: int) -> int:
    return number * (ranks - 1) // ranks
