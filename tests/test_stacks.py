"""Stacks of matrices, ``[E, R, C]`` in a group with ``stacked=True``: each is stepped as a parameter by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gwt_dist import GWTAdamW
from simulated import normal, unlike_one_process
from stacks_cases import load_alone, load_case, save_case, state_case
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


@settings(max_examples=150)
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


def test_state_under_fsdp2(ranks) -> None:
    """DTensors of the whole stack, so that torch takes them, where ranks hold whole matrices: an odd number on two."""
    for result in ranks(2, state_case, "rows"):
        assert result["wrong"] == []
        assert result["message"] == ""
        assert {"exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "projector", "residual_norm"} <= set(result["placed"])
        assert "limited_norm" not in result["placed"]
        assert all(result["gathered"].values()) and "exp_avg_res_col" in result["gathered"]
