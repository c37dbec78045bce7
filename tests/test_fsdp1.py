"""FSDP1 on real ranks, in float64: what a step costs and keeps, and what is refused.

The update is that of one process under every strategy in `test_matrix.py`.
"""

from __future__ import annotations

import re
from math import prod

import pytest

from fsdp1_cases import apart_case, forgotten_attach_case, fsdp1_case, shifted_case, unreduced_case
from gwt_dist.piece import moments_shape
from zero_cases import Net, shapes_of

pytestmark = pytest.mark.matrix
ROW = "FULL_SHARD, SHARD_GRAD_OP, NO_SHARD, HYBRID_SHARD, `use_orig_params` True and False"


def kept_once(level: int) -> int:
    """Coefficients of the model at one level, each counted once."""
    return sum(prod(moments_shape(shape, level, "haar")) for shape in shapes_of(Net()).values())


@pytest.mark.support("FSDP1", ROW)
@pytest.mark.parametrize(("world_size", "level", "recipe"), [(2, 1, "energy"), (4, 3, "paper")])
@pytest.mark.parametrize("use_orig_params", [True, False])
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


@pytest.mark.support("FSDP1", ROW)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_without_shards_there_is_no_collective(ranks, use_orig_params) -> None:
    for result in ranks(2, fsdp1_case, "NO_SHARD", use_orig_params, 2, "paper"):
        assert result["error"] < 1e-12
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


@pytest.mark.support("FSDP1", "HYBRID_SHARD with one rank in each shard group", outcome="refused")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_replicas_whose_gradients_fsdp1_does_not_sum_are_refused(ranks, use_orig_params) -> None:
    """If the second assertion fails, a newer torch sums them and the refusal can go."""
    for message, apart in ranks(2, apart_case, use_orig_params):
        assert "sums no gradient over its 2 replicas" in message
        assert apart
