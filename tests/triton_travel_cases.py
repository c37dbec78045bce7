"""Cases for `test_triton_travel.py` that run where Triton interprets its kernels; see `triton_cases`."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gwt_dist import Fragment
from gwt_dist.kernels import triton
from gwt_dist.kernels.work import Item
from test_layout import worlds
from travel_cases import OPTIONS, WIDE, Case, equal, rule, whole
from triton_cases import SLOW, interpreter

PAIRS = (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)


def equal_to_eager_at_every_level() -> None:
    """Whole units and ragged rows, in places that are aligned to 16 bytes and that are not; rules differ."""
    rules = [rule(), rule(lr=torch.tensor(0.3), nesterov=True, detail_gain=0.3)]
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
