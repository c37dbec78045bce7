"""DDP, ZeroRedundancyOptimizer, and fairscale's OSS and ShardedDataParallel on real ranks, in float64.

Every tensor is whole on the rank that updates it, and no collective is made. The update is that of one process on
every number of ranks in `test_matrix.py`.
"""

from __future__ import annotations

import pytest

from test_fsdp2 import kept_once
from whole_tensor_cases import (
    accumulation_case,
    guarded_case,
    load_case,
    overlap_case,
    parity_case,
    save_case,
    unused_case,
)

pytestmark = pytest.mark.matrix

SHARDED = ["zro", "zro-views", "oss", "sdp-no-buckets", "sdp-model-zero-grad", "sdp-set-to-zero"]
RECIPES = ["paper", "energy"]


@pytest.mark.support("DDP", "`gradient_as_bucket_view` True and False, no collective")
@pytest.mark.support("DDP + ZeroRedundancyOptimizer", "`parameters_as_bucket_view` True and False, no collective")
@pytest.mark.support("fairscale", "OSS + DDP; ShardedDataParallel; no collective")
@pytest.mark.parametrize("kind", ["ddp", "ddp-views", *SHARDED])
def test_ranks_keep_the_moments_of_their_own_tensors(ranks, kind) -> None:
    results = ranks(3, parity_case, kind, 2, "paper")
    for result in results:
        assert result["error"] < 1e-12
        assert result["collectives"] == []
    assert sum(result["moments"] for result in results) == (1 if kind in SHARDED else 3) * kept_once(2)


@pytest.mark.support("DDP + ZeroRedundancyOptimizer", "`consolidate_state_dict`, loaded on other ranks or by OSS")
@pytest.mark.support("fairscale", "OSS `consolidate_state_dict`, loaded on other ranks or by DDP")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [("zro", "zro-views"), ("zro-views", "oss"), ("oss", "ddp"), ("ddp", "zro"), ("oss", "oss")],
)
def test_a_consolidated_state_is_that_of_one_process_and_loads_on_other_ranks(
    ranks, saved_by, loaded_by, recipe, tmp_path
) -> None:
    """Saved on 3 ranks, loaded on 2: other parameters belong to other ranks."""
    errors = ranks(3, save_case, saved_by, 2, recipe, str(tmp_path))[0]
    assert errors.keys() == {"step", "exp_avg", "exp_avg_sq", "limited_norm"}
    assert max(errors.values()) < 1e-12
    results = ranks(2, load_case, saved_by, loaded_by, 2, recipe, str(tmp_path))
    for result in results:
        assert result["error"] < 1e-12
    if loaded_by == "ddp":
        assert [result["emptied"] for result in results] == [[], []]
        return
    # Why `load_case` loads a copy: a rank empties the entries of the other ranks in the very dict that it was given.
    emptied = [set(result["emptied"]) for result in results]
    assert emptied[0] and emptied[1] and not emptied[0] & emptied[1]
    assert sorted(emptied[0] | emptied[1]) == results[0]["kept"]
    assert sum(result["moments"] for result in results) == kept_once(2)


@pytest.mark.support("DDP", "parameters that no rank, or only some ranks use, plain, OSS and `ZeroRedundancyOptimizer`")
@pytest.mark.parametrize("kind", ["ddp", "zro", "oss"])
def test_a_parameter_that_no_rank_uses_stays_as_it_is(ranks, kind) -> None:
    for result in ranks(2, unused_case, kind, True):
        assert result["error"] < 1e-12
        assert result["stays"]
        assert "mlp_row.weight" in result["without state"]


@pytest.mark.parametrize("kind", ["ddp", "zro", "oss"])
def test_a_parameter_that_one_rank_uses_moves_on_all(ranks, kind) -> None:
    for result in ranks(2, unused_case, kind, False):
        assert result["error"] < 1e-12
        assert not result["stays"]


@pytest.mark.support("DDP", "accumulation with `no_sync`, plain, OSS and `ZeroRedundancyOptimizer`")
@pytest.mark.support("fairscale", "ShardedDataParallel, accumulation with `no_sync`")
@pytest.mark.parametrize("kind", ["ddp", "zro", "oss", "sdp-no-buckets", "sdp-model-zero-grad"])
def test_accumulation_without_synchronisation_is_one_batch(ranks, kind) -> None:
    for result in ranks(2, accumulation_case, kind):
        assert result["error"] < 1e-12


@pytest.mark.support(
    "fairscale", "ShardedDataParallel with buckets and `zero_grad(set_to_none=True)`", outcome="refused"
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_that_left_their_buckets_are_refused_by_all_ranks(ranks, world_size) -> None:
    for result in ranks(world_size, guarded_case, "sdp"):
        assert result["taken"] == 1
        assert result["error"] < 1e-12  # the refused step has changed nothing
        assert "8 of 8 gradients are not in the buckets of ShardedDataParallel" in result["message"]
        for way_out in ("model.zero_grad()", "optimizer.zero_grad(set_to_none=False)", "reduce_buffer_size=0"):
            assert way_out in result["message"]


def test_without_attach_gradients_that_left_their_buckets_train_something_else(ranks) -> None:
    """The number that the check is for; `attach` is the only place where the optimizer sees the buckets."""
    for result in ranks(2, guarded_case, "sdp-unguarded"):
        assert result["taken"] == 5
        assert result["error"] > 0.1


@pytest.mark.support("DDP + ZeroRedundancyOptimizer", "`overlap_with_ddp`, by torch", outcome="refused")
def test_stepping_within_the_backward_pass_of_ddp_is_refused(ranks) -> None:
    assert "requires using a functional optimizer" in ranks(2, overlap_case)[0]
