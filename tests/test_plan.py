"""Plans of a run: what they say is what it allocates, under every engine of the matrix."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gwt_dist import memory, recipes, units
from gwt_dist.cli.models import read_model
from gwt_dist.comm import Shard, alone
from gwt_dist.declare import Extent, Field, Pass, Program, Sum
from gwt_dist.exchange import join
from gwt_dist.memory import compare, fill, splits
from gwt_dist.memory.configs import of_config
from gwt_dist.memory.deepspeed import setup_of
from gwt_dist.memory.model import ModelSpec, TensorSpec, of_module
from gwt_dist.memory.model import groups_of as groups_by_name
from gwt_dist.memory.plan import MemoryPlan
from gwt_dist.memory.setup import DEVICES, Setup
from gwt_dist.memory.traffic import traffic
from gwt_dist.optimizer import GWTAdamW
from gwt_dist.piece import moments_shape
from gwt_dist.plan import Form
from gwt_dist.plan import Plan as ParameterPlan
from gwt_dist.products import stacks as products
from gwt_dist.schedule import Member
from gwt_dist.sums import lay_out
from gwt_dist.targets import Matrix
from matrix_cases import Model, groups_of
from plan_cases import allocated_case, checkpoint_case
from test_matrix import ENGINES, kinds
from test_plan_models import SHAPES

SUITE = {"deepspeed 1", "deepspeed 2 bf16", "deepspeed 3 bf16 init", "fsdp2 rows", "fsdp2 hsdp", "fsdp1 FULL_SHARD"} | {
    "fsdp1 HYBRID_SHARD, flat",
    "fairscale modules",
    "ddp",
    "zro",
    "oss",
}
# By a model of `kinds`, the one that is planned.
PLANNED = {"shapes": "travelling", "vectors": "vectors"}
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
    if family == "fairscale" and kind not in ("vectors", "formats"):
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


def planned(name: str, world_size: int, kind: str) -> MemoryPlan:
    setup = replace(setup_for(name, world_size), device="cpu")
    if ENGINES[name].family != "deepspeed" and kind == "formats":
        setup = replace(setup, weights="fp32")
    return fill.plan(*model_for(name, kind), setup)


def state_of(plan: MemoryPlan, shard: int) -> dict[str, int]:
    """Bytes of state by name, and of what there is one of a tensor."""
    fields: dict[str, int] = {}
    for field, values in plan.fields.items():  # of each of its formats
        if field.extent is not Extent.TENSOR:
            fields[field.name] = fields.get(field.name, 0) + values[shard]
    return {**fields, "scalars": plan.scalars[shard]}


def cases() -> list[Any]:
    """Each engine on every second number of ranks, that of all kinds among them; `make support` takes all."""
    found = []
    for place, (name, engine) in enumerate(ENGINES.items()):
        for world_size in engine.worlds if name not in NOT_PLANNED else ():
            left = not (place + world_size) % 2 and len(engine.worlds) > 1 and world_size != engine.suite
            if left and "GWT_TEST_ALL" not in os.environ:
                continue
            marks = [] if name in SUITE and world_size == engine.suite else [pytest.mark.matrix]
            found.append(pytest.param(name, world_size, marks=marks, id=f"{name}-{world_size}"))
    return found


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize(("name", "world_size"), cases())
def test_planned_is_allocated(ranks, name, world_size) -> None:
    engine = ENGINES[name]
    planned_kinds = [PLANNED[kind] for kind in kinds(name, world_size) if kind in PLANNED]
    for kind in [*planned_kinds, *(["formats"] if name in ("deepspeed 2 bf16", "fsdp2 rows", "zro") else ())]:
        results = ranks(world_size, allocated_case, engine.family, engine.arguments, kind)
        expected = planned(name, world_size, kind)
        for rank, result in enumerate(results):
            shard = expected.of_rank(rank)
            told = {
                **state_of(expected, shard),
                "weights": expected.weights[shard],
                "masters": expected.masters[shard],
                "travelling": expected.travelling[shard],
            }
            if expected.setup.shards > 1:  # FSDP2 sums norms over one rank too
                told["collectives"] = expected.exchange + expected.norms
            # A rank that steps no such tensor has no state of that name.
            assert {key: result.get(key, 0) for key in told} == told, f"rank {rank}, {kind}"
            assert {name for name in result if name.startswith("exp_avg")} <= told.keys()
            if expected.setup.bf16_optimizer:
                assert result["given"] * world_size == expected.gradients[shard]
            elif expected.setup.masters:
                assert result["given"] == expected.step_gradients[shard]
            elif expected.setup.engine in ("ddp", "fsdp2", "zero0"):
                assert result["given"] == expected.gradients[shard]


@pytest.mark.usefixtures("torch_extensions_dir")
@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        ("deepspeed 2 bf16", 3),
        ("fsdp2 rows", 3),
        *(
            pytest.param(name, world, marks=pytest.mark.matrix)
            for name, world in (
                ("deepspeed 0 bf16", 2),
                ("deepspeed 3 bf16", 3),
                ("fsdp2 hsdp", 4),
                ("fsdp1 FULL_SHARD", 3),
                ("fsdp1 HYBRID_SHARD, flat", 4),
                ("ddp", 3),
                ("zro", 3),
                ("oss", 2),
                ("fairscale modules", 3),
            )
        ),
    ],
)
def test_a_checkpoint_has_the_planned_bytes(ranks, tmp_path, name, world_size) -> None:
    engine = ENGINES[name]
    written = ranks(world_size, checkpoint_case, engine.family, engine.arguments, str(tmp_path))[0]
    expected = planned(name, world_size, "shapes")
    assert sum(written) == expected.whole_checkpoint
    # What ranks hold alike is spread by whole pieces, so not by a plain division.
    common = expected.checkpoint_common or expected.setup.ranks_a_shard > 1
    if not common:
        assert written == expected.checkpoint


MESHES = [[64], [8, 8]]


@pytest.mark.parametrize(
    "rank_ids", [(63,), pytest.param((0, 7), marks=pytest.mark.matrix), pytest.param((8, 62), marks=pytest.mark.matrix)]
)
def test_llamas_on_64_ranks_that_are_faked(rank_ids: tuple[int, ...]) -> None:
    """FSDP2 and HSDP 8x8, by `fully_shard` itself; 5461 rows of the 1B model go into 64 parts unevenly."""
    calls = [f"import plan_cases; plan_cases.faked({rank}, ['7b', '1b'], {MESHES}, 2)" for rank in rank_ids]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, text=True, env=environment)
        for call in calls
    ]
    found = [json.loads(process.communicate(timeout=100)[0]) for process in processes]
    spread = set()
    for i, (name, mesh) in enumerate((name, mesh) for name in ("7b", "1b") for mesh in MESHES):
        model, replicas = read_model(name), mesh[0] if len(mesh) > 1 else 1
        groups = groups_by_name(model, 2, ("attn", "mlp"), recipe="paper")
        expected = fill.plan(model, groups, Setup("fsdp2", 64, replicas, "fp32"))
        for rank, results in zip(rank_ids, found, strict=True):
            shard = expected.of_rank(rank)
            assert results[i] == {
                "moments": expected.state[shard] - expected.scalars[shard],
                "scalars": expected.scalars[shard],
                "weights": expected.weights[shard],
                "norms": expected.norms,
            }
            spread.add((name, replicas, results[i]["moments"]))
        if name == "7b":  # 4 bytes, 2 moments; what is no Linear weight of attention or MLP is AdamW
            rest = 2 * 32000 * 4096 + 65 * 4096
            assert expected.state[0] - expected.scalars[0] == 8 * ((model.numel - rest) // 4 + rest) * replicas // 64
    assert len(spread) == (5 if 7 in rank_ids else 4)  # the last of 8 shards of 5461 rows has fewer


def test_another_type_is_built_by_transformers(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", **SHAPES, "max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = read_model(str(tmp_path))
    assert ("gpt_neox.layers.1.attention.dense.weight", (64, 64)) in [(t.name, t.shape) for t in found.tensors]
    assert {t.unit for t in found.tensors} == {"", "gpt_neox.layers.0", "gpt_neox.layers.1"}


def test_moments_are_those_of_the_optimizer() -> None:
    for shape in [(), (7,), (1, 1), (5, 3), (66, 97), (4, 3, 5), (2, 300), (0, 4)]:
        for level in (0, 1, 3, 9):
            for wavelet in ("haar", "db1", "bior1.1", "db2", "sym4"):
                whole = prod(moments_shape(shape, level, wavelet))
                assert units.coefficients(shape, level, wavelet) == whole


@pytest.mark.parametrize("stage", [1, 3])
def test_a_plan_of_all_ranks_is_that_of_each(stage: int) -> None:
    """`memory.plan_zero`, which a run is told, and the plan have the same bytes on every rank."""
    model = Model("shapes")
    groups = memory.specs(model.named_parameters(), groups_of(model))
    for world_size in (1, 5, 16):
        found = fill.plan(of_module(model, ""), groups, Setup(f"zero{stage}", world_size, sub_group_size=700))
        for rank in range(world_size):
            one = memory.plan_zero(groups, stage=stage, world_size=world_size, rank=rank, sub_group_size=700)
            shard = found.of_rank(rank)
            assert (one.wavelet + one.rest, one.cut, one.scalars) == (
                found.state[shard] - found.scalars[shard],
                found.cut[shard],
                found.scalars[shard],
            )


@pytest.mark.parametrize("engine", ["zero2", "fsdp1"])
def test_fields_and_sums_of_every_extent(engine: str) -> None:
    """Of a recipe that nobody has: what is planned is what the optimizer lays out, a flat parameter on each rank."""
    sums = Sum("rows", Extent.ROW, 2), Sum("columns", Extent.COLUMN), Sum("tensors", Extent.TENSOR, 3)
    fields = tuple(Field(extent.value, extent) for extent in Extent if extent is not Extent.OWNED)  # which travel
    program = Program("", fields, (Pass("", sums), Pass("", (Sum("more rows", Extent.ROW),)), Pass("", writes=True)))
    plain = Program("", (Field("unit", Extent.UNIT), Field("second", Extent.UNIT)), (Pass("", writes=True),))
    tensors = ("a", (5, 7)), ("b", (11,)), ("c", (2, 3, 4)), ("d", (1, 1))
    names, shapes = [name for name, _ in tensors], [shape for _, shape in tensors]
    group = memory.GroupSpec(2, "haar", tensors, program, plain)
    model = ModelSpec("", tuple(TensorSpec(*tensor) for tensor in tensors))
    found = fill.plan(model, [group], Setup(engine, 3, weights="fp32", use_orig_params=False))
    laid = splits.flat(shapes, 3, multiple=2) if engine == "zero2" else splits.flat(shapes, 3)
    held = [laid.fragments(names, rank) for rank in range(3)]
    together: Any = ("all ranks",)
    for rank, fragments in enumerate(held):
        shard = Shard(join(held), tuple(fragments), together, together, alone(fragments))
        plan = ParameterPlan.of(shard, Form(2, "haar", program.fields, plain.fields, ""))
        state = plan.fresh_state(torch.zeros(laid.part))
        assert {f.name: values[rank] for f, values in found.fields.items()} | {"step": found.steps[rank]} == {
            name: tensor.nbytes for name, tensor in state.items()
        }
        entries = list(Member(plan, 0, torch.float32, True, program, plain).entries(0))
        parts = [part for phase in range(3) for part in lay_out(entries, phase).parts]
        assert found.norms == sum(length for length, groups in parts if groups)
    cut = [c for tensor in join(held) if len(tensor.shape) > 1 for c in tensor.cuts if c % prod(tensor.shape[1:])]
    # Rows that are cut, coefficients of a row of each tensor, and numbers of each tensor.
    assert found.norms == 3 * len(cut) + (2 + 11 + 3 + 1) + 3 * 4 and cut


SPLITS: dict[str, Any] = {
    "single": lambda shapes, world: [splits.flat([shape], world) for shape in shapes],
    "zero2": lambda shapes, world: [splits.zero_1_and_2(shapes, world)[0]],
    "zero3": lambda shapes, world: [splits.zero_3(shape, world) for shape in shapes],
    "fsdp2": lambda shapes, world: [splits.rows(shape, world) for shape in shapes],
    "fairscale": lambda shapes, world: [splits.flat(shapes, world)],
}
ODD = (66, 97), (16, 683), (1, 29), (2, 3), (1, 1), (300,), (7,), (4, 3, 50)
CHOSEN: dict[str, dict[str, Any]] = {
    "energy": {"level": 2},
    "muon": {"level": 0, "recipe": "orthogonal", "least_level": 0},
    "normuon": {"level": 1, "recipe": "orthogonal", "nor": 0.9},
    "adamw": {"level": 0},
}


@pytest.mark.parametrize("state_dtype", ["int8", "bf16"])
@pytest.mark.parametrize("engine", SPLITS)
def test_formats_are_planned_as_they_are_laid_out(engine: str, state_dtype: str) -> None:
    """State in few bits, with the scales of its cells: what a plan says of each rank is what the optimizer allocates
    there, cells that a boundary cuts included; and each number is in a checkpoint once.
    """
    tensors = tuple((f"t{i}", shape) for i, shape in enumerate(ODD))
    model = ModelSpec("", tuple(TensorSpec(*tensor) for tensor in tensors))
    world = 1 if engine == "single" else 3
    for options in CHOSEN.values():
        group = memory.GroupSpec.of({**options, "state_dtype": state_dtype}, tensors)
        found = fill.plan(model, [group], Setup(engine, world, weights="fp32", flatten=True))
        assert {f.name: f.format for f in found.fields}["exp_avg"] == state_dtype
        rule = recipes.rule_of({"wavelet": "haar", **options, "state_dtype": state_dtype})
        allocated: list[dict[str, int]] = [{} for _ in range(world)]
        exchange, left = 0, list(tensors)
        for laid in SPLITS[engine](ODD, world):
            names = [left.pop(0)[0] for _ in laid.shapes]
            held = [laid.fragments(names, rank) for rank in range(world)]
            for rank, fragments in enumerate(held):
                shard = Shard(join(held), tuple(fragments), ("all",), ("all",), alone(fragments))  # type: ignore[arg-type]
                plan = ParameterPlan.of(shard, Form.of(options["level"], "haar", rule))
                for name, tensor in plan.fresh_state(torch.zeros(laid.part)).items():
                    allocated[rank][name] = allocated[rank].get(name, 0) + tensor.nbytes
            exchange += plan.exchange.length
        for rank in range(world):
            sharded = {f.name: n[rank] for f, n in found.fields.items() if f.extent is not Extent.TENSOR and any(n)}
            assert sharded == {name: allocated[rank].get(name, 0) for name in sharded}
            assert allocated[rank].keys() <= {*sharded, "step", "limited_norm"}
        assert found.exchange == (exchange if world > 1 else 0)
        whole = sum(group.whole(shape) for shape in ODD) - 4 * len(ODD)
        whole -= 4 * sum(f.extent is Extent.TENSOR for s in ODD for f in group.program_for(s).fields)
        assert sum(found.checkpoint) + found.checkpoint_common - 4 * model.numel == whole
        assert sum(found.state) - sum(found.scalars) - sum(found.cut) == whole
        if engine == "single":
            assert found.state[0] == sum(group.whole(shape) for shape in ODD)


@pytest.mark.parametrize(
    ("recipe", "level", "most"),
    [("energy", 3, 0.27), ("orthogonal", 2, 0.27), ("orthogonal", 1, 0.54), ("orthogonal", 0, 1.07)],
)
def test_bytes_a_weight_in_8_bits(recipe: str, level: int, most: float) -> None:
    """Allocated, scales, steps and norms included; 5461 columns are no whole number of cells."""
    group = {"recipe": recipe, "level": level, "state_dtype": "int8", "least_level": 0 if level == 0 else None}
    for shape in ((16, 5461), (64, 2048)):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.ones(shape)
        optimizer = GWTAdamW([{"params": [weight], **group}], lr=0.1)
        optimizer.step()
        allocated = sum(tensor.nbytes for tensor in optimizer.state[weight].values())
        assert allocated == memory.GroupSpec.of(group, ()).whole(shape)
        assert most - 0.01 < allocated / weight.numel() <= most


def test_formats_that_a_run_refuses_are_not_planned() -> None:
    model = ModelSpec("", (TensorSpec("a.weight", (4, 8), Matrix("a")),))

    def planned_with(weights: str, engine: str = "fsdp2", **keys: Any) -> MemoryPlan:
        return fill.plan(model, groups_by_name(model, 1, "a", **keys), Setup(engine, 2, weights=weights))

    with pytest.raises(ValueError, match="weights are fp64 and state_dtype keeps moments in e4m4, int8"):
        planned_with("fp64", state_dtype="int8")
    for weights, engine, told in (("fp32", "fsdp2", "add --weights bf16"), ("bf16", "zero2", "without masters")):
        with pytest.raises(ValueError, match=f"{engine} steps fp32 here.* {told}"):
            planned_with(weights, engine, stochastic_rounding=True)
    planned_with("bf16", stochastic_rounding=True, state_dtype="int8")


def test_other_optimizers_by_formula() -> None:
    """GaLore and APOLLO: tensors of the state that galore-torch 1.0 and apollo-torch 1.0.3 make, seen once."""
    parameter = nn.Parameter(torch.zeros(64, 96))
    parameter.grad = torch.zeros(64, 96)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    state = optimizer.state[parameter]
    assert compare.adamw((64, 96)) == sum(state[k].nbytes for k in ("exp_avg", "exp_avg_sq"))
    for shape in ((64, 96), (96, 64)):
        assert [compare.galore(shape, rank) for rank in (8, 16)] == [8192, 16384]
        assert [compare.apollo(shape, rank) for rank in (8, 16)] == [6144, 12288]
    assert (compare.galore((5, 200), 8), compare.apollo((5, 200), 8)) == (8100, 12800)
    assert compare.adam_8bit((64, 96)) == 2 * 6144 + 2 * 4 * 24
    assert compare.adam_8bit((63, 65)) == 8 * 4095


def test_what_is_sent_in_a_step() -> None:
    model = of_config({**SHAPES, "tie_word_embeddings": True}, "")
    assert model is not None
    groups, numel = groups_by_name(model, 2, ("attn", "mlp"), recipe="paper"), model.numel

    def sent(setup: Setup, accumulation: int = 1) -> list[tuple[str, int]]:
        found = fill.plan(model, groups, setup)
        return [(t.name, t.bytes) for t in traffic(found, accumulation) if not t.ours]

    assert sent(Setup("single")) == []
    assert sent(Setup("ddp", 4, weights="fp32")) == [("gradients", 2 * (4 * numel * 3 // 4))]
    assert sent(Setup("zero1", 4), 5) == [("gradients", 2 * numel * 3 // 4), ("weights", 2 * numel * 3 // 4)]
    assert sent(Setup("zero2", 4), 5) == [("gradients", 5 * (2 * numel * 3 // 4)), ("weights", 2 * numel * 3 // 4)]
    assert sent(Setup("zero3", 4)) == [("gradients", 2 * numel * 3 // 4), ("weights", 2 * (2 * numel * 3 // 4))]
    assert sent(Setup("fsdp2", 8, 2))[-1] == ("gradients", 2 * (2 * numel // 4 // 2))
    found = fill.plan(model, groups, Setup("zero1", 7))
    ours = {t.name: t.bytes for t in traffic(found) if t.ours}
    assert ours == {"sums": 2 * (found.norms * 8 * 6 // 7), "cut units": 2 * (found.exchange * 4 * 6 // 7)}
    assert found.norms == 14 and 0 < found.exchange <= 6 * 4
    whole = groups_by_name(model, 2, ("attn", "mlp"), recipe="orthogonal")
    found = fill.plan(model, whole, Setup("zero1", 7))
    ours = {t.name: t.bytes for t in traffic(found) if t.ours}
    assert ours["matrices"] == max(found.travelling) and found.norms == 0
    coherent = groups_by_name(model, 2, ("attn", "mlp"), recipe="orthogonal", detail_gain="coherence")
    assert fill.plan(model, coherent, Setup("zero1", 7)).norms == 28


def test_matrices_that_travel_by_hand() -> None:
    """Two matrices [16, 10] on 3 ranks."""
    shapes = [("a.q", (16, 10)), ("a.k", (16, 10))]
    model = ModelSpec("", tuple(TensorSpec(f"{name}.weight", shape, Matrix(name)) for name, shape in shapes))

    def sent(engine: str, device: str = "cuda", world: int = 3, **keys: Any) -> list[int]:
        groups = groups_by_name(model, 1, "a", recipe="orthogonal", **keys)
        return fill.plan(model, groups, Setup(engine, world, device=device)).travelling

    # In parts of 108 elements rank 0 holds 108 of a.q and rank 1 the other 52, rank 1 holds 56 of a.k and rank 2 the
    # other 104: rank 0 owns a.q and rank 2 a.k, and rank 1, whose parts travel, gets them back.
    assert sent("zero1") == [2 * 52, 2 * (52 + 56), 2 * 56]
    assert sent("zero1", products="fp32") == sent("zero1", "cpu") == [4 * 52, 4 * (52 + 56), 4 * 56]
    assert sent("zero1", "cpu", products="bf16") == sent("zero1")
    # A number in fp32 for each row that a part touches: rank 1 has rows 10 to 15 of a.q, and 0 to 5 of a.k.
    assert sent("zero1", nor=0.9) == [2 * 52 + 4 * 6, 2 * (52 + 56) + 4 * (6 + 6), 2 * 56 + 4 * 6]
    # Both ranks hold half of each, and own one.
    assert sent("fsdp2", world=2, nor=0.9) == [2 * (80 + 80) + 4 * (8 + 8)] * 2
    assert sent("zero1", world=1) == sent("ddp") == [0]


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_matrices_are_handed_out_in_the_order_of_the_groups(use_orig_params: bool) -> None:
    """Of three that are as dear, each in equal parts on 3 ranks, and of which the model has the largest first."""
    shapes = [("a", (2, 18)), ("b", (3, 8)), ("c", (3, 8))]
    model = ModelSpec("", tuple(TensorSpec(f"{name}.weight", shape, Matrix(name), name) for name, shape in shapes))
    groups = groups_by_name(model, 1, {"a": 1, "b": 2, "c": 2}, recipe="orthogonal")
    found = fill.plan(model, groups, Setup("fsdp1", 3, weights="fp32", use_orig_params=use_orig_params))
    # Level 2 is the first group: b to rank 0, c to rank 1, a to rank 2.
    assert found.travelling == [2 * (8 + 12 + 16), 2 * (8 + 12 + 16), 2 * (8 + 8 + 24)]


def test_bytes_of_products_are_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for device in DEVICES:
        for weights, math in (("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)):
            for name in products.PRODUCTS:
                its = products.dtype_of(name, math, torch.device(device))
                assert Setup("fsdp2", 2, weights=weights, device=device).bytes_of_products(name) == its.itemsize
    # The moments of an optimizer on the host, and its products, are a CPU's.
    assert Setup("zero2", 2, offload="optimizer").bytes_of_products("auto") == 4
    with pytest.raises(ValueError, match="device 'tpu' must be one of cuda, cpu"):
        Setup("ddp", device="tpu")
