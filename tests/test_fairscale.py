"""The shards of fairscale's FullyShardedDataParallel on real ranks, in float64.

fairscale asks for CUDA streams whatever the device is; `fairscale_cases` lends it some that do nothing, so that its own
flattening, chunks, gathering and reduce-scatter run on CPU.
"""

from __future__ import annotations

import re

import pytest

from fairscale_cases import sharded_case
from zero_cases import Net, shapes_of

RECIPES = ["paper", "energy"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("world_size", "level"), [(1, 2), (2, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("kind", ["flat", "modules", "tensors"])
def test_the_update_is_that_of_one_process(ranks, kind, world_size, level, recipe) -> None:
    results = ranks(world_size, sharded_case, kind, level, recipe)
    cut = any(result["cut"] for result in results)
    for result in results:
        assert result["error"] < 1e-12
        # One for the cut units of all tensors, one for the norms of all tensors.
        assert result["collectives"] == [cut + (recipe == "paper" and world_size > 1)] * 5
    assert cut == (world_size > 1 and (kind, world_size) != ("flat", 2))  # half of the elements of Net is even
    if world_size > 1:
        assert results[0]["names"] == sorted(shapes_of(Net()))
    if kind == "tensors" and world_size == 4:
        assert results[3]["empty"] > 0
