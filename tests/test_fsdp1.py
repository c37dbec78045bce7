"""FSDP1 on real ranks, in float64: the update equals the update of one process."""

from __future__ import annotations

import re
from math import prod

import pytest

from fsdp1_cases import forgotten_attach_case, fsdp1_case, shifted_case, unreduced_case
from gwt_dist.kernels import moments_shape
from zero_cases import Net, shapes_of

pytestmark = pytest.mark.matrix


def kept_once(level: int) -> int:
    """Coefficients of the model at one level, each counted once."""
    return sum(prod(moments_shape(shape, level, "haar")) for shape in shapes_of(Net()).values())


@pytest.mark.support("FSDP1", "FULL_SHARD, `use_orig_params` True and False, 2 to 4 ranks")
@pytest.mark.parametrize("recipe", ["paper", "energy"])
@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_full_shard(ranks, world_size, use_orig_params, level, recipe) -> None:
    results = ranks(world_size, fsdp1_case, "FULL_SHARD", use_orig_params, level, recipe)
    for result in results:
        assert result["error"] < 1e-12
        assert result["steps"] in ([5.0], [])
        assert result["collectives"] == results[0]["collectives"]
        # One for cut units where there are any, one for norms: for all units of FSDP together.
        assert all(
            int(recipe == "paper") <= len(calls) <= 1 + int(recipe == "paper") for calls in result["collectives"]
        )
    assert sum(result["moments"] for result in results) >= kept_once(level)


@pytest.mark.support("FSDP1", "SHARD_GRAD_OP, NO_SHARD, HYBRID_SHARD")
@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("strategy", ["SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"])
def test_other_strategies(ranks, strategy, use_orig_params) -> None:
    results = ranks(4 if strategy == "HYBRID_SHARD" else 2, fsdp1_case, strategy, use_orig_params, 2, "paper")
    for result in results:
        assert result["error"] < 1e-12
        if strategy == "NO_SHARD":
            assert result["collectives"] == [[]] * 5
            assert result["moments"] == kept_once(2)


@pytest.mark.support("FSDP1", "a forgotten `attach`", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_forgotten_attach_is_refused(ranks, use_orig_params) -> None:
    for message in ranks(2, forgotten_attach_case, use_orig_params):
        assert "gwt_dist.attach(optimizer, model)" in message


@pytest.mark.support("FSDP1", "a layout that is not as recorded", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_records_of_fsdp_that_do_not_agree_are_refused_by_all_ranks(ranks, use_orig_params) -> None:
    for message in ranks(2, shifted_case, use_orig_params):
        assert re.search(r"rank 0: elements .* are not those of the model's weight", message), message


@pytest.mark.support("FSDP1", "a step on gradients of `no_sync`", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_a_step_on_gradients_that_were_not_reduced_is_refused_by_all_ranks(ranks, use_orig_params) -> None:
    """Each rank holds less than the whole of some tensor, so each sees it by itself and none is left waiting."""
    for message in ranks(4, unreduced_case, use_orig_params):
        assert re.search(r"gradient of \d+ elements for the \d+ that this rank holds", message), message
