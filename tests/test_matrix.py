"""Every engine on 1 to 4 ranks, every level, both recipes, every shape and format: the update is that of one process.

Gradients are chosen and go through the engine's own reduction (put in place where a forward pass needs another model).
One test builds an engine once, over a model with a block of all shapes for each level and recipe; `matrix_cases` has
both. `make test` runs one engine of each kind on one number of ranks, `make matrix` most of the others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from matrix_cases import BLOCKS, DTYPES, STEPS, matrix_case, rerun_case
from zero_engine_cases import ENGINES as DEEPSPEED

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")


@dataclass(frozen=True)
class Engine:
    """How `matrix_cases` builds an engine, and what it does beside the update."""

    family: str
    arguments: tuple[Any, ...]
    row: tuple[str, str]  # of the support matrix
    worlds: tuple[int, ...] = (1, 2, 3, 4)
    suite: int = 3  # the number of ranks on which `make test` runs it; 0: on none
    unused: str = "zeros"  # the gradient that it gives to what the forward pass does not use, or "none"
    outcome: str = "exact"

    def tolerance(self, kind: str) -> float:
        """Relative to the update: DeepSpeed keeps its masters in fp32. What is rounded by noise has the same bits."""
        return 0.0 if kind in DTYPES else 1e-6 if self.family == "deepspeed" else 1e-12


def deepspeed(name: str) -> Engine:
    """The DeepSpeed JSON of that name, under `zero.Init` if it ends so."""
    row = "ZeRO-1, ZeRO-2, ZeRO-3, fp32 and bf16, `zero.Init`"
    if "offload" in name or name.startswith(("0", "no zero", "bf16 optimizer")) or "accumulation" in name:
        row = "stage 0 in fp32 and bf16, `BF16_Optimizer`, ZeRO-Offload of optimizer and parameters"
    elif len(name.split()) > 1 and not name.endswith(("bf16", "init")):
        row = "`round_robin_gradients`, `parameter_alignment`, `reduce_scatter` off, tiny `sub_group_size`"
    suite = 3 if name in IN_THE_SUITE else 0
    return Engine(
        "deepspeed", (DEEPSPEED[name.removesuffix(" init")], name.endswith("init")), ("DeepSpeed", row), suite=suite
    )


IN_THE_SUITE = {
    "0 bf16",
    "bf16 optimizer",
    "1",
    "2 bf16",
    "2 round robin, aligned",
    "3",
    "3 bf16 init",
    "3 offload both",
}
BUCKETS = ("sdp-model-zero-grad", "sdp-set-to-zero")
WHOLE = ("DDP", "`gradient_as_bucket_view` True and False, no collective")
ZRO = ("DDP + ZeroRedundancyOptimizer", "`parameters_as_bucket_view` True and False, no collective")
FAIRSCALE = ("fairscale", "OSS + DDP; ShardedDataParallel; no collective")
ROWS = ("FSDP2", "`fully_shard`, uneven rows, ranks without rows")
POLICIES = ("FSDP2", "bf16 mixed precision policy, CPU offload policy")
FSDP = ("fairscale", "FullyShardedDataParallel, `flatten_parameters` True and False, with a shim")

ENGINES: dict[str, Engine] = {f"deepspeed {n}": deepspeed(n) for n in [*DEEPSPEED, "3 init", "3 bf16 init"]}
ENGINES |= {
    "fsdp2 rows": Engine("fsdp2", ("rows",), ROWS, unused="none"),
    "fsdp2 hsdp": Engine("fsdp2", ("hsdp",), ("FSDP2", "HSDP"), (2, 4), 4, "none"),
    "fsdp2 columns": Engine(
        "fsdp2", ("columns",), ("FSDP2", "`Shard(1)`, aligned or cut within a unit"), unused="none"
    ),
    "fsdp2 tensor parallel": Engine(
        "fsdp2",
        ("tensor parallel",),
        ("FSDP2", "tensor parallelism x FSDP, `_StridedShard`, several meshes in one optimizer"),
        (2, 4),
        4,
        "none",
    ),
    "fsdp2 bf16": Engine("fsdp2", ("bf16",), POLICIES, suite=0, unused="none"),
    "fsdp2 offload": Engine("fsdp2", ("offload",), POLICIES, suite=0, unused="none"),
}
for strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"):
    for flat in (False, True):
        ENGINES[f"fsdp1 {strategy}{', flat' if flat else ''}"] = Engine(
            "fsdp1",
            (strategy, not flat),
            ("FSDP1", "FULL_SHARD, SHARD_GRAD_OP, NO_SHARD, HYBRID_SHARD, `use_orig_params` True and False"),
            worlds=(4,) if strategy == "HYBRID_SHARD" else (1, 2, 3, 4),
            suite={"FULL_SHARD": 3, "HYBRID_SHARD": 4}.get(strategy, 0),
        )
ENGINES |= {
    f"fairscale {kind}": Engine("fairscale", (kind,), FSDP, unused=unused, outcome="not on CPU")
    for kind, unused in (("flat", "zeros"), ("modules", "zeros"), ("tensors", "none"))
}
ENGINES |= {
    kind: Engine("whole", (kind,), row, suite=suite, unused="zeros" if kind in BUCKETS else "none")
    for kind, row, suite in (
        ("ddp", WHOLE, 3),
        ("ddp-views", WHOLE, 0),
        ("zro", ZRO, 3),
        ("zro-views", ZRO, 0),
        ("oss", FAIRSCALE, 3),
        ("sdp-no-buckets", FAIRSCALE, 0),
        ("sdp-model-zero-grad", FAIRSCALE, 3),
        ("sdp-set-to-zero", FAIRSCALE, 0),
    )
}


RERUN = (
    "deepspeed 2 round robin, aligned",
    "deepspeed 3",
    "fsdp2 columns",
    "fsdp1 FULL_SHARD, flat",
    "fairscale tensors",
)


def cases() -> list[Any]:
    """Each engine on each number of ranks; `make test` runs those without the mark.

    Beside the number of ranks that has all kinds there is one other, in turn; `make support` has time for all.
    """
    found = []
    for place, (name, engine) in enumerate(ENGINES.items()):
        alone = alone_of(name)
        others = [world_size for world_size in engine.worlds if world_size != alone]
        taken = {alone, *others[place % 3 : place % 3 + 1]}
        for world_size in engine.worlds:
            if world_size not in taken and "GWT_TEST_ALL" not in os.environ:
                continue
            marks = [pytest.mark.support(*engine.row, outcome=engine.outcome)]
            if world_size != engine.suite:
                marks.append(pytest.mark.matrix)
            found.append(pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}"))
    return found


def alone_of(name: str) -> int:
    """The number of ranks on which an engine has all kinds: that of `make test` if any."""
    engine, place = ENGINES[name], list(ENGINES).index(name)
    return engine.suite or engine.worlds[place % len(engine.worlds)]


def kinds(name: str, world_size: int) -> tuple[str, ...]:
    """The models of a case: all on one number of ranks under each engine, that of `make test` if any.

    On others of every fourth engine that with state in every format too: of bf16 weights that are rounded by chance, or
    of masters, which are not.
    """
    engine, place = ENGINES[name], list(ENGINES).index(name)
    alone = alone_of(name)
    formats = "formats" if engine.family == "deepspeed" else "rounded"
    if world_size == alone:
        return "shapes", "vectors", formats
    return ("shapes", formats) if place % 4 == 0 else ("shapes",)


@pytest.mark.parametrize(("name", "world_size"), cases())
def test_the_update_is_that_of_one_process(ranks, name, world_size) -> None:
    """T1 to T4, T10, T12, T13, T16, T18, T20, T23, T27 by the engine and the shape; see `test_deepspeed_engines.py`.

    Where state has another format than fp32, or weights are rounded by chance, bit for bit.
    """
    engine = ENGINES[name]
    unused = engine.unused if world_size > 1 or engine.family != "whole" else "none"  # one rank has no buckets
    for kind in kinds(name, world_size):
        results = ranks(world_size, matrix_case, engine.family, engine.arguments, kind, unused)
        blocks = {f"{recipe}{level}" for level, recipe in BLOCKS[kind]}
        for result in results:
            wrong = {tensor: error for tensor, error in result["errors"].items() if not error <= engine.tolerance(kind)}
            assert not wrong
            assert {tensor.split(".")[0] for tensor in result["errors"]} == blocks
            assert result["stale"] == 0.0
            # The same calls on all ranks and in every step: at most one for cut units and one for each of two phases.
            calls = result["collectives"]
            assert calls == results[0]["collectives"]
            assert calls == calls[: len(calls) // STEPS] * STEPS
            assert max(result["groups"], default=0) <= 3
            if engine.family == "whole":
                assert not any(calls)


@pytest.mark.parametrize("name", RERUN)
def test_the_same_run_twice_has_the_same_bits(ranks, name) -> None:
    """T28: on three ranks, units of all three levels are cut by their boundaries."""
    engine = ENGINES[name]
    results = ranks(3, rerun_case, engine.family, engine.arguments)
    assert all(result["same"] for result in results)
    assert any(result["cut"] for result in results)
