"""Stacks of matrices, ``[E, R, C]`` in a group with ``stacked=True``: each is stepped as a parameter by itself."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gwt_dist
from gwt_dist import CheckpointError, Fragment, GWTAdamW
from gwt_dist.checkpoint.parse import parse
from gwt_dist.comm import Shard, alone
from gwt_dist.exchange import join
from gwt_dist.memory import GroupSpec
from simulated import normal, unlike_one_process
from stacks_cases import load_alone, load_case, own_case, refused_case, save_case, state_case
from test_layout import SHAPES, worlds
from zero_engine_cases import ENGINES as DEEPSPEED

OPTIONS: dict[str, dict[str, Any]] = {
    "energy-1": {"recipe": "energy", "level": 1},
    "energy-2": {"recipe": "energy", "level": 2},
    "energy-db2": {"recipe": "energy", "level": 2, "wavelet": "db2"},
    "paper": {"recipe": "paper", "level": 2},
    "foam": {"recipe": "foam", "level": 1, "state_dtype": "bf16"},
    "int8": {"recipe": "energy", "level": 1, "state_dtype": "int8"},
    "adamw": {"recipe": "energy", "level": 0},
    "orthogonal-1": {"recipe": "orthogonal", "level": 1},
    "orthogonal-coherent": {"recipe": "orthogonal", "level": 2, "detail_gain": "coherence", "nor": 0.95},
    "muon": {"recipe": "orthogonal", "level": 0, "least_level": 0},
    "critical": {"recipe": "energy", "level": 1, "critical": 2},
    "adalomo": {"recipe": "adalomo", "level": 1},
    "factored": {"recipe": "factored", "level": 1},
    "came": {"recipe": "came", "level": 0, "least_level": 0},
    "low-rank": {"recipe": "low-rank", "rank": 3, "update_proj_gap": 3, "residual": True},
}
E, R, C = SHAPE = (3, 7, 10)


def gradients(steps: int) -> list[Tensor]:
    """Of matrices whose sizes differ, so that whoever mixes them up is seen."""
    sizes = torch.tensor([1.0, 30.0, 0.1], dtype=torch.float64)[:, None, None]
    return [(1 + i % 2) * sizes * normal(*SHAPE, seed=50 + i) for i in range(steps)]


def dtype_of(options: dict[str, Any]) -> torch.dtype:
    return torch.float32 if "state_dtype" in options else torch.float64


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_stack_is_stepped_as_its_matrices_are(options: dict[str, Any]) -> None:
    """To the last bit, state included, whose first dimension is that of the stack."""
    start, dtype = normal(*SHAPE), dtype_of(options)
    options = {"lr": 0.02, "weight_decay": 0.1, **options}
    stack = torch.nn.Parameter(start.to(dtype, copy=True))
    apart = [torch.nn.Parameter(matrix.to(dtype).clone()) for matrix in start]
    one, other = GWTAdamW([stack], stacked=True, **options), GWTAdamW(apart, **options)
    for gradient in gradients(5):
        stack.grad = gradient.to(dtype)
        for parameter, its in zip(apart, gradient, strict=True):
            parameter.grad = its.to(dtype).clone()
        one.step()
        other.step()
    assert torch.equal(stack, torch.stack([p.detach() for p in apart]))
    assert (stack - start).abs().max() > 0.01
    states = [other.state[p] for p in apart]
    assert one.state[stack].keys() == states[0].keys()
    for name, value in one.state[stack].items():
        if name != "step":
            assert torch.equal(value, torch.stack([state[name] for state in states])), name


STACKS = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9))
EXACT = [name for name, options in OPTIONS.items() if "state_dtype" not in options]


@settings(max_examples=100)
@given(worlds(st.one_of(STACKS, STACKS, SHAPES)), st.sampled_from(EXACT))
def test_ranks_change_nothing(world, name) -> None:
    """Wherever boundaries fall: between matrices, in them, in rows. Matrices and vectors are in the same group."""
    options = {"lr": 0.02, "weight_decay": 0.1, "stacked": True, **OPTIONS[name]}
    assert unlike_one_process(world, 3, **options)[0] <= 1e-12


@pytest.mark.parametrize(
    ("by", "to"),
    [
        (("fsdp2", ("rows",)), None),
        (("fsdp2", ("columns",)), ("fsdp2", ("rows",))),
        (("deepspeed", (DEEPSPEED["2"],)), None),
        (("deepspeed", (DEEPSPEED["3"],)), None),
    ],
    ids=["FSDP2", "FSDP2 in columns to FSDP2", "ZeRO-2", "ZeRO-3"],
)
@pytest.mark.usefixtures("torch_extensions_dir")
def test_from_two_ranks_to_one(ranks, tmp_path, by, to) -> None:
    """A checkpoint of three matrices a stack, of every recipe, goes on elsewhere as if nothing had happened."""
    dtype, most = (torch.float32, 1e-6) if by[0] == "deepspeed" else (torch.float64, 1e-12)
    assert max(ranks(2, save_case, *by, str(tmp_path))) <= most
    assert to is None or max(ranks(1, load_case, *to, str(tmp_path), dtype)) <= most
    assert to is not None or load_alone(str(tmp_path), dtype) <= most


@pytest.mark.support("checkpoints", "stacked experts by the engine's own checkpoint: ZeRO-2, ZeRO-3, FSDP1, FSDP2")
@pytest.mark.parametrize(
    "by",
    [
        ("deepspeed", (DEEPSPEED["2"],)),
        ("deepspeed", (DEEPSPEED["3"],)),
        ("fsdp1", ("FULL_SHARD", True)),
        ("fsdp2", ("rows",)),
    ],
    ids=["ZeRO-2", "ZeRO-3", "FSDP1", "FSDP2"],
)
@pytest.mark.usefixtures("torch_extensions_dir")
def test_the_engines_own_checkpoint(ranks, tmp_path, by) -> None:
    """On the ranks that saved it."""
    assert max(ranks(2, own_case, *by, str(tmp_path))) <= (1e-6 if by[0] == "deepspeed" else 1e-12)


def test_state_under_fsdp2(ranks) -> None:
    """DTensors of the whole stack, so that torch takes them, where ranks hold whole matrices: an odd number on two."""
    for result in ranks(2, state_case, "rows"):
        assert result["wrong"] == []
        assert result["message"] == ""
        assert {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "projector", "residual_norm"} <= set(result["placed"])
        assert "limited_norm" not in result["placed"]
        assert all(result["gathered"].values()) and "exp_avg_res_col" in result["gathered"]


def test_matrices_that_are_cut(ranks) -> None:
    for cut, unsaid in ranks(2, refused_case):
        assert re.search(r"cut within a matrix, so ranks keep exp_avg_sq_col of the same matrix .*gwt_dist.save", cut)
        assert re.search(r"sharded along a dimension after the second .* or say stacked=True in its parameter", unsaid)


def stepped(stacked: bool, shape: tuple[int, ...] = SHAPE, **options: Any) -> tuple[nn.Module, GWTAdamW]:
    """A model of one stack, after a step."""
    model = nn.Module()
    model.experts = nn.Parameter(torch.ones(shape))
    optimizer = GWTAdamW(model.parameters(), level=1, stacked=stacked, **{"recipe": "paper", **options})
    model.experts.grad = normal(*shape).float()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("saved", [True, False])
def test_moments_of_other_rows_are_refused(tmp_path, saved) -> None:
    """On every road on which state comes back; of a group of old, which did not say it, too."""
    (model, optimizer), (_, other) = stepped(saved), stepped(not saved)
    state = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=f"stacked of parameter group 0 is {saved} in the state to load and {not saved}"
    ):
        other.load_state_dict(state)
    if not saved:
        del state["param_groups"][0]["stacked"]
        with pytest.raises(ValueError, match="stacked of parameter group 0 is False in the state to load and True"):
            other.load_state_dict(state)
        optimizer.load_state_dict(state)
    gwt_dist.save(tmp_path, model, optimizer, step=1)
    message = f"'experts' of shape .* was trained with stacked={saved} in .* has stacked={not saved}"
    with pytest.raises(CheckpointError, match=message):
        gwt_dist.load(tmp_path, model, GWTAdamW(model.parameters(), level=1, recipe="paper", stacked=not saved))


def test_numbers_of_a_stack_are_a_list_of_its_matrices(tmp_path) -> None:
    """And an index that has another is damaged."""
    model, optimizer = stepped(True)
    folder = gwt_dist.save(tmp_path, model, optimizer, step=1)
    index = json.loads((folder / "index.json").read_text())
    entry = index["tensors"]["experts"]
    assert entry["numbers"]["limited_norm"] == optimizer.state[model.experts]["limited_norm"].tolist()
    assert {kind: part["shape"] for kind, part in entry["parts"].items()} == {
        "weight": [E, R, C],
        "exp_avg": [E * R, C // 2],
        "exp_avg_sq": [E * R, C // 2],
    }
    for wrong in (1.0, [1.0] * (E - 1), [1.0] * (E - 1) + ["1"]):
        entry["numbers"]["limited_norm"] = wrong
        with pytest.raises(
            CheckpointError, match=r"tensors.experts.numbers.limited_norm (is a float|are \[1.0, .* 3 matr)"
        ):
            parse(json.dumps(index).encode(), "index.json", None)


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_a_stack_in_another_format(tmp_path, state_dtype) -> None:
    """Converted on its way as its matrices are."""
    model, optimizer = stepped(True, (3, 2, 300), recipe="energy")
    gwt_dist.save(tmp_path / "stack", model, optimizer, step=1)
    other = GWTAdamW(model.parameters(), level=1, recipe="energy", stacked=True, state_dtype=state_dtype)
    gwt_dist.load(tmp_path / "stack", model, other, convert_state=True)
    apart = nn.ParameterList([nn.Parameter(torch.ones(2, 300)) for _ in range(3)])
    alone = GWTAdamW(apart.parameters(), level=1, recipe="energy")
    for i, parameter in enumerate(apart):
        parameter.grad = normal(3, 2, 300).float()[i].clone()
    alone.step()
    gwt_dist.save(tmp_path / "apart", apart, alone, step=1)
    converted = GWTAdamW(apart.parameters(), level=1, recipe="energy", state_dtype=state_dtype)
    gwt_dist.load(tmp_path / "apart", apart, converted, convert_state=True)
    for name, value in other.state[model.experts].items():
        if name != "step":
            assert torch.equal(value, torch.stack([converted.state[p][name] for p in apart])), name


def test_what_is_no_stack_is_refused() -> None:
    kernel = nn.Parameter(torch.ones(8, 4, 3, 3))
    with pytest.raises(ValueError, match=r"of shape \(8, 4, 3, 3\) is in a parameter group with stacked=True"):
        GWTAdamW([kernel], stacked=True)
    with pytest.raises(ValueError, match=r"stacked=1 in .* must be True or False"):
        GWTAdamW([kernel], stacked=1)
    with pytest.raises(ValueError, match=r"'kernel' in a parameter group, of shape \(8, 4, 3, 3\)"):
        GroupSpec.of({"level": 1, "stacked": True}, (("kernel", (8, 4, 3, 3)),))
    optimizer = GWTAdamW([{"params": [nn.Parameter(torch.ones(4))], "stacked": True}])
    with pytest.raises(ValueError, match="stacked=True"):
        optimizer.add_param_group({"params": [kernel], "stacked": True})
    assert len(optimizer.param_groups) == 1


def test_the_kernel_of_a_convolution_is_what_it_was() -> None:
    """A row is an output channel, whatever other groups say."""
    _, optimizer = stepped(False)
    ((state,),) = [optimizer.state.values()]
    assert state["exp_avg"].shape == (E, R * C // 2) and state["limited_norm"].shape == ()
    assert GroupSpec.of({"level": 1, "recipe": "paper"}, ()).whole(SHAPE) == sum(v.nbytes for v in state.values())
    _, optimizer = stepped(True)
    ((state,),) = [optimizer.state.values()]
    planned = GroupSpec.of({"level": 1, "recipe": "paper", "stacked": True}, ()).whole(SHAPE)
    assert planned == sum(v.nbytes for v in state.values()) == 4 * (1 + E + 2 * E * R * C // 2)


def test_what_a_group_says_stays_what_it_is() -> None:
    """Once a step was taken: the state of a stack cannot become that of one matrix."""
    model, optimizer = stepped(True)
    optimizer.param_groups[0]["stacked"] = False
    before = model.experts.detach().clone()
    with pytest.raises(
        ValueError, match=r"differ from level=1, wavelet='haar', stacked=True with .* at its first step"
    ):
        optimizer.step()
    assert torch.equal(model.experts, before)


def test_the_same_steps_go_on_from_a_state_dict() -> None:
    """By torch's own road, copies included."""
    model, optimizer = stepped(True)
    before, twin = copy.deepcopy(model), copy.deepcopy(model)
    other = GWTAdamW(twin.parameters(), level=1, recipe="paper", stacked=True)
    other.load_state_dict(optimizer.state_dict())
    for one, its in ((model, optimizer), (twin, other)):
        one.experts.grad = normal(*SHAPE, seed=3).float()
        its.step()
    assert torch.equal(model.experts, twin.experts) and not torch.equal(model.experts, before.experts)


