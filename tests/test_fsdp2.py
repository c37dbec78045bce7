"""FSDP2, HSDP and tensor parallelism on real ranks, in float64: what a step costs, and what it keeps.

The update is that of one process on every number of ranks and at every level in `test_matrix.py`.
"""

from __future__ import annotations

from math import prod

import pytest

from fsdp2_cases import alone_case, fsdp2_case
from gwt_dist.piece import moments_shape
from ranks import run_ranks
from zero_cases import Net, shapes_of

RECIPES = ["paper", "energy"]


def kept_once(level: int) -> int:
    """Coefficients of the model, each counted once."""
    return sum(
        prod(moments_shape(shape, level if "attn" in name or "mlp" in name else 0, "haar"))
        for name, shape in shapes_of(Net()).items()
    )


@pytest.mark.support("FSDP2", "`fully_shard`, uneven rows, ranks without rows")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("world_size", "level"), [(1, 2), (2, 1), (4, 3)])
def test_rows(ranks, world_size, level, recipe) -> None:
    """Uneven rows, and ranks that hold no row of some tensors."""
    results = ranks(world_size, fsdp2_case, "rows", level, recipe)
    for result in results:
        assert result["error"] < 1e-12
        assert result["plain"] == 0
        assert result["state_dict"] == ""
        # One sum for the norms of all tensors, and nothing to complete: rows are never cut.
        assert [len(calls) for calls in result["collectives"]] == [int(recipe == "paper")] * 5
        assert result["collectives"] == results[0]["collectives"]
    assert sum(result["moments"] for result in results) == kept_once(level)


@pytest.mark.support("FSDP2", "HSDP")
@pytest.mark.parametrize("recipe", RECIPES)
def test_replicas_of_shards(ranks, recipe) -> None:
    """Norms are summed over the axis that shards and not over the one that replicates."""
    results = ranks(4, fsdp2_case, "hsdp", 2, recipe)
    for result in results:
        assert result["error"] < 1e-12
        assert [len(calls) for calls in result["collectives"]] == [int(recipe == "paper")] * 5
    assert sum(result["moments"] for result in results) == 2 * kept_once(2)


@pytest.mark.support("FSDP2", "tensor parallelism x FSDP, `_StridedShard`, several meshes in one optimizer")
@pytest.mark.parametrize("recipe", RECIPES)
def test_tensor_parallel_under_fsdp(ranks, recipe) -> None:
    """Two meshes in one optimizer, rows strided over both axes, columns cut in the middle of a unit."""
    results = ranks(4, fsdp2_case, "tensor parallel", 3, recipe)
    assert any("_StridedShard" in placement for placement in results[0]["placements"])
    assert any("Shard(dim=1)" in placement for placement in results[0]["placements"])
    for result in results:
        assert result["error"] < 1e-12
        groups = [name for calls in result["collectives"][:1] for name, _ in calls]
        # At most one for cut units and one for norms for each process group.
        assert max(groups.count(name) for name in groups) <= 2
        assert {tuple(calls) for calls in result["collectives"]} == {tuple(result["collectives"][0])}


@pytest.mark.support("FSDP2", "`Shard(1)`, aligned or cut within a unit")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("world_size", "level"), [(2, 2), (3, 3)])
def test_columns(ranks, world_size, level, recipe) -> None:
    """Columns cut where no unit ends: units are completed across ranks, moments of both sides agree."""
    results = ranks(world_size, fsdp2_case, "columns", level, recipe)
    for result in results:
        assert result["error"] < 1e-12
        assert result["plain"] > 0
        assert "is cut within a unit" in result["state_dict"]
        assert [len(calls) for calls in result["collectives"]] == [1 + int(recipe == "paper")] * 5
    assert sum(result["moments"] for result in results) > kept_once(level)


@pytest.mark.support("FSDP2", "any wavelet")
def test_rows_of_another_wavelet(ranks) -> None:
    for result in ranks(3, fsdp2_case, "rows", 2, "energy", "db2"):
        assert result["error"] < 1e-12
        assert result["collectives"] == [[]] * 5


@pytest.mark.support("FSDP2", "parameters that the forward pass does not use")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_parameter_that_the_forward_does_not_use_stays_as_it_is(ranks, recipe) -> None:
    for result in ranks(2, fsdp2_case, "rows", 2, recipe, "haar", "mlp_row"):
        assert result["error"] < 1e-12
        assert result["unused"] == ["mlp_row.weight", "frozen.weight"]


def test_a_rank_that_raises_alone_does_not_leave_the_others_waiting_for_ever(forks) -> None:
    """A steady step has no collective to agree on errors; the timeout of the process group ends the wait."""
    (waiting, seconds), (raised, at_once) = run_ranks(alone_case, 2, 3.0, forks=forks)
    assert raised.startswith("ValueError: level=3") and at_once < 1
    assert waiting.startswith("RuntimeError") and "imed out" in waiting
    assert 2 < seconds < 20
