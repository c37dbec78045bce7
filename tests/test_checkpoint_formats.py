"""Checkpoints of state in 8 and 16 bits: the same bits on every road, and from one format into another."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gwt_dist
from checkpoint_format_cases import alone, cut_vector_case, dcp_case, digests, road_case, same_layout_case
from checkpoint_runs import content, same
from gwt_dist import CheckpointError, GWTAdamW, noise
from gwt_dist.cli.app import main
from gwt_dist.formulas.codecs import decode, encode

pytestmark = pytest.mark.usefixtures("torch_extensions_dir")

STATE_DTYPES = "fp32", "bf16", "int8"
FORMATS = {"fp32": ("fp32", "fp32"), "bf16": ("bf16", "bf16"), "int8": ("int8", "e4m4")}
SEED = 7
Built = tuple[nn.Module, GWTAdamW]


@pytest.mark.support(
    "checkpoints", "state in 16 and 8 bits: ZeRO-2, ZeRO-3, FSDP2, FSDP1, 2 to 3 to 2 ranks, to the bit"
)
@pytest.mark.parametrize("recipe", ["int8", "bf16", "orthogonal int8"])
def test_engines_and_ranks_change_no_bit(ranks, tmp_path, recipe) -> None:
    """Vectors of one cell that three ranks share, rows of cells that a boundary of a flat buffer cuts, short cells."""
    folder = str(tmp_path)
    (through,) = road_case(folder, ("one",), recipe, "", 0, 9)
    flat = ("zero2", "fsdp1 flat") if recipe == "int8" else ("zero2",)
    ranks(2, road_case, folder, flat, recipe, "", 0, 7, "two", timeout=120)
    for kind in flat:
        assert road_case(folder, ("one",), recipe, f"two {kind}", 7, 9) == [through]
    for found in ranks(3, road_case, folder, ("fsdp2", "zero3"), recipe, "two zero2", 7, 9, "three", timeout=120):
        assert found == [through, through]
    (further,) = road_case(folder, ("one",), recipe, "three fsdp2", 9, 10)
    for found in ranks(2, road_case, folder, ("zero2",), recipe, "three zero3", 9, 10, timeout=120):
        assert found == [further]


# ------------------------------------------------------------------------------------------- one format into another


def built(state_dtype: str | None, dtype: torch.dtype = torch.float32, **options: Any) -> Built:
    """A matrix of rows of a whole and a short cell, and a vector."""
    torch.manual_seed(0)
    model = nn.Linear(200, 5).to(dtype)
    return model, GWTAdamW(
        model.parameters(), **{"lr": 0.01, "level": 1, "recipe": "energy", "state_dtype": state_dtype, **options}
    )


def train(run: Built, first: int, last: int) -> Built:
    for number in range(first, last):
        for i, parameter in enumerate(run[0].parameters()):
            random = torch.Generator().manual_seed(10 * number + i)
            parameter.grad = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        run[1].step()
    return run


def numbers(state: dict[str, Tensor], name: str, form: str) -> Tensor:
    """What a field holds, fp32 ``[R, K]``, cell by cell."""
    if form == "fp32":
        return state[name]
    rows = state[name].reshape(-1, state[name].shape[-1])
    cells = torch.arange(rows.shape[1]) // 64
    scales = state[f"{name}_scale"].reshape(len(rows), -1) if form != "bf16" else [None] * len(rows)
    read = [decode(form, row, scale, cells) for row, scale in zip(rows, scales, strict=True)]
    return torch.stack(read).view(state[name].shape)


def expected_of(values: Tensor, form: str, shape: torch.Size, step: int, field: int) -> dict[str, Tensor]:
    """The codes and scales that `values` of a tensor of `shape` become, row by row."""
    if form == "fp32":
        return {"": values}
    rows, matrix = values.reshape(-1, values.shape[-1]), (shape[0], shape[1]) if len(shape) > 1 else (1, shape[0])
    places = torch.arange(rows.shape[1])
    key = noise.key(torch.tensor(step), 1, SEED, noise.salt(*matrix))
    chances = [noise.chance(noise.noise(torch.tensor(i), places, key), 16 * (field == 1)) for i in range(len(rows))]
    made = [
        encode(form, row, chance, places // 64, -(-len(places) // 64))
        for row, chance in zip(rows, chances, strict=True)
    ]
    found = {"": torch.stack([code for code, _ in made]).view(values.shape)}
    scales = [scale for _, scale in made if scale is not None]
    return found | ({"_scale": torch.stack(scales)} if scales else {})


@pytest.mark.parametrize("then", STATE_DTYPES)
@pytest.mark.parametrize("now", STATE_DTYPES)
def test_every_format_into_every_other(tmp_path, then, now) -> None:
    saved = train(built(then, rounding_seed=SEED), 0, 3)
    gwt_dist.save(tmp_path, *saved, step=3)
    run = train(built(now), 0, 1)
    before = content(run)
    if then != now:
        message = (
            f"exp_avg in {FORMATS[then][0]}, .*another format, whose numbers would be read wrongly. "
            f"Build the optimizer with state_dtype='{then}', or .*convert_state=True"
        )
        with pytest.raises(CheckpointError, match=message):
            gwt_dist.load(tmp_path, *run)
        assert same(before, content(run))
    gwt_dist.load(tmp_path, *run, convert_state=True)
    (group,) = run[1].param_groups
    assert (group["state_dtype"], group["rounding_seed"]) == (now, SEED)
    for parameter, other in zip(run[0].parameters(), saved[0].parameters(), strict=True):
        assert torch.equal(parameter, other)
        state, its = run[1].state[parameter], saved[1].state[other]
        assert state["step"] == 3
        for i, name in enumerate(("exp_avg", "exp_avg_sq")):
            old, new = FORMATS[then][i], FORMATS[now][i]
            wanted = {"": its[name]} if old == new else {}
            wanted = wanted or expected_of(numbers(its, name, old), new, parameter.shape, 3, i + 1)
            for suffix, value in wanted.items():
                assert torch.equal(state[f"{name}{suffix}"].view(-1), value.view(-1)), (name, suffix)
            assert state[name].dtype == wanted[""].dtype
    train(run, 3, 4)
    gwt_dist.load(tmp_path, *built(now), weights_only=True)  # which asks for no format


@pytest.mark.support("checkpoints", "state of one format into another, the same bits on 1, 2 and 3 ranks")
def test_a_conversion_has_the_same_bits_on_any_ranks(ranks, tmp_path) -> None:
    folder = str(tmp_path)
    ranks(2, road_case, folder, ("zero2",), "bf16", "", 0, 2, "two", timeout=120)
    (through,) = road_case(folder, ("one",), "int8", "two zero2", 2, 2, convert=True)
    kinds = ("fsdp2", "fsdp1 flat", "columns")
    for found in ranks(3, road_case, folder, kinds, "int8", "two zero2", 2, 2, "three", True):
        assert found == [through, through, through]
    (back,) = road_case(folder, ("one",), "bf16", "three fsdp2", 2, 2, convert=True)
    for found in ranks(2, road_case, folder, ("zero2", "columns"), "bf16", "three fsdp1 flat", 2, 2, "", True):
        assert found == [back, back]


def test_only_what_was_saved_in_another_format_is_converted(tmp_path) -> None:
    """Codes that are read and rounded again would be others."""
    model, _ = built("int8")
    groups = [{"params": [model.weight]}, {"params": [model.bias], "state_dtype": "fp32"}]
    saved = train((model, GWTAdamW(groups, lr=0.01, level=1, state_dtype="int8", recipe="energy")), 0, 2)
    gwt_dist.save(tmp_path, *saved, step=2)
    run = built("int8")
    gwt_dist.load(tmp_path, *run, convert_state=True)
    state, its = run[1].state[run[0].weight], saved[1].state[model.weight]
    assert all(torch.equal(value, its[name]) for name, value in state.items())
    assert run[1].state[run[0].bias]["exp_avg"].dtype == torch.int8


def test_a_format_of_moments_that_are_not_there_yet(tmp_path) -> None:
    gwt_dist.save(tmp_path, *built("int8"), step=0)
    run = built(None)
    with pytest.raises(CheckpointError, match=r"exp_avg in int8, .* Build the optimizer with state_dtype='int8', or"):
        gwt_dist.load(tmp_path, *run)
    gwt_dist.load(tmp_path, *run, convert_state=True)
    assert run[1].param_groups[0]["state_dtype"] is None


def test_other_state_is_no_other_format(tmp_path) -> None:
    """Nothing makes momentum of one recipe that of another."""
    gwt_dist.save(tmp_path, *train(built("int8"), 0, 1), step=1)
    for options in ({"recipe": "orthogonal"}, {"recipe": "foam"}):
        with pytest.raises(CheckpointError, match="Build the optimizer as it was"):
            gwt_dist.load(tmp_path, *built("bf16", **options), convert_state=True)
    with pytest.raises(CheckpointError, match="convert_state=True and weights_only=True"):
        gwt_dist.load(tmp_path, *built("bf16"), convert_state=True, weights_only=True)


# --------------------------------------------------------------------------------------------------------- weights


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("then", "rounded", "now", "built_with", "found"),
    [
        (BF16, True, BF16, None, True),  # as other options
        (BF16, True, FP32, None, None),  # fp32 weights are refused it
        (FP32, None, BF16, True, True),  # and of a run that had no use for it nobody takes it
    ],
)
def test_how_weights_are_rounded_goes_with_their_dtype(tmp_path, then, rounded, now, built_with, found) -> None:
    gwt_dist.save(tmp_path, *train(built(None, then, stochastic_rounding=rounded), 0, 1), step=1)
    run = built(None, now, stochastic_rounding=built_with)
    gwt_dist.load(tmp_path, *run)
    assert run[1].param_groups[0]["stochastic_rounding"] is found
    train(run, 1, 2)


# ------------------------------------------------------------------------------------------------------ what is told


def test_the_state_of_one_tensor_is_as_it_is_stored() -> None:
    run = train(built("int8"), 0, 1)
    state = gwt_dist.full_state(*run, "weight")
    told = {name: (value.dtype, tuple(value.shape)) for name, value in state.items() if value.dim()}
    assert told == {
        "exp_avg": (torch.int8, (5, 100)),
        "exp_avg_sq": (torch.uint8, (5, 100)),
        "exp_avg_scale": (FP32, (5, 2)),
        "exp_avg_sq_scale": (FP32, (5, 2)),
    }
    assert all(torch.equal(value, run[1].state[run[0].weight][name]) for name, value in state.items())


SIZES = {  # 5 rows of 100 coefficients in 2 cells, and a vector of 5 in one
    "int8": {"exp_avg": 505, "exp_avg_sq": 505, "exp_avg_scale": 44, "exp_avg_sq_scale": 44},
    "bf16": {"exp_avg": 1010, "exp_avg_sq": 1010},
}


@pytest.mark.parametrize("state_dtype", SIZES)
def test_inspect_shows_formats_and_their_bytes(tmp_path, capsys, state_dtype) -> None:
    sizes = SIZES[state_dtype]
    gwt_dist.save(tmp_path, *train(built(state_dtype), 0, 1), step=1)
    assert main(["inspect", "--json", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["state_bytes"] == sizes
    formats = dict(zip(("exp_avg", "exp_avg_sq"), FORMATS[state_dtype], strict=True))
    assert told["formats"] == {name: [formats.get(name, "fp32")] for name in sizes}
    assert told["totals"]["adamw_moment_bytes"] == 2 * 4 * 1005, "AdamW's would be in fp32"
    assert main(["inspect", str(tmp_path)]) == 0
    share = sum(sizes.values()) / (2 * 4 * 1005)
    first = f"exp_avg in {state_dtype} {sizes['exp_avg']:,} bytes"
    assert f"moments: {share:.4f} of AdamW's ({first}, " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ torch's roads


def through_load_state_dict(run: Built) -> Built:
    model, optimizer = built("int8")
    model.load_state_dict(run[0].state_dict())
    optimizer.load_state_dict(copy.deepcopy(run[1].state_dict()))
    return model, optimizer


ROADS: dict[str, Callable[[Built], Built]] = {
    "state_dict": through_load_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
}


@pytest.mark.parametrize("road", ROADS)
def test_torch_s_roads_of_one_process(road) -> None:
    run = train(built("int8"), 0, 2)
    other = ROADS[road](run)
    for one in (run, other):
        train(one, 2, 4)
    assert [t.dtype for t in content(run)] == [t.dtype for t in content(other)]
    assert same(content(run), content(other))


def test_state_dict_of_another_format_is_refused() -> None:
    run, other = train(built("int8"), 0, 1), built("bf16")
    with pytest.raises(ValueError, match=r"state_dtype='int8' in the state to load.*convert_state=True"):
        other[1].load_state_dict(run[1].state_dict())
    assert not other[1].state


@pytest.mark.support("FSDP2", "torch.distributed.checkpoint of 8-bit state, 2 to 3 ranks; vectors in a group in fp32")
def test_distributed_checkpoints(ranks, tmp_path) -> None:
    """2 to 3 ranks, with vectors in a group of their own; else one of them cuts their only cell."""
    ranks(2, dcp_case, str(tmp_path), False, 0, 2)
    assert ranks(3, dcp_case, str(tmp_path), True, 2, 4) == [alone()] * 3
    for message in ranks(2, cut_vector_case):
        assert "cut within a cell" in message and "state_dtype" in message and "gwt_dist.save" in message


@pytest.mark.support(
    "checkpoints", "8-bit state by the engine's own checkpoint, on the same ranks: ZeRO-2, ZeRO-3, FSDP1"
)
@pytest.mark.parametrize("kind", ["zero2", "zero3", "fsdp1 flat"])
def test_the_checkpoint_of_an_engine_on_the_same_ranks(ranks, tmp_path, kind) -> None:
    for through, again in ranks(2, same_layout_case, kind, "int8", str(tmp_path)):
        assert again == through


def test_what_is_compared_can_tell() -> None:
    """A code and a scale that are one off are seen."""
    from checkpoint_format_cases import Trained, gradient

    trained = Trained("one", recipe="int8")
    trained.train([gradient(0)])
    before = digests(trained)
    state = trained.optimizer.state[trained.module.attn_q.weight]
    state["exp_avg"][65, 24] += 1
    state["exp_avg_sq_scale"][0, 0] *= 2
    after = digests(trained)
    assert {name for name in before if before[name] != after[name]} == {
        "exp_avg of attn_q.weight",
        "exp_avg_sq_scale of attn_q.weight",
    }