def test_a_frozen_stack_in_a_flat_buffer() -> None:
    """It stays as it is, and the steps that it did not take are its own, under its own name."""
    shapes = {"a": SHAPE, "b": SHAPE}
    owners = tuple(nn.Parameter(torch.ones(SHAPE)) for _ in shapes)
    size = E * R * C
    fragments = tuple(Fragment(name, SHAPE, 0, size, i * size) for i, name in enumerate(shapes))
    flat = nn.Parameter(torch.ones(2 * size))
    optimizer = GWTAdamW([flat], level=1, recipe="paper", stacked=True)
    optimizer.attach({flat: Shard(join([fragments]), fragments, (), (), alone(fragments), owners=owners)})
    owners[0].requires_grad_(False)
    flat.grad = torch.ones(2 * size)
    optimizer.step()
    assert bool((flat[:size] == 1).all()) and bool((flat[size:] != 1).all())
    assert dict(optimizer.missed(flat)) == {"a": 1}
    plan = optimizer.plan_of(flat, 0)
    assert (
        plan and all(o is owners[i // E] for i, o in enumerate(plan.shard.owners)) and len(plan.shard.owners) == 2 * E
    )
    owners[1].requires_grad_(False)
    before = flat.detach().clone()
    optimizer.step()
    assert torch.equal(flat, before)
