"""State in 8 and 16 bits where shapes are at their ends; weights rounded by chance; what is refused at set-up.

That ranks change no bit of either is in `test_matrix.py` for every engine, and in `test_formats.py` for any cuts.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import FileStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gwt_dist import GWTAdamW
from gwt_dist.layout import Fragment
from simulated import Sharded

SHAPES = {"row": (1, 300), "column": (5, 1), "thin": (2, 3), "no columns": (3, 0), "no rows": (0, 5), "scalar": ()}


@pytest.fixture(autouse=True)
def _reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other kernels are compared with it elsewhere, and those that round weights would be compiled for this alone."""
    monkeypatch.setenv("GWT_DIST_KERNEL", "eager")


def gaussian(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def thirds(shapes: dict[str, tuple[int, ...]]) -> list[list[Fragment]]:
    """Fragments of four ranks: of each tensor two thirds on the last, the rest on the first, nothing on the others."""
    ranks: list[list[Fragment]] = [[], [], [], []]
    used = [0] * 4
    for fqn, shape in shapes.items():
        cuts = [0, prod(shape) // 3, prod(shape) // 3, prod(shape) // 3, prod(shape)]
        for rank in range(4):
            ranks[rank].append(Fragment(fqn, shape, cuts[rank], cuts[rank + 1], used[rank]))
            used[rank] += ranks[rank][-1].numel
    return ranks


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
@pytest.mark.parametrize(
    ("level", "shapes"), [(1, SHAPES), (9, {"several cells": (2, 70_000), "one": (2, 500), "thin": (3, 2)})]
)
def test_shapes_at_their_ends(level: int, shapes: dict[str, tuple[int, ...]], state_dtype: str) -> None:
    """Rows of one element, no elements, units longer than rows, a level for the eager kernel, ranks without any."""
    options: dict[str, Any] = {"lr": 0.01, "level": level, "recipe": "energy", "state_dtype": state_dtype}
    weights = {fqn: gaussian(shape, i) for i, (fqn, shape) in enumerate(shapes.items())}
    sharded = Sharded(weights, thirds(shapes), **options)
    parameters = {fqn: nn.Parameter(weight.clone()) for fqn, weight in weights.items()}
    whole = GWTAdamW(list(parameters.values()), **options)
    for step in range(3):
        gradients = {fqn: gaussian(shape, 10 * step + i) for i, (fqn, shape) in enumerate(shapes.items())}
        for fqn, parameter in parameters.items():
            parameter.grad = gradients[fqn]
        whole.step()
        sharded.step(gradients)
    found = sharded.gather(shapes)
    for fqn, parameter in parameters.items():
        assert torch.equal(found[fqn], parameter), fqn
        assert not parameter.numel() or not torch.equal(parameter, weights[fqn]), fqn
        state, shape = whole.state[parameter], shapes[fqn]
        coefficients = (shape[0], -(-shape[1] // 2**level)) if shape else ()
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == coefficients
        if state_dtype == "int8":
            cells = (shape[0], -(-coefficients[1] // 64)) if shape else (1,)
            assert state["exp_avg_scale"].shape == state["exp_avg_sq_scale"].shape == cells


def test_weights_that_are_not_contiguous_move_as_contiguous_ones() -> None:
    options: dict[str, Any] = {"level": 1, "recipe": "energy", "state_dtype": "int8", "stochastic_rounding": True}
    dense = nn.Parameter(gaussian((30, 200), 0).bfloat16())
    strided = nn.Parameter(dense.detach().t().contiguous().t())
    assert not strided.is_contiguous()
    for step in range(2):
        for parameter in (dense, strided):
            parameter.grad = gaussian((30, 200), step + 1).bfloat16()
    optimizers = [GWTAdamW([parameter], **options) for parameter in (dense, strided)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(dense, strided)


@pytest.mark.parametrize("level", [0, 1])
def test_small_changes_of_bf16_weights_add_up(level: int) -> None:
    """Each is a 40th of what bf16 can say, so to nearest nothing would move; by chance the mean is that of fp32."""
    ulp, steps = 2.0**-7, 400
    start, runs = torch.full((64, 64), 1.5), {}
    for name, dtype in (("exact", torch.float32), ("nearest", torch.bfloat16), ("chance", torch.bfloat16)):
        weight = nn.Parameter(start.to(dtype, copy=True))
        keys = {"stochastic_rounding": True} if name == "chance" else {}
        optimizer = GWTAdamW([weight], lr=ulp / 40, level=level, recipe="energy", scale=1.0, **keys)
        weight.grad = torch.ones_like(weight)
        for _ in range(steps):
            optimizer.step()
        runs[name] = weight.detach().double()
    assert torch.equal(runs["nearest"], start.double())
    assert 9.5 * ulp < float((start - runs["exact"]).mean()) < 10.5 * ulp
    error = runs["chance"] - runs["exact"]
    assert float(error.mean().abs()) < 4 * float(error.std()) / 64
    assert 2.5 * ulp < float(error.std()) < 4 * ulp, "places that share their noise would move together"


REFUSED: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"state_dtype": "fp8"}, torch.float32, "state_dtype='fp8' in .* must be one of \\('fp32', 'bf16', 'int8'\\)"),
    (
        {"state_dtype": "int8", "wavelet": "db2"},
        torch.float32,
        'wavelet=.db2.*Write wavelet="haar", or state_dtype="bf16"',
    ),
    ({"rounding_seed": -1}, torch.float32, "rounding_seed=-1 in .* must be a whole number from 0 to 4294967295"),
    ({"stochastic_rounding": "yes"}, torch.bfloat16, "stochastic_rounding='yes' in .* must be True, False"),
    ({"state_dtype": "int8"}, torch.float64, "parameter 1 of group 1 is float64.*Leave state_dtype out of the group"),
    ({"state_dtype": "bf16"}, torch.float64, "parameter 1 of group 1 is float64.*Leave state_dtype out of the group"),
    ({"stochastic_rounding": True}, torch.float32, "parameter 1 of group 1 is torch.float32.*is for bfloat16"),
]


@pytest.mark.parametrize(("keys", "dtype", "message"), REFUSED)
def test_what_cannot_be_is_refused_at_set_up(keys: dict[str, Any], dtype: torch.dtype, message: str) -> None:
    first, frozen, wrong = (nn.Parameter(torch.zeros(2, 2, dtype=one)) for one in (torch.bfloat16, dtype, dtype))
    frozen.requires_grad_(False)
    group = {"params": [frozen, wrong], **keys}
    with pytest.raises(ValueError, match=message):
        GWTAdamW([{"params": [first]}, group])
    optimizer = GWTAdamW([first])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


def test_a_dtype_that_changes_after_set_up_is_refused_by_the_step() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = GWTAdamW([weight], level=2, recipe="energy", state_dtype="int8")
    weight.data = weight.data.double()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="parameter 0 of group 0 is float64, and its group has state_dtype='int8'"):
        optimizer.step()


def test_what_no_rank_cuts_is_a_dtensor_of_the_state_of_one_process(tmp_path: Path) -> None:
    """Vectors, and tensors of three dimensions at level 0: every field, scales too, as one process has them."""
    dist.init_process_group("gloo", store=FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for shape, placement in (
            ((131,), Replicate()),
            ((131,), Shard(0)),
            ((3, 2, 70), Shard(0)),
            ((2, 70), Shard(1)),
        ):
            whole = torch.nn.Parameter(torch.randn(shape))
            placed = torch.nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [placement]))
            kept = []
            for parameter in (whole, placed):
                parameter.grad = torch.ones_like(parameter)
                optimizer = GWTAdamW([parameter], level=0, state_dtype="int8")
                optimizer.step()
                kept.append(optimizer.state_dict()["state"][0])
            for name, value in kept[0].items():
                if name not in ("step", "limited_norm"):
                    assert isinstance(kept[1][name], DTensor) and kept[1][name].shape == value.shape
                    assert torch.equal(kept[1][name].full_tensor(), value), (shape, placement, name)
    finally:
        dist.destroy_process_group()
