"""Cases for `test_triton_travel.py` that run where Triton interprets its kernels; see `triton_cases`."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_dist import Fragment, GWTAdamW, matrices, products, rounds
from gwt_dist.kernels import triton, triton_travel
from gwt_dist.kernels.items import Item
from gwt_dist.products import stacks
from test_layout import worlds
from travel_cases import OPTIONS, WIDE, Case, equal, rule, whole
from triton_cases import SLOW, Launches, Operations, interpreter, kernel

PAIRS = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)


def equal_to_eager_at_every_level() -> None:
    """Whole units and ragged rows, in places that are aligned to 16 bytes and that are not; rules differ."""
    rules = [rule(detail_gain=0.3), rule(lr=torch.tensor(0.3), nesterov=True, detail_gain=1.0)]
    with interpreter():
        for level in (1, 2, 5, 8):
            shapes = (3, 37), (1, 16 << level), (3, 1), (1, (2 << level) + 1)
            for landing, pair in zip(WIDE, PAIRS, strict=True):
                equal(triton, Case([whole(*shapes)], 0, level, rules, landing, pairs=[pair, pair[::-1]]))


def equal_to_eager_where_units_are_cut(examples: int) -> None:
    """Random fragments of random tensors, of which any rank may hold nothing."""

    @settings(SLOW, max_examples=examples)
    @given(worlds(), st.integers(1, 6), OPTIONS, st.sampled_from(WIDE), st.sampled_from([1, 7]), st.data())
    def check(
        world: Any, level: int, options: dict[str, Any], landing: torch.dtype, t: int, data: st.DataObject
    ) -> None:
        rank = data.draw(st.integers(0, len(world[1]) - 1))
        pairs = [data.draw(st.sampled_from(PAIRS))]
        with patch.object(triton, "CHUNK", 64):
            equal(triton, Case(world[1], rank, level, [rule(**options)], landing, t, pairs=pairs))

    with interpreter():
        check()


def launches_and_sums() -> dict[str, Any]:
    """Of 16 matrices at aligned places, of which one has an aligned place in the landing buffer too; sums twice."""
    fragments = [Fragment(f"t{i}", (4, 64), 0, 256, 256 * i) for i in range(16)]
    case = Case([fragments], 0, 2, [rule()], pairs=[(torch.float32, torch.float32)])
    found: dict[str, Any] = {}
    with interpreter():
        found["sums"] = [case.run(triton).sums.tolist() for _ in range(2)]
    groups, landing = triton._kept[case.work].made["programs"][1].groups, Item._fields.index("landing")
    found["places"] = {group.plain: (group.items[:, landing] % 16).tolist() for group in groups}
    found["launches"] = len(groups)
    return found


def a_place_beyond_the_landing_buffer() -> str:
    case = Case([whole((8, 16))], 0, 2, [rule()])
    case.length -= 4
    with interpreter():
        try:
            case.run(triton)
        except ValueError as error:
            return str(error)
    return ""


def steps_of_56_matrices() -> tuple[bool, list[str], list[str]]:
    """Shapes of LLaMA-60M by 16, in stacks as theirs on a GPU: whether bits are eager's; launches and operations."""
    shapes = [(32, 32)] * 32 + [(86, 32)] * 16 + [(32, 86)] * 8
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    gradients = [torch.randn(shape) for shape in shapes]
    its_kernels = Launches(triton_travel._kernels(), ("momentum_weights", "units", "keep"))
    sums = Launches(triton._kernels(), ("add_partials",))

    def places(rows: int, columns: int, device: torch.device) -> int:
        return stacks.stack_size(16 * rows, 16 * columns, torch.device("cuda"))

    small = partial(matrices.plan_rounds, limit=matrices.ROUND >> 8)
    weights: dict[str, list[torch.nn.Parameter]] = {}
    with interpreter(), patch.object(products, "stack_size", places), patch.object(rounds, "plan_rounds", small):
        for name in ("eager", "triton"):
            weights[name] = [torch.nn.Parameter(one.clone()) for one in start]
            for weight, gradient in zip(weights[name], gradients, strict=True):
                weight.grad = gradient
            with kernel(name):
                optimizer = GWTAdamW(weights[name], lr=0.01, level=1, recipe="orthogonal", detail_gain=0.5)
                for _ in range(2):
                    optimizer.step()
        same = all(torch.equal(a, b) for a, b in zip(*weights.values(), strict=True))
        with kernel("triton"), its_kernels.instead(), sums.instead(), Operations() as operations:
            optimizer.step()
    return same, its_kernels.names + sums.names, operations.names
