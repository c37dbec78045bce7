"""`gwt-dist plan`: what it says is what a run allocates, under every engine of the matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gwt_dist import memory
from gwt_dist.memory.deepspeed import setup_of
from gwt_dist.memory.fill import plan
from gwt_dist.memory.model import ModelSpec, of_module
from gwt_dist.memory.plan import Plan
from gwt_dist.memory.setup import Setup
from matrix_cases import Model, groups_of
from plan_cases import allocated_case
from test_matrix import ENGINES

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

SUITE = {"deepspeed 1", "deepspeed 2 bf16", "deepspeed 3 bf16 init", "fsdp2 rows", "fsdp2 hsdp", "fsdp1 FULL_SHARD"} | {
    "fsdp1 HYBRID_SHARD, flat",
    "fairscale modules",
    "ddp",
    "zro",
    "oss",
}
# A tensor whose columns are sharded is cut by the model's own parallelism, which a plan is not told.
NOT_PLANNED = {"fsdp2 columns", "fsdp2 tensor parallel"}


def setup_for(name: str, world_size: int) -> Setup:
    """What `gwt-dist plan` would be told about an engine of the matrix."""
    family, arguments = ENGINES[name].family, ENGINES[name].arguments
    if family == "deepspeed":
        return setup_of(arguments[0], world_size)
    common: dict[str, Any] = {"world_size": world_size, "weights": "fp64"}
    if family == "fsdp2":
        replicas = 2 if arguments[0] == "hsdp" else 1
        offload = "both" if arguments[0] == "offload" else "none"
        return Setup("fsdp2", **common, replicas=replicas, offload=offload)
    if family == "fsdp1":
        strategy, use_orig_params = arguments
        if strategy == "NO_SHARD":
            return Setup("fsdp1", **common, replicas=world_size, use_orig_params=use_orig_params)
        replicas = 2 if strategy == "HYBRID_SHARD" else 1
        return Setup("fsdp1", **common, replicas=replicas, use_orig_params=use_orig_params)
    if family == "fairscale":
        return Setup("fairscale", **common, flatten=arguments[0] != "tensors")
    kind = arguments[0].split("-")[0]
    return Setup({"sdp": "oss"}.get(kind, kind), **common)


def model_for(name: str, kind: str) -> tuple[ModelSpec, list[memory.GroupSpec]]:
    """The model of the matrix in the units that `matrix_cases` wraps."""
    family, arguments = ENGINES[name].family, ENGINES[name].arguments
    module = Model(kind)
    if family == "fairscale" and kind == "shapes":
        for block in module.children():
            del block.frozen
    inner = {"fsdp1": {"mlp_down", "frozen"}}.get(family, set())
    tensors = []
    for tensor in of_module(module, name).tensors:
        block, layer, _ = tensor.name.split(".")
        alone = layer in inner or (
            (family, arguments[0]) == ("fairscale", "modules") and layer not in ("attn_q", "attn_tied", "unused")
        )
        tensors.append(replace(tensor, unit=f"{block}.{layer}" if alone else block))
    return ModelSpec(name, tuple(tensors)), memory.specs(module.named_parameters(), groups_of(module))


def planned(name: str, world_size: int, kind: str) -> Plan:
    return plan(*model_for(name, kind), setup_for(name, world_size))


def cases() -> list[Any]:
    found = []
    for name, engine in ENGINES.items():
        for world_size in engine.worlds if name not in NOT_PLANNED else ():
            marks = [] if name in SUITE and world_size == engine.suite else [pytest.mark.matrix]
            found.append(pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}"))
    return found


@pytest.mark.parametrize(("name", "world_size"), cases())
def test_planned_is_allocated(ranks, name, world_size) -> None:
    engine = ENGINES[name]
    for kind in ("shapes", "vectors"):
        results = ranks(world_size, allocated_case, engine.family, engine.arguments, kind)
        expected = planned(name, world_size, kind)
        for rank, result in enumerate(results):
            shard = expected.of_rank(rank)
            told = {
                "moments": expected.wavelet[shard] + expected.rest[shard],
                "scalars": expected.scalars[shard],
                "weights": expected.weights[shard],
                "masters": expected.masters[shard],
            }
            if expected.setup.shards > 1:  # FSDP2 sums norms over one rank too
                told["collectives"] = expected.exchange + expected.norms
            assert {key: result[key] for key in told} == told, f"rank {rank}, {kind}"
            if expected.setup.bf16_optimizer:
                assert result["given"] * world_size == expected.gradients[shard]
            elif expected.setup.masters:
                assert result["given"] == expected.step_gradients[shard]
            elif expected.setup.engine in ("ddp", "fsdp2", "zero0"):
                assert result["given"] == expected.gradients[shard]
